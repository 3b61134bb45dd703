from __future__ import annotations

import gc
import itertools
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from aivo_core.engine.backends import compiler
from aivo_core.engine.cohort import LOOK_AHEAD, CohortEngine, available_cores
from aivo_core.engine.contract import EngineError, LearnerResult, LearnerTask, LocalTrainingConfig
from aivo_core.engine.passes import FIRST_PASS_CROSS_ENTROPY, OBJECTIVES
from aivo_core.engine.tail import tail_base
from aivo_core.network import (
    CONTENT_HEAD,
    DIFFICULTY_HEAD,
    PATH_HEAD,
    FloatArray,
    HeadSpec,
    NetworkError,
    NetworkSpec,
    default_freeze_layers,
)
from tests.synthetic_samples import TINY, make_samples, make_weights

WEIGHTS = make_weights(TINY, 1)
BASE_TAIL = TINY.flatten_tail(WEIGHTS)
QUICK = LocalTrainingConfig(epochs=2, batch_size=8, bias_epochs=2, adaptation="tail_then_bias")
LARGE = NetworkSpec(
    input_dim=70,
    hidden_layers=(96, 81, 48),
    dropout_rates=(0.3, 0.2, 0.1),
    heads=(HeadSpec(PATH_HEAD, 7), HeadSpec(CONTENT_HEAD, 40), HeadSpec(DIFFICULTY_HEAD, 10)),
    freeze_layers=default_freeze_layers(1),
)
"""Heads in another order, widths that are no multiple of anything."""

TOLERANCE = 3e-5
"""Adam divides by the root of a moment that may be tiny: each backend is up to 1e-5 away from the same run in float64."""


def task(key: str = "a", n: int = 20, seed: int = 3, spec: NetworkSpec = TINY, tail: FloatArray = BASE_TAIL) -> LearnerTask:
    return LearnerTask(key, make_samples(spec, n, seed), tail, tail, seed)


def train(
    config: LocalTrainingConfig, *tasks: LearnerTask, backend: str, spec: NetworkSpec = TINY, weights=WEIGHTS, **arguments
) -> list[LearnerResult]:
    engine = CohortEngine(backend=backend, **{"threads": 1, **arguments})
    results = list(engine.train(spec=spec, weights=weights, config=config, tasks=tasks))
    assert [result.key for result in results] == [t.key for t in tasks]
    return results


@pytest.fixture(params=["numpy", "numba"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "config",
    [
        QUICK,
        replace(QUICK, batch_size=33, epochs=3, dropout=False),
        replace(QUICK, adaptation="difficulty_bias"),
        replace(QUICK, adaptation="tail", optimiser="sgd", momentum=0.9, learning_rate=0.02),
        replace(QUICK, adaptation="tail", proximal_mu=0.0),
    ],
)
@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
@pytest.mark.parametrize("spec", [TINY, LARGE], ids=["tiny", "large"])
def test_both_backends_compute_the_same(spec: NetworkSpec, frozen: int, config: LocalTrainingConfig, objective: str) -> None:
    spec = spec.with_freeze_layers(default_freeze_layers(frozen))
    weights = make_weights(spec, 1)
    tail = spec.flatten_tail(weights)
    tasks = [task(str(n), n, n, spec, tail) for n in (9, 32, 70)]
    found = [train(config, *tasks, backend=b, spec=spec, weights=weights, objective=objective) for b in ("numpy", "numba")]
    for reference, compiled in zip(*found, strict=True):
        assert reference.error_code == compiled.error_code == ""
        moved = np.linalg.norm(reference.tail - tail)
        assert moved > 0.0
        assert np.linalg.norm(compiled.tail - reference.tail) <= TOLERANCE * moved
        assert np.linalg.norm(compiled.tail_pass_delta - reference.tail_pass_delta) <= TOLERANCE * moved
        assert compiled.losses == pytest.approx(reference.losses, abs=2e-5)
        assert (compiled.samples, compiled.steps) == (reference.samples, reference.steps)


def test_more_samples_than_the_trunk_takes_at_once(backend: str) -> None:
    one = task(n=700)
    whole = train(QUICK, one, backend=backend)[0]
    other = train(QUICK, one, backend="numpy" if backend == "numba" else "numba")[0]
    assert np.linalg.norm(whole.tail - other.tail) <= TOLERANCE * np.linalg.norm(whole.tail - BASE_TAIL)


def test_a_learners_bytes_depend_on_nothing_but_the_learner(backend: str) -> None:
    tasks = [task(str(i), n, i) for i, n in enumerate((20, 1, 33, 7, 600, 32, 2, 50))]
    alone = {one.key: train(QUICK, one, backend=backend)[0] for one in tasks}
    for order, threads, limit in itertools.product((tasks, tasks[::-1], tasks[3:]), (1, 2, 3), (None, 10**8)):
        for result in train(QUICK, *order, backend=backend, threads=threads, memory_limit=limit):
            expected = alone[result.key]
            assert result.tail.tobytes() == expected.tail.tobytes()
            assert result.tail_pass_delta.tobytes() == expected.tail_pass_delta.tobytes()
            assert result.losses == expected.losses
    renamed = train(QUICK, replace(tasks[0], key="another"), backend=backend)[0]
    assert renamed.tail.tobytes() == alone["0"].tail.tobytes()
    assert train(QUICK, replace(tasks[0], seed=99), backend=backend)[0].tail.tobytes() != alone["0"].tail.tobytes()


def test_two_calls_on_different_bases_may_interleave(backend: str) -> None:
    other = make_weights(TINY, 50)
    tasks = [task(str(i), 20, i) for i in range(4)]
    apart = [[r.tail.tobytes() for r in train(QUICK, *tasks, backend=backend, weights=w)] for w in (WEIGHTS, other)]
    engine = CohortEngine(threads=2, backend=backend)
    one, two = (engine.train(spec=TINY, weights=w, config=QUICK, tasks=tasks) for w in (WEIGHTS, other))
    assert [(a.tail.tobytes(), b.tail.tobytes()) for a, b in zip(one, two, strict=True)] == list(zip(*apart, strict=True))


def test_the_bias_pass_changes_ten_numbers_and_nothing_else(backend: str) -> None:
    (result,) = train(replace(QUICK, adaptation="difficulty_bias"), task(), backend=backend)
    part = TINY.tail_slices()["difficulty_output/bias"]
    assert list(np.flatnonzero(result.tail != BASE_TAIL)) == list(range(part.start, part.stop))
    assert not result.tail_pass_delta.any()
    assert result.steps == 2 * 3 and len(result.losses) == 2


def test_tail_then_bias_is_the_tail_pass_and_the_bias_pass_on_top(backend: str) -> None:
    one = task()
    both = train(QUICK, one, backend=backend)[0]
    tail = train(replace(QUICK, adaptation="tail"), one, backend=backend)[0]
    bias = train(replace(QUICK, adaptation="difficulty_bias"), replace(one, start_tail=tail.tail), backend=backend)[0]
    assert both.tail.tobytes() == bias.tail.tobytes()
    assert both.tail_pass_delta.tobytes() == (tail.tail - one.start_tail).tobytes()
    assert both.losses == tail.losses + bias.losses and both.steps == tail.steps + bias.steps


def test_training_lowers_the_loss_and_a_large_mu_holds_the_tail(backend: str) -> None:
    config = LocalTrainingConfig(epochs=8, learning_rate=5e-3, proximal_mu=0.0)
    free = train(config, task(n=100), backend=backend)[0]
    held = train(replace(config, proximal_mu=1000.0), task(n=100), backend=backend)[0]
    assert free.losses[-1] < free.losses[0] - 0.1
    assert np.linalg.norm(held.tail - BASE_TAIL) < 0.25 * np.linalg.norm(free.tail - BASE_TAIL)


def test_the_anchor_is_not_where_training_starts(backend: str) -> None:
    elsewhere = replace(task(), anchor_tail=np.full(TINY.tail_size, 0.5, np.float32))
    free = replace(QUICK, proximal_mu=0.0)
    same = [train(free, one, backend=backend)[0].tail.tobytes() for one in (task(), elsewhere)]
    assert same[0] == same[1]
    pulled = [train(QUICK, one, backend=backend)[0] for one in (task(), elsewhere)]
    assert np.linalg.norm(pulled[1].tail - 0.5) < np.linalg.norm(pulled[0].tail - 0.5)
    assert pulled[1].losses[0] > pulled[0].losses[0] + 1.0


def test_trunk_and_statistics_matter_and_the_bases_own_tail_does_not(backend: str) -> None:
    tail_names = {tensor.name for tensor in TINY.tail_tensors}
    expected = train(QUICK, task(), backend=backend)[0].tail.tobytes()
    for name, value in WEIGHTS.items():
        changed = train(QUICK, task(), backend=backend, weights={**WEIGHTS, name: value * np.float32(1.5)})[0]
        assert (changed.tail.tobytes() == expected) == (name in tail_names), name


def test_arrays_may_be_read_only_and_scattered(backend: str) -> None:
    one = task()
    expected = train(QUICK, one, backend=backend)[0].tail.tobytes()
    wide = np.repeat(one.samples.first, 2, axis=1)
    samples = replace(one.samples, first=wide[:, ::2], content=one.samples.content.astype(np.int16))
    for array in (samples.second, samples.level, one.start_tail):
        array.flags.writeable = False
    try:
        assert train(QUICK, replace(one, samples=samples), backend=backend)[0].tail.tobytes() == expected
    finally:
        one.start_tail.flags.writeable = True


def bad_tasks() -> list[tuple[LearnerTask, str]]:
    one = task("x")
    nan = one.samples.first.copy()
    nan[2, 1] = np.nan
    samples = one.samples
    return [
        (replace(one, samples=samples.take(slice(0, 0))), "no_samples"),
        (replace(one, samples=replace(samples, first=nan)), "not_finite"),
        (replace(one, samples=replace(samples, content=samples.content + 4)), "bad_labels"),
        (replace(one, samples=replace(samples, path=samples.path - 1)), "bad_labels"),
        (replace(one, samples=replace(samples, level=samples.level + 10)), "bad_labels"),
        (replace(one, samples=replace(samples, second=samples.second[:, :-1])), "wrong_shape"),
        (replace(one, start_tail=BASE_TAIL[:-1]), "wrong_shape"),
        (replace(one, anchor_tail=BASE_TAIL.astype(np.float64)), "wrong_shape"),
        (replace(one, seed=-1), "bad_seed"),
        (replace(one, samples=replace(samples, first=samples.first * np.float32(1e30))), "diverged"),
    ]


def test_a_learner_that_cannot_be_trained_fails_alone(backend: str) -> None:
    good = [task("a", 1, 1), task("b", 20, 2)]
    alone = [r.tail.tobytes() for r in train(QUICK, *good, backend=backend)]
    bad = bad_tasks()
    for threads in (1, 2):
        results = train(QUICK, good[0], *(t for t, _ in bad), good[1], backend=backend, threads=threads)
        assert [r.error_code for r in results[1:-1]] == [code for _, code in bad]
        assert all(r.tail is None and r.tail_pass_delta is None and r.error_message for r in results[1:-1])
        assert [results[0].tail.tobytes(), results[-1].tail.tobytes()] == alone
        assert {r.backend for r in results} == {CohortEngine(backend=backend).backend}


@pytest.mark.parametrize(("field", "adaptation"), [("learning_rate", "tail"), ("bias_learning_rate", "difficulty_bias")])
def test_a_diverging_learning_rate_is_named(backend: str, field: str, adaptation: str) -> None:
    steep = LocalTrainingConfig(epochs=20, bias_epochs=20, optimiser="sgd", proximal_mu=1e8, learning_rate=900.0)
    if field == "bias_learning_rate":  # Adam's steps on biases are bounded: the head itself must be at the edge of float32
        edge = BASE_TAIL.copy()
        edge[TINY.tail_slices()["difficulty_output/kernel"]] = np.float32(3e38)
        one = replace(task(), start_tail=edge)
    else:
        one = task()
    (result,) = train(replace(steep, adaptation=adaptation), one, backend=backend)
    assert result.error_code == "diverged" and field in result.error_message


def test_a_number_that_is_not_finite_stays_visible_through_the_arithmetic(backend: str) -> None:
    """Past the checks: one NaN in one sample, and the compiler's freedom with floats must not make it vanish."""
    kernel = compiler.kernel() if backend == "numba" else CohortEngine(backend="numpy")._kernel()
    trainer = kernel.trainer(tail_base(TINY, WEIGHTS), QUICK, "product")
    one = task()
    for field in ("first", "second"):
        for value in (np.nan, np.inf):
            rows = getattr(one.samples, field).copy()
            rows[3, 2] = value
            outcome = trainer(replace(one, samples=replace(one.samples, **{field: rows})))
            assert not np.isfinite(outcome.after_tail_pass).all()
            assert not np.isfinite(outcome.tail_losses).all()
    assert np.isfinite(trainer(one).tail).all()


def test_what_the_engine_is_built_with_is_checked() -> None:
    for arguments, field in [
        ({"threads": 0}, "threads"),
        ({"backend": "cuda"}, "backend"),
        ({"memory_limit": 0}, "memory_limit"),
        ({"objective": "mse"}, "objective"),
    ]:
        with pytest.raises(EngineError, match=field) as caught:
            CohortEngine(**arguments)
        assert caught.value.code == "bad_config"
    assert CohortEngine().threads == available_cores() >= 1


def test_a_base_that_cannot_be_used_is_refused_before_any_task_is_read(backend: str) -> None:
    def tasks() -> Iterator[LearnerTask]:
        raise AssertionError("read a task")
        yield

    engine = CohortEngine(backend=backend)
    lacking = {name: value for name, value in WEIGHTS.items() if name != "shared_bn_1/gamma"}
    with pytest.raises(NetworkError, match="shared_bn_1/gamma"):
        engine.train(spec=TINY, weights=lacking, config=QUICK, tasks=tasks())
    negative = {**WEIGHTS, "shared_bn_3/moving_variance": -WEIGHTS["shared_bn_3/moving_variance"]}
    with pytest.raises(NetworkError, match="shared_bn_3/moving_variance"):
        engine.train(spec=TINY, weights=negative, config=QUICK, tasks=tasks())
    two_heads = replace(TINY, heads=TINY.heads[:2])
    with pytest.raises(EngineError, match="path_output") as caught:
        engine.train(spec=two_heads, weights=make_weights(two_heads, 1), config=QUICK, tasks=tasks())
    assert caught.value.code == "bad_heads"


@pytest.mark.parametrize("threads", [1, 3])
def test_tasks_are_read_a_bounded_way_ahead_and_by_the_caller_alone(backend: str, threads: int) -> None:
    read: list[str] = []

    def tasks() -> Iterator[LearnerTask]:
        for number in range(50):
            read.append(str(number))
            yield task(str(number), 5, number)

    results = CohortEngine(threads=threads, backend=backend).train(spec=TINY, weights=WEIGHTS, config=QUICK, tasks=tasks())
    assert read == []
    for taken, result in enumerate(results, start=1):
        assert result.key == str(taken - 1)
        assert len(read) <= taken + LOOK_AHEAD * threads
        if taken == 20:
            break
    results.close()
    assert len(read) <= 20 + LOOK_AHEAD * threads


def test_an_error_in_reading_the_tasks_reaches_the_caller(backend: str) -> None:
    def tasks() -> Iterator[LearnerTask]:
        yield task("a")
        raise OSError("the disk is gone")

    for threads in (1, 2):
        with pytest.raises(OSError, match="the disk is gone"):
            list(CohortEngine(threads=threads, backend=backend).train(spec=TINY, weights=WEIGHTS, config=QUICK, tasks=tasks()))


def test_a_memory_limit_too_small_for_one_learner_is_refused_before_anything_starts(backend: str) -> None:
    engine = CohortEngine(backend=backend, memory_limit=10_000)
    with pytest.raises(EngineError, match=r"memory_limit must be at least \d+ bytes for one learner, not 10000") as caught:
        engine.train(spec=TINY, weights=WEIGHTS, config=QUICK, tasks=iter([task()]))
    assert caught.value.code == "memory_limit"


def test_a_memory_limit_holds_back_tasks_and_refuses_the_one_that_is_too_large(backend: str) -> None:
    limit = 300_000
    tasks = [task("a", 8), task("huge", 3000), task("b", 8)]
    for threads in (1, 4):
        free = train(QUICK, *tasks, backend=backend, threads=threads)
        held = train(QUICK, *tasks, backend=backend, threads=threads, memory_limit=limit)
        assert [r.error_code for r in held] == ["", "memory_limit", ""]
        assert str(limit) in held[1].error_message and "3000" in held[1].error_message
        assert [held[i].tail.tobytes() for i in (0, 2)] == [free[i].tail.tobytes() for i in (0, 2)]


def test_memory_does_not_grow_with_the_number_of_learners(backend: str) -> None:
    made = [task("", 5, seed) for seed in range(7)]
    config = replace(QUICK, epochs=1, adaptation="tail")

    def peak(learners: int) -> int:
        tasks = (replace(made[i % 7], key=str(i)) for i in range(learners))
        engine = CohortEngine(threads=2, backend=backend)
        gc.collect()
        tracemalloc.start()
        try:
            results = engine.train(spec=TINY, weights=WEIGHTS, config=config, tasks=tasks)
            for number, result in enumerate(results):
                assert not result.error_code
                if number % 100 == 0:
                    gc.collect()  # what waits for the collector is no growth
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(20)
    assert peak(2000) < 1.5 * peak(200) + 100_000


def test_the_first_pass_objective_reads_nothing_of_the_second_pass(backend: str) -> None:
    one, config = task(), replace(QUICK, adaptation="tail")
    other = replace(one, samples=replace(one.samples, second=one.samples.second * 3, score=1 - one.samples.score))
    results = [train(config, t, backend=backend, objective=FIRST_PASS_CROSS_ENTROPY)[0] for t in (one, other)]
    assert results[0].tail.tobytes() == results[1].tail.tobytes()
    assert results[0].tail.tobytes() != train(config, one, backend=backend)[0].tail.tobytes()
