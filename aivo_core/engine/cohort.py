"""The fast engine: many learners' tails, each on one thread, in the order of their tasks."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from aivo_core.engine import blas
from aivo_core.engine.backends import FLOAT_BYTES, Compiler, Kernel, NumpyKernel, Trainer, compiler
from aivo_core.engine.contract import EngineError, LearnerResult, LearnerTask, LocalTrainingConfig
from aivo_core.engine.passes import OBJECTIVES, PRODUCT, PassOutcome
from aivo_core.engine.session import check_finite, check_task
from aivo_core.engine.tail import TailLayout, tail_base, tail_layout
from aivo_core.network import NetworkSpec, Weights

BACKENDS = ("auto", "numba", "numpy")
LOOK_AHEAD = 2
"""Tasks read ahead per thread, so that no thread waits for the reader; memory does not grow with the tasks."""


class CohortEngine:
    """``LocalTrainingEngine`` without TensorFlow (``aivo_core.engine.contract`` has the objective).

    The trunk runs once per sample, only the tail is trained, and learners are spread over threads. A learner's bytes
    depend on the spec, the base, the configuration, the task and the backend only; those of private training depend on chance
    as well, and no seed repeats them. Linear algebra of the whole process
    is held to one thread (``aivo_core.engine.blas``). Calls from several threads are safe.

    Args:
        threads: learners trained at the same time; None takes the cores that this process may use.
        backend: ``numba``, ``numpy``, or ``auto``: Numba where it is there and its compiled code is cached; where it is
            missing, fails, or is still compiling (which ``auto`` begins in the background), NumPy. The choice is made at the
            start of each ``train``.
        memory_limit: bytes that tasks read, working memory and results not yet taken may use together, beside what the
            process uses anyway; fewer learners are then trained at the same time. None sets no limit.
        objective: of ``OBJECTIVES``; every other one than ``product`` is for comparisons in benchmarks.

    Raises:
        EngineError: ``bad_config``, naming the argument.
    """

    name = "cohort"

    def __init__(
        self,
        *,
        threads: int | None = None,
        backend: str = "auto",
        memory_limit: int | None = None,
        objective: str = PRODUCT,
    ) -> None:
        if threads is not None and threads < 1:
            raise EngineError(f"threads must be at least 1, not {threads}", code="bad_config")
        if backend not in BACKENDS:
            raise EngineError(f"backend must be one of {', '.join(BACKENDS)}, not {backend}", code="bad_config")
        if memory_limit is not None and memory_limit < 1:
            raise EngineError(f"memory_limit must be at least 1 byte, not {memory_limit}", code="bad_config")
        if objective not in OBJECTIVES:
            raise EngineError(f"objective must be one of {', '.join(OBJECTIVES)}, not {objective}", code="bad_config")
        self.threads = threads or available_cores()
        self._wanted = backend
        self._memory_limit = memory_limit
        self._objective = objective
        self._compiler: Compiler = compiler
        self._numpy = NumpyKernel()

    @property
    def backend(self) -> str:
        """What the next ``train`` would compute with; with ``auto``, loads the compiled code or begins to compile it."""
        return self._kernel().backend

    @property
    def note(self) -> str:
        """Why ``auto`` does not compute with Numba; empty where it does or where a backend was asked for."""
        if self._wanted != "auto":
            return ""
        self._compiler.kernel_now()
        return self._compiler.note

    def warm_up(self) -> str:
        """Compile now, where Numba is wanted and there; later processes load the cached code.

        Returns:
            The backend.

        Raises:
            EngineError: ``no_compiler``: ``backend="numba"`` and it cannot be used.
        """
        if self._wanted == "auto":
            self._compiler.wait()
        return self.backend

    def train(
        self, *, spec: NetworkSpec, weights: Weights, config: LocalTrainingConfig, tasks: Iterable[LearnerTask]
    ) -> Iterator[LearnerResult]:
        """Train the tasks; results come lazily in their order, and ``tasks`` is read by the caller's thread alone.

        Args:
            weights: the base version's, all of ``spec.tensors``; its tail is not read.

        Raises:
            NetworkError: ``weights`` lack a tensor, or hold one of another shape or dtype or a negative variance.
            EngineError: ``bad_heads``; ``bad_config``: private training with another objective than ``product``;
                ``memory_limit``: not even one learner with one batch of samples fits; ``no_compiler``: ``backend="numba"`` and
                it cannot be used.
        """
        if config.is_private and self._objective != PRODUCT:
            raise EngineError(f"objective must be {PRODUCT} in private training, not {self._objective}", code="bad_config")
        base = tail_base(spec, weights)
        kernel = self._kernel()
        bill = self._checked_bill(kernel, spec, config)
        blas.use_one_thread()
        run = _Run(kernel, lambda: kernel.trainer(base, config, self._objective), spec, config)
        if self.threads == 1:
            return self._one_by_one(run, bill, tasks)
        return self._side_by_side(run, bill, tasks)

    def check_memory(self, spec: NetworkSpec, config: LocalTrainingConfig) -> None:
        """Check that one learner with one batch of samples fits into ``memory_limit``, before anything is prepared.

        Raises:
            EngineError: ``memory_limit``, with the bytes that are needed; ``bad_heads``.
        """
        self._checked_bill(self._kernel(), spec, config)

    def _checked_bill(self, kernel: Kernel, spec: NetworkSpec, config: LocalTrainingConfig) -> _Bill:
        bill = _Bill(kernel, tail_layout(spec), spec, config)
        if self._memory_limit is not None and bill.of(config.batch_size) > self._memory_limit:
            raise EngineError(
                f"memory_limit must be at least {bill.of(config.batch_size)} bytes for one learner, not {self._memory_limit}",
                code="memory_limit",
            )
        return bill

    def _kernel(self) -> Kernel:
        if self._wanted == "numba":
            return self._compiler.kernel()
        found = self._compiler.kernel_now() if self._wanted == "auto" else None
        return self._numpy if found is None else found

    def _one_by_one(self, run: _Run, bill: _Bill, tasks: Iterable[LearnerTask]) -> Iterator[LearnerResult]:
        for task in tasks:
            refused = self._too_large(bill, run, task)
            yield refused or run(task)

    def _side_by_side(self, run: _Run, bill: _Bill, tasks: Iterable[LearnerTask]) -> Iterator[LearnerResult]:
        pending: deque[tuple[int, Future[LearnerResult]]] = deque()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="aivo-engine") as pool:
            try:
                for task in tasks:
                    cost = 0 if self._memory_limit is None else bill.of(len(task.samples))
                    while pending and not self._fits(pending, cost):
                        yield pending.popleft()[1].result()
                    refused = self._too_large(bill, run, task)
                    pending.append((cost, _done(refused)) if refused else (cost, pool.submit(run, task)))
                while pending:
                    yield pending.popleft()[1].result()
            finally:
                for _cost, future in pending:
                    future.cancel()

    def _fits(self, pending: deque[tuple[int, Future[LearnerResult]]], cost: int) -> bool:
        if len(pending) >= LOOK_AHEAD * self.threads:
            return False
        return self._memory_limit is None or sum(c for c, _ in pending) + cost <= self._memory_limit

    def _too_large(self, bill: _Bill, run: _Run, task: LearnerTask) -> LearnerResult | None:
        if self._memory_limit is None or bill.of(len(task.samples)) <= self._memory_limit:
            return None
        needed, samples = bill.of(len(task.samples)), len(task.samples)
        return run.failed(
            task,
            EngineError(
                f"samples: training on {samples} of them needs {needed} bytes; memory_limit is {self._memory_limit}",
                code="memory_limit",
            ),
        )


class _Bill:
    """What one learner in flight costs in memory."""

    def __init__(self, kernel: Kernel, layout: TailLayout, spec: NetworkSpec, config: LocalTrainingConfig) -> None:
        self._trunk_width = max((spec.input_dim, *spec.hidden_layers[: spec.frozen_blocks]))
        self._kernel = kernel
        self._layout = layout
        self._config = config
        self._per_sample = FLOAT_BYTES * 2 * spec.input_dim
        self._result = FLOAT_BYTES * 3 * layout.size

    def of(self, samples: int) -> int:
        """Bytes of task, working memory and result."""
        return self._working(samples) + samples * self._per_sample + self._result

    def _working(self, samples: int) -> int:
        if not self._config.is_private:
            return self._kernel.working_bytes(self._layout, self._trunk_width, self._config.batch_size, samples)
        # A batch drawn by chance may hold every sample; the trunk is NumPy's whatever computes the rest, and noise is double.
        trunk = 2 * samples * (self._layout.feature_dim + 3 * self._trunk_width)
        batch = self._kernel.working_bytes(self._layout, self._trunk_width, samples, samples)
        return batch + FLOAT_BYTES * (trunk + 8 * self._layout.size)


class _Run:
    """Trains one task at a time per thread, each thread with working memory of its own."""

    def __init__(
        self, kernel: Kernel, new_trainer: Callable[[], Trainer], spec: NetworkSpec, config: LocalTrainingConfig
    ) -> None:
        self._backend = kernel.backend
        self._new_trainer = new_trainer
        self._spec = spec
        self._config = config
        self._mine = threading.local()

    def __call__(self, task: LearnerTask) -> LearnerResult:
        started = time.perf_counter()
        outcome = None
        try:
            check_task(self._spec, task)
            outcome = self._trainer()(task)
            self._check(outcome)
        except EngineError as error:
            failed = self.failed(task, error, time.perf_counter() - started)
            return failed if outcome is None else replace(failed, privacy=outcome.privacy)
        return LearnerResult(
            key=task.key,
            tail=outcome.tail,
            tail_pass_delta=outcome.after_tail_pass - task.start_tail,
            losses=outcome.tail_losses + outcome.bias_losses,
            samples=len(task.samples),
            steps=outcome.steps,
            seconds=time.perf_counter() - started,
            backend=self._backend,
            privacy=outcome.privacy,
        )

    def failed(self, task: LearnerTask, error: EngineError, seconds: float = 0.0) -> LearnerResult:
        return LearnerResult(
            key=task.key,
            samples=len(task.samples),
            seconds=seconds,
            error_code=error.code,
            error_message=str(error),
            backend=self._backend,
        )

    def _trainer(self) -> Trainer:
        if not hasattr(self._mine, "trainer"):
            self._mine.trainer = self._new_trainer()
        trainer: Trainer = self._mine.trainer
        return trainer

    def _check(self, outcome: PassOutcome) -> None:
        config = self._config
        if config.trains_tail:
            check_finite(outcome.after_tail_pass, outcome.tail_losses, config.learning_rate, "learning_rate")
        if config.trains_bias:
            check_finite(outcome.tail, outcome.bias_losses, config.bias_learning_rate, "bias_learning_rate")


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _done(result: LearnerResult) -> Future[LearnerResult]:
    future: Future[LearnerResult] = Future()
    future.set_result(result)
    return future
