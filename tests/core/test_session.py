from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivo_core.engine.contract import EngineError, LearnerTask
from aivo_core.engine.session import BIAS_PASS, TAIL_PASS, check_task, plan_batches
from tests.synthetic_samples import TINY, make_samples


@settings(max_examples=50, deadline=None)
@given(samples=st.integers(1, 90), batch_size=st.integers(1, 40), epochs=st.integers(1, 4), seed=st.integers(0, 2**63))
def test_every_epoch_takes_every_sample_once_and_padding_is_masked(samples: int, batch_size: int, epochs: int, seed: int) -> None:
    plan = plan_batches(samples=samples, batch_size=batch_size, epochs=epochs, seed=seed, training_pass=TAIL_PASS)
    assert plan.index.shape == plan.mask.shape == (epochs * -(-samples // batch_size), batch_size)
    for epoch in range(epochs):
        steps = plan.epoch == epoch
        taken = plan.index[steps][plan.mask[steps] == 1.0]
        assert sorted(taken) == list(range(samples))
    assert (plan.mask.sum(axis=1) >= 1).all()


def test_the_order_depends_on_seed_and_pass_only() -> None:
    arguments = {"samples": 50, "batch_size": 8, "epochs": 2}
    plan = plan_batches(**arguments, seed=1, training_pass=TAIL_PASS)
    assert np.array_equal(plan.index, plan_batches(**arguments, seed=1, training_pass=TAIL_PASS).index)
    assert not np.array_equal(plan.index, plan_batches(**arguments, seed=2, training_pass=TAIL_PASS).index)
    assert not np.array_equal(plan.index, plan_batches(**arguments, seed=1, training_pass=BIAS_PASS).index)
    assert not np.array_equal(plan.index[:7], plan.index[7:])


def test_the_mean_of_an_epoch_counts_a_short_batch_by_its_samples() -> None:
    plan = plan_batches(samples=5, batch_size=4, epochs=2, seed=0, training_pass=TAIL_PASS)
    assert plan.epoch_means(np.array([1.0, 6.0, 2.0, 7.0], np.float32)) == (2.0, 3.0)


def task() -> LearnerTask:
    tail = np.zeros(TINY.tail_size, np.float32)
    return LearnerTask("a", make_samples(TINY, 10, 0), tail, tail, 1)


def broken(field: str, value: float) -> LearnerTask:
    good = task()
    array = getattr(good.samples, field).copy()
    array.flat[3] = value
    return replace(good, samples=replace(good.samples, **{field: array}))


@pytest.mark.parametrize(
    ("bad", "code", "field"),
    [
        (replace(task(), samples=task().samples.take(slice(0, 0))), "no_samples", "samples"),
        (replace(task(), seed=-1), "bad_seed", "seed"),
        (replace(task(), start_tail=np.zeros(3, np.float32)), "wrong_shape", "start_tail"),
        (replace(task(), anchor_tail=np.zeros(TINY.tail_size)), "wrong_shape", "anchor_tail"),
        (replace(task(), anchor_tail=np.full(TINY.tail_size, np.inf, np.float32)), "not_finite", "anchor_tail"),
        (replace(task(), samples=replace(task().samples, second=np.zeros((10, 5), np.float32))), "wrong_shape", "second"),
        (replace(task(), samples=replace(task().samples, first=np.zeros((10, 6)))), "wrong_shape", "first"),
        (replace(task(), samples=replace(task().samples, path=np.zeros(9, np.int64))), "wrong_shape", "path"),
        (replace(task(), samples=replace(task().samples, path=np.zeros(10))), "bad_labels", "path"),
        (broken("first", np.nan), "not_finite", "first"),
        (broken("content", 4), "bad_labels", "content"),
        (broken("path", -1), "bad_labels", "path"),
        (broken("level", 10.5), "bad_labels", "level"),
        (broken("score", np.nan), "bad_labels", "score"),
    ],
)
def test_a_task_that_cannot_be_trained_is_refused_with_its_field(bad: LearnerTask, code: str, field: str) -> None:
    check_task(TINY, task())
    with pytest.raises(EngineError, match=field) as caught:
        check_task(TINY, bad)
    assert caught.value.code == code
