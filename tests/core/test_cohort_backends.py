"""Which backend computes: with a compiler, without one, with one that fails, and while one is still at work."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from aivo_core.engine import blas, cohort, compiled, compiled_kernel
from aivo_core.engine.backends import Compiler, NumpyKernel
from aivo_core.engine.cohort import CohortEngine
from aivo_core.engine.contract import EngineError, LearnerResult
from tests.core.test_cohort_engine import QUICK, WEIGHTS, task, train
from tests.synthetic_samples import TINY

REPOSITORY = Path(__file__).resolve().parents[2]
NUMPY = NumpyKernel.backend


class SlowCompiler(compiled_kernel.CompiledKernel):
    """Compiles when it is let, as with a cold cache."""

    may_finish: threading.Event

    def is_cached(self) -> bool:
        return False

    def compile(self) -> None:
        assert self.may_finish.wait(60)
        super().compile()


@pytest.fixture
def own_compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Engines of this test begin without a compiled kernel."""
    own = Compiler()
    monkeypatch.setattr(cohort, "compiler", own)
    return own


@pytest.fixture
def may_finish(monkeypatch: pytest.MonkeyPatch, own_compiler: Compiler) -> Iterator[threading.Event]:
    """A compiler that is at work until the event is set."""
    event = threading.Event()
    monkeypatch.setattr(SlowCompiler, "may_finish", event, raising=False)
    monkeypatch.setattr(compiled_kernel, "CompiledKernel", SlowCompiler)
    yield event
    event.set()
    own_compiler.wait()


def results_of(engine: CohortEngine, learners: int) -> Iterator[LearnerResult]:
    tasks = (task(str(number), 10, number) for number in range(learners))
    return iter(engine.train(spec=TINY, weights=WEIGHTS, config=QUICK, tasks=tasks))


def test_a_warm_cache_is_loaded_at_once(own_compiler: Compiler) -> None:
    CohortEngine(backend="numba").warm_up()
    fresh = Compiler()
    assert fresh.kernel_now() is not None
    assert fresh.note == ""


def test_numpy_computes_while_the_compiler_works_and_the_choice_is_made_once_a_call(may_finish: threading.Event) -> None:
    engine = CohortEngine(threads=1)
    first = results_of(engine, 6)
    before = [next(first), next(first)]
    assert engine.backend == NUMPY
    assert engine.note == "numba is compiling"
    may_finish.set()
    assert engine.warm_up().startswith("numba")
    assert engine.note == ""
    assert {r.backend for r in [*before, *first]} == {NUMPY}
    second = list(results_of(engine, 6))
    assert {r.backend for r in second} == {engine.backend} and engine.backend.startswith("numba")


def test_numba_that_is_asked_for_is_waited_for(may_finish: threading.Event) -> None:
    timer = threading.Timer(0.2, may_finish.set)
    timer.start()
    assert {r.backend for r in results_of(CohortEngine(backend="numba"), 3)} == {compiled_kernel.CompiledKernel.backend}
    timer.join()


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("broken", ["__init__", "compile"])
def test_a_compiler_that_fails_leaves_numpy_and_says_so(
    monkeypatch: pytest.MonkeyPatch, own_compiler: Compiler, broken: str, cached: bool
) -> None:
    def fail(*_: object) -> None:
        raise OSError("LLVM is not itself today")

    monkeypatch.setattr(compiled_kernel.CompiledKernel, broken, fail)
    monkeypatch.setattr(compiled_kernel.CompiledKernel, "is_cached", lambda _self: cached)
    engine = CohortEngine(threads=1)
    assert engine.warm_up() == NUMPY
    assert "OSError: LLVM is not itself today" in engine.note
    results = list(results_of(engine, 2))
    assert {(r.backend, r.error_code) for r in results} == {(NUMPY, "")}
    assert results[0].tail.tobytes() == train(QUICK, task("0", 10, 0), backend="numpy")[0].tail.tobytes()
    with pytest.raises(EngineError, match="LLVM is not itself today") as caught:
        results_of(CohortEngine(backend="numba"), 1)
    assert caught.value.code == "no_compiler"
    assert CohortEngine(backend="numpy").note == ""


def test_without_a_folder_for_the_cache_the_code_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def dispatcher(*, cache: bool) -> str:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return "a dispatcher"

    monkeypatch.setattr(compiled, "dispatcher", dispatcher)
    compiled_kernel.CompiledKernel()
    assert asked == [True, False]
    assert "no locator available" in caplog.text


def test_a_child_forked_while_the_compiler_works_uses_numpy(may_finish: threading.Event, own_compiler: Compiler) -> None:
    assert own_compiler.kernel_now() is None
    own_compiler.forget_thread_after_fork()  # what the child's hook does; a fork here would take the test runner along
    assert own_compiler.kernel_now() is None
    assert "forked" in own_compiler.note


SCRIPT = """
import sys
{before}
from tests.core.test_cohort_engine import QUICK, WEIGHTS, task
from tests.synthetic_samples import TINY
from aivo_core.engine.cohort import CohortEngine
engine = CohortEngine(backend={backend!r}, threads=2)
(result,) = engine.train(spec=TINY, weights=WEIGHTS, config=QUICK, tasks=[task()])
{after}
"""


def run(*, before: str = "", backend: str = "auto", after: str, **environment: str) -> list[str]:
    """Lines that a fresh interpreter prints."""
    code = SCRIPT.format(before=before, backend=backend, after=after)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_numba_numpy_computes_and_says_why() -> None:
    lines = run(before="sys.modules['numba'] = None", after="print(result.backend); print(engine.note); print(result.error_code)")
    assert lines[0] == NUMPY
    assert lines[1].startswith("numba cannot be used: ") and "numba" in lines[1].removeprefix("numba cannot be used: ")
    assert lines[2] == ""


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_the_engine_needs_neither_tensorflow_nor_django(backend: str) -> None:
    after = "print(sorted({'tensorflow', 'keras', 'django'} & set(sys.modules)), 'numba' in sys.modules)"
    assert run(backend=backend, after=after) == [f"[] {backend == 'numba'}"]


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_linear_algebra_is_held_to_one_thread_whatever_the_environment_says(backend: str) -> None:
    """And so a learner's bytes do not depend on the environment."""
    after = """
import ctypes
from aivo_core.engine import blas
for name in blas.use_one_thread():
    pass
for path in sorted(set(blas._loaded())):
    library = ctypes.CDLL(path)
    names = [f"{p}openblas_get_num_threads{s}" for p in ("scipy_", "") for s in ("64_", "")]
    print(*[getattr(library, name)() for name in names if hasattr(library, name)])
print(result.tail.tobytes().hex())
"""
    found = [run(backend=backend, after=after, OMP_NUM_THREADS=n, OPENBLAS_NUM_THREADS=n) for n in ("1", "2")]
    assert found[0] == found[1]
    assert len(found[0]) == (3 if backend == "numba" else 2)
    assert set(found[0][:-1]) == {"1"}


def test_numpys_own_library_is_found() -> None:
    assert any("openblas" in name for name in blas.use_one_thread())


@pytest.mark.slow
def test_a_learners_bytes_do_not_depend_on_which_process_found_the_cache_empty(tmp_path: Path) -> None:
    """From an empty cache in a folder of its own: what a package folder that is read-only leads to as well."""
    after = """
from aivo_core.engine.backends import compiler
from aivo_core.network import NetworkSpec
from tests.core.test_cohort_engine import LearnerTask, LocalTrainingConfig, make_samples
from tests.synthetic_samples import make_weights
spec = NetworkSpec()
weights = make_weights(spec, 1)
tail = spec.flatten_tail(weights)
(whole,) = engine.train(
    spec=spec, weights=weights, config=LocalTrainingConfig(), tasks=[LearnerTask("a", make_samples(spec, 100, 0), tail, tail, 0)]
)
print(result.backend, compiler._kernel._function.stats.cache_misses, whole.tail.tobytes().hex())
"""
    first, second = (run(backend="numba", after=after, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert first == second
    assert first[0].startswith(f"{compiled_kernel.CompiledKernel.backend} Counter() ")
    assert list(tmp_path.rglob("*.nbi"))


def test_where_no_other_process_can_compile_this_one_does_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled_here = []

    class Dispatcher:
        def compile(self, _signature: object) -> None:
            compiled_here.append(True)

        def disable_compile(self) -> None: ...

    monkeypatch.setattr(compiled, "dispatcher", lambda *, cache: Dispatcher())
    monkeypatch.setattr(compiled_kernel.CompiledKernel, "is_cached", lambda _self: False)
    monkeypatch.setattr(compiled_kernel, "_COMPILE", "raise SystemExit('no more memory')")
    compiled_kernel.CompiledKernel().compile()
    assert compiled_here == [True]
    assert "could not be compiled in a process of its own" in caplog.text and "no more memory" in caplog.text
