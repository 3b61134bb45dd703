"""Aggregation: the published arithmetic, the same bytes however the work is shared out, and nothing from bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from aivo_core.privacy import clip, global_norm
from aivo_core.privacy_mechanisms import GaussianSumMechanism
from aivo_core.tensors import read_any, write_tensors
from federation import strategies
from federation.strategies import BLOCK_SIZE, BlockSum, StrategyError, blocks_from_tensors, blocks_to_tensors
from federation.strategies.coordinate import ArrayRows, CoordinateStrategy
from federation.strategies.order_statistics import cut_per_side
from tests.shared import SHARED, needs_vectors

Array = np.ndarray[Any, Any]
FOLDS = ("fedavg", "fedprox", "weighted")
ALL = (*FOLDS, "median", "trimmed_mean")


def deltas_of(learners: int, dim: int, seed: int = 0, dtype: type = np.float32) -> Array:
    return np.random.default_rng(seed).normal(size=(learners, dim)).astype(dtype)


def folded(deltas: Array, weights: Sequence[float], name: str = "fedavg") -> Array:
    fold = strategies.get_fold(name).start(deltas.shape[1], dtype=deltas.dtype)
    for delta, weight in zip(deltas, weights, strict=True):
        fold.add(delta, weight)
    return fold.finish().vector


def refused(code: str) -> Any:
    return pytest.raises(StrategyError, check=lambda error: error.code == code)


# --- reference values -------------------------------------------------------------------------------------------------


def vector_cases() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((SHARED / "vectors" / "strategies.json").read_text())
    return loaded


def flat(client: dict[str, Any], dtype: str = "float64") -> Array:
    return np.concatenate([np.asarray(client[name], dtype=dtype).ravel() for name in ("kernel", "bias")])


@needs_vectors
@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_the_reference_values_of_fedavg_are_reproduced(name: str) -> None:
    cases = [case for case in vector_cases()["cases"] if case["rule"] == "fedavg"]
    assert len(cases) == 10
    for case in cases:
        deltas = np.stack([flat(client, case["dtype"]) for client in case["clients"]])
        result = strategies.get(name).aggregate(deltas, case["weights"])
        assert result.dtype == case["dtype"]
        np.testing.assert_allclose(result, flat(case["expected"]), **case["tolerance"], err_msg=case["id"])


@needs_vectors
@pytest.mark.parametrize(("rule", "name", "cases"), [("fedmedian", "median", 12), ("fedtrimmedavg", "trimmed_mean", 18)])
def test_the_reference_values_of_the_order_statistics_are_reproduced(rule: str, name: str, cases: int) -> None:
    found = [case for case in vector_cases()["cases"] if case["rule"] == rule]
    assert len(found) == cases
    for case in found:
        deltas = np.stack([flat(client, case["dtype"]) for client in case["clients"]])
        parameters = {key: value for key, value in case["params"].items() if key == "beta"}
        result = strategies.get(name).aggregate(deltas, case["weights"], **parameters)
        assert result.dtype == case["dtype"]
        np.testing.assert_allclose(result, flat(case["expected"]), **case["tolerance"], err_msg=case["id"])
        if "cut_per_side" in case["params"]:
            assert cut_per_side(len(deltas), parameters["beta"]) == case["params"]["cut_per_side"]


@needs_vectors
def test_what_is_cut_is_counted_without_the_rounding_of_floating_point() -> None:
    for learners, beta, wrong, exact in vector_cases()["trimmed_cut_float_rounding"]["rows"]:
        assert int(beta * learners) == wrong
        assert cut_per_side(learners, beta) == exact


@needs_vectors
def test_what_the_reference_implementation_accepts_wrongly_is_refused() -> None:
    listed = {row["id"] for row in vector_cases()["errors"]}
    good = deltas_of(5, 17, dtype=np.float64)
    weights = [1.0, 2.0, 3.0, 4.0, 5.0]
    poisoned = good.copy()
    poisoned[2, 3] = np.nan
    infinite = good.copy()
    infinite[4, 0] = np.inf
    calls = {
        "err-all-zero-weights": (good, [0.0] * 5, "zero_weight"),
        "err-nan-weight-zero": (poisoned, [1.0, 2.0, 0.0, 4.0, 5.0], "not_finite"),
        "err-nan": (poisoned, weights, "not_finite"),
        "err-nan-median": (poisoned, weights, "not_finite"),
        "err-nan-trim": (poisoned, weights, "not_finite"),
        "err-inf-trim": (infinite, weights, "not_finite"),
        "err-negative-weight": (good, [1.0, -2.0, 3.0, 4.0, 5.0], "bad_weight"),
        "err-shape-first": ([np.zeros(1), *good[1:]], weights, "wrong_shape"),
        "err-shape-later": ([*good[:-1], np.zeros(1)], weights, "wrong_shape"),
    }
    for case, (deltas, given_weights, code) in calls.items():
        assert case in listed
        for name in ALL:
            with refused(code):
                strategies.get(name).aggregate(deltas, given_weights)


def test_two_learners_weigh_by_their_samples() -> None:
    deltas = np.array([[0.0], [1.0]])
    assert strategies.get("fedavg").aggregate(deltas, [1, 99])[0] == pytest.approx(0.99, rel=1e-15)
    assert strategies.get("weighted").aggregate(deltas, [1, 99], weight_cap=1.0)[0] == pytest.approx(0.99, rel=1e-15)


# --- properties -------------------------------------------------------------------------------------------------------

samples = st.lists(st.integers(0, 10_000), min_size=1, max_size=150).filter(any)


@settings(max_examples=60, deadline=None)
@given(weights=samples, seed=st.integers(0, 2**16), name=st.sampled_from(FOLDS))
def test_the_batch_and_the_fold_are_the_same_to_the_bit(weights: list[int], seed: int, name: str) -> None:
    deltas = deltas_of(len(weights), 5, seed)
    strategy = strategies.get(name)
    effective = strategy.weigh(weights)
    assert strategy.aggregate(deltas, weights).tobytes() == folded(deltas, effective.tolist(), name).tobytes()


@settings(max_examples=60, deadline=None)
@given(weights=samples, seed=st.integers(0, 2**16), name=st.sampled_from(ALL))
def test_equal_deltas_give_that_delta(weights: list[int], seed: int, name: str) -> None:
    delta = deltas_of(1, 7, seed)[0]
    result = strategies.get(name).aggregate(np.tile(delta, (len(weights), 1)), weights)
    np.testing.assert_array_equal(result, delta)
    double = delta.astype(np.float64) / 3.0
    np.testing.assert_allclose(strategies.get(name).aggregate(np.tile(double, (len(weights), 1)), weights), double, rtol=1e-13)


@settings(max_examples=60, deadline=None)
@given(weights=samples, scale=st.floats(1e-200, 1e200), name=st.sampled_from(ALL), seed=st.integers(0, 2**16))
def test_scaling_all_weights_changes_nothing(weights: list[int], scale: float, name: str, seed: int) -> None:
    deltas = deltas_of(len(weights), 5, seed, np.float64)
    strategy = strategies.get(name)
    scaled = strategy.aggregate(deltas, np.array(weights) * scale)
    np.testing.assert_allclose(scaled, strategy.aggregate(deltas, weights), rtol=1e-9, atol=1e-12)
    power_of_two = strategy.aggregate(deltas, np.array(weights) * 2.0**-900)
    assert power_of_two.tobytes() == strategy.aggregate(deltas, np.array(weights) * 2.0**900).tobytes()


@settings(max_examples=60, deadline=None)
@given(weights=samples, name=st.sampled_from(ALL), seed=st.integers(0, 2**16))
def test_the_order_changes_rounding_only_and_a_fixed_order_nothing(weights: list[int], name: str, seed: int) -> None:
    deltas = deltas_of(len(weights), 5, seed, np.float64)
    order = np.random.default_rng(seed).permutation(len(weights))
    strategy = strategies.get(name)
    result = strategy.aggregate(deltas, weights)
    np.testing.assert_allclose(strategy.aggregate(deltas[order], np.array(weights)[order]), result, rtol=1e-9, atol=1e-12)
    back = np.argsort(order)
    assert strategy.aggregate(deltas[order][back], np.array(weights)[order][back]).tobytes() == result.tobytes()


@pytest.mark.parametrize("name", ALL)
def test_opposite_deltas_cancel(name: str) -> None:
    deltas = deltas_of(1, 9)
    np.testing.assert_array_equal(strategies.get(name).aggregate(np.concatenate([deltas, -deltas]), [3, 3]), np.zeros(9))


@settings(max_examples=40, deadline=None)
@given(weights=samples, name=st.sampled_from(ALL), seed=st.integers(0, 2**16))
def test_the_result_lies_between_the_smallest_and_largest_delta(weights: list[int], name: str, seed: int) -> None:
    deltas = deltas_of(len(weights), 5, seed, np.float64)
    result = strategies.get(name).aggregate(deltas, weights)
    assert np.all(result <= deltas.max(axis=0) + 1e-12)
    assert np.all(result >= deltas.min(axis=0) - 1e-12)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_input_keeps_its_type_and_its_values(name: str, dtype: type) -> None:
    deltas = deltas_of(70, 4, dtype=dtype)
    weights = np.arange(70)
    before = deltas.tobytes(), weights.tobytes()
    deltas.flags.writeable = weights.flags.writeable = False
    result = strategies.get(name).aggregate(deltas, weights)
    assert result.dtype == dtype
    assert result.shape == (4,)
    assert not np.shares_memory(result, deltas)
    assert (deltas.tobytes(), weights.tobytes()) == before


def test_a_refused_contribution_leaves_no_trace() -> None:
    deltas = deltas_of(100, 6)
    strategy = strategies.get("fedavg")
    fold = strategy.start(6)
    for index, delta in enumerate(deltas):
        bad: list[tuple[Any, float]] = [
            (np.where(np.arange(6) == 3, np.nan, delta).astype(np.float32), 1.0),
            (np.full(6, np.inf, np.float32), 0.0),
            (np.full(6, 1e200), 1.0),
            (delta[:1], 1.0),
            (np.float32(1.0), 1.0),
            (delta.reshape(1, 6), 1.0),
            (np.arange(6), 1.0),
            (np.array([object()] * 6), 1.0),
            (delta, -1.0),
            (delta, float("nan")),
            (delta, float("inf")),
        ]
        for bad_delta, bad_weight in bad:
            with pytest.raises(StrategyError):
                fold.add(bad_delta, bad_weight)
        fold.add(delta, index + 1.0)
    aggregate = fold.finish()
    assert aggregate.vector.tobytes() == folded(deltas, [index + 1.0 for index in range(100)]).tobytes()
    assert aggregate.count == 100
    assert aggregate.denominator == aggregate.weight == 5050.0


def test_a_contribution_of_weight_zero_is_counted_and_moves_nothing() -> None:
    deltas = deltas_of(3, 4)
    fold = strategies.get_fold("fedavg").start(4)
    for delta, weight in zip(deltas, [0.0, 2.0, 0.0], strict=True):
        fold.add(delta, weight)
    aggregate = fold.finish()
    np.testing.assert_array_equal(aggregate.vector, deltas[1])
    assert aggregate.count == 3


def test_later_changes_of_a_delta_do_not_reach_the_result() -> None:
    delta = np.ones(3, np.float32)
    fold = strategies.get_fold("fedavg").start(3)
    fold.add(delta, 1.0)
    delta[:] = 7.0
    np.testing.assert_array_equal(fold.finish().vector, np.ones(3))


# --- coordinates by themselves -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 140), st.integers(1, 40)),
    beta=st.floats(0.0, 0.49),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    block_bytes=st.integers(1, 20_000),
    threads=st.integers(1, 3),
)
def test_blocks_threads_and_order_change_nothing_of_an_order_statistic(
    shape: tuple[int, int], beta: float, seed: int, dtype: type, block_bytes: int, threads: int
) -> None:
    deltas = deltas_of(*shape, seed, dtype)
    order = np.random.default_rng(seed).permutation(shape[0])
    for name, parameters in (("median", {}), ("trimmed_mean", {"beta": beta})):
        strategy = strategies.get(name)
        assert isinstance(strategy, CoordinateStrategy)
        whole = strategy.aggregate(deltas, np.ones(shape[0]), **parameters)
        blockwise = strategy.combine(ArrayRows(deltas[order]), parameters=parameters, threads=threads, block_bytes=block_bytes)
        assert blockwise.vector.tobytes() == whole.tobytes()
        assert blockwise.count == blockwise.weight == shape[0]


@settings(max_examples=60, deadline=None)
@given(learners=st.integers(1, 80), beta=st.floats(0.0, 0.49), seed=st.integers(0, 2**16))
def test_order_statistics_are_what_they_are_called(learners: int, beta: float, seed: int) -> None:
    deltas = deltas_of(learners, 6, seed, np.float64)
    np.testing.assert_array_equal(strategies.get("median").aggregate(deltas, np.ones(learners)), np.median(deltas, axis=0))
    cut = cut_per_side(learners, beta)
    kept = np.sort(deltas, axis=0)[cut : learners - cut]
    result = strategies.get("trimmed_mean").aggregate(deltas, np.ones(learners), beta=beta)
    np.testing.assert_allclose(result, kept.mean(axis=0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_a_minority_that_sends_anything_stays_within_the_honest_range(name: str) -> None:
    honest = deltas_of(8, 5, dtype=np.float64)
    attackers = np.array([[1e140], [-1e140]]) * np.ones(5)
    result = strategies.get(name).aggregate(np.concatenate([honest, attackers]), [1.0] * 8 + [1e9] * 2)
    assert np.all(result >= honest.min(axis=0)) and np.all(result <= honest.max(axis=0))


def test_what_needs_all_deltas_at_once_does_not_fold() -> None:
    for name in ("median", "trimmed_mean"):
        with pytest.raises(StrategyError, match="fedavg, fedprox, weighted") as error:
            strategies.get_fold(name)
        assert error.value.code == "not_foldable"


def test_a_source_that_fails_ends_the_work_with_its_error() -> None:
    class Failing(ArrayRows):
        def read(self, row: int, start: int, stop: int) -> Array:
            if row == 1 and start > 0:
                raise OSError("gone")
            return super().read(row, start, stop)

    strategy = strategies.get("median")
    assert isinstance(strategy, CoordinateStrategy)
    with pytest.raises(OSError, match="gone"):
        strategy.combine(Failing(deltas_of(3, 100)), threads=2, block_bytes=1000)
    with refused("no_contributions"):
        strategy.combine(ArrayRows(deltas_of(0, 4)))


# --- blocks and shards ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data(), learners=st.integers(1, 5 * BLOCK_SIZE + 3), through_files=st.booleans())
def test_any_sharding_gives_the_same_bytes(data: st.DataObject, learners: int, through_files: bool) -> None:
    deltas = deltas_of(learners, 4, seed=learners) * 10.0 ** np.arange(-2, 2, dtype=np.float32)
    weights = np.random.default_rng(learners).integers(1, 500, learners).astype(float)
    whole = folded(deltas, weights.tolist())
    blocks = -(-learners // BLOCK_SIZE)
    cuts = sorted(data.draw(st.sets(st.integers(1, blocks))) | {0, blocks})
    strategy = strategies.get("fedavg")
    shards = []
    for begin, end in pairwise(cuts):
        shard = strategy.start(4, first_block=begin)
        for index in range(begin * BLOCK_SIZE, min(end * BLOCK_SIZE, learners)):
            shard.add(deltas[index], weights[index])
        shards.append(shard)
    result = strategy.start(4)
    for position in data.draw(st.permutations(range(len(shards)))):
        if through_files:
            stored = write_tensors(blocks_to_tensors(shards[position].parts()))
            result.add_blocks(blocks_from_tensors(read_any(stored)))
        else:
            result.merge(shards[position])
    aggregate = result.finish()
    assert aggregate.vector.tobytes() == whole.tobytes()
    assert aggregate.count == learners


def test_the_sum_is_the_one_of_the_rule_and_not_of_plain_addition() -> None:
    deltas = deltas_of(3 * BLOCK_SIZE + 5, 3, dtype=np.float64)
    by_rule = np.zeros(3)
    for begin in range(0, len(deltas), BLOCK_SIZE):
        block = np.zeros(3)
        for delta in deltas[begin : begin + BLOCK_SIZE]:
            block += delta
        by_rule = block if begin == 0 else by_rule + block
    one_by_one = np.zeros(3)
    for delta in deltas:
        one_by_one += delta
    assert by_rule.tobytes() != one_by_one.tobytes(), "the data must tell the two apart"
    assert folded(deltas, [1.0] * len(deltas)).tobytes() == (by_rule / len(deltas)).tobytes()


def test_memory_does_not_grow_with_the_learners() -> None:
    strategy = strategies.get("fedavg")
    fold = strategy.start(8)
    delta = np.ones(8, np.float32)
    for _ in range(20 * BLOCK_SIZE + 1):
        fold.add(delta, 1.0)
    assert [(part.index, part.span, part.count) for part in fold.parts()] == [(0, 21, 20 * BLOCK_SIZE + 1)]


def test_missing_doubled_and_short_blocks_are_refused() -> None:
    strategy = strategies.get("fedavg")

    def shard(first_block: int, learners: int) -> Any:
        fold = strategy.start(2, first_block=first_block)
        for _ in range(learners):
            fold.add(np.ones(2, np.float32), 1.0)
        return fold

    missing = shard(1, 3)
    with refused("bad_blocks"):
        missing.finish()
    short = shard(0, BLOCK_SIZE - 1)
    short.merge(shard(1, 3))
    with refused("bad_blocks"):
        short.finish()
    doubled = shard(0, BLOCK_SIZE)
    with refused("bad_blocks"):
        doubled.merge(shard(0, 5))
    late = shard(3, 5)
    with refused("bad_blocks"):
        late.merge(shard(3, 5))
    overtaken = shard(0, BLOCK_SIZE)
    overtaken.merge(shard(1, 5))
    with refused("bad_blocks"):
        overtaken.add(np.ones(2, np.float32), 1.0)
    assert overtaken.finish().count == BLOCK_SIZE + 5


def test_folds_of_different_rounds_are_not_merged() -> None:
    fedavg = strategies.get_fold("fedavg")
    fold = fedavg.start(2)
    others = [fedavg.start(3), fedavg.start(2, dtype=np.float64), strategies.get_fold("fedprox").start(2), fold]
    others.append(fedavg.start(2, mechanism=ClipOnly(1.0, 5.0)))
    for other in others:
        with refused("bad_blocks"):
            fold.merge(other)


def test_a_finished_fold_cannot_be_used_again() -> None:
    fold = strategies.get_fold("fedavg").start(2)
    fold.add(np.ones(2, np.float32), 1.0)
    fold.finish()
    handed_over = strategies.get_fold("fedavg").start(2)
    handed_over.add(np.ones(2, np.float32), 1.0)
    handed_over.parts()
    for used in (fold, handed_over):
        calls = [
            used.finish,
            used.parts,
            lambda used=used: used.add(np.ones(2, np.float32), 1.0),
            lambda used=used: used.add_blocks([]),
            lambda used=used: used.merge(strategies.get_fold("fedavg").start(2)),
        ]
        for call in calls:
            with refused("finished"):
                call()


def good_block() -> BlockSum:
    return BlockSum(index=0, vector=np.ones(2), weight=3.0, count=3)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"vector": np.ones(1)}, "wrong_shape"),
        ({"vector": np.ones((2, 1))}, "wrong_shape"),
        ({"vector": np.ones(2, np.float32)}, "wrong_dtype"),
        ({"vector": np.array([1.0, np.nan])}, "not_finite"),
        ({"vector": np.array([1.0, np.inf])}, "not_finite"),
        ({"vector": np.array([1.0, 1e300])}, "not_finite"),
        ({"weight": -1.0}, "bad_weight"),
        ({"weight": float("nan")}, "bad_weight"),
        ({"index": -1}, "bad_blocks"),
        ({"index": 2, "span": 2}, "bad_blocks"),
        ({"span": 0}, "bad_blocks"),
        ({"count": 0}, "bad_blocks"),
        ({"count": BLOCK_SIZE + 1}, "bad_blocks"),
    ],
)
def test_a_malformed_block_is_refused(changes: dict[str, Any], code: str) -> None:
    fold = strategies.get_fold("fedavg").start(2)
    with refused(code):
        fold.add_blocks([replace(good_block(), **changes)])
    fold.add_blocks([good_block()])
    np.testing.assert_allclose(fold.finish().vector, np.full(2, 1 / 3), rtol=1e-6)


@pytest.mark.parametrize(
    "tensors",
    [
        {"block/0/vector": np.ones(2)},
        {"block/0/totals": np.ones(4)},
        {"block/0/vector": np.ones(2), "block/0/totals": np.ones(3)},
        {"block/0/vector": np.ones(2), "block/0/totals": np.array([1.0, 1.5, 1.0, 0.0])},
        {"block/0/vector": np.ones(2), "block/0/totals": np.array([1.0, np.nan, 1.0, 0.0])},
        {"block/0/vector": np.ones(2), "block/0/totals": np.array([1.0, 1.0, 1.0, 2.0])},
        {"block/-1/vector": np.ones(2)},
        {"weights": np.ones(2)},
    ],
)
def test_a_file_that_holds_no_block_sums_is_refused(tensors: dict[str, Array]) -> None:
    with refused("bad_blocks"):
        blocks_from_tensors(tensors)


# --- the slots: a mechanism, sums made elsewhere ----------------------------------------------------------------------


@dataclass
class Identity:
    """Bounds nothing, adds nothing: shows the path, protects nobody."""

    denominator: float
    name: str = "identity"

    @property
    def identity(self) -> tuple[str | float, ...]:
        return self.name, self.denominator

    def clip(self, delta: Array) -> Array:
        return delta

    def add_noise(self, total: Array) -> Array:
        return total


@dataclass
class ClipOnly:
    """Clips, adds nothing: protects nobody."""

    norm: float
    denominator: float
    name: str = "clip only"
    sums: list[Array] = field(default_factory=list)

    @property
    def identity(self) -> tuple[str | float, ...]:
        return self.name, self.norm, self.denominator

    def clip(self, delta: Array) -> Array:
        return clip(delta, self.norm)

    def add_noise(self, total: Array) -> Array:
        self.sums.append(total.copy())
        return total


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_a_mechanism_sees_every_delta_and_the_sum_once_and_fixes_the_denominator(name: str) -> None:
    deltas = deltas_of(100, 6) * 3.0
    mechanism = ClipOnly(norm=0.5, denominator=120.0)
    fold = strategies.get_fold(name).start(6, mechanism=mechanism)
    for delta in deltas:
        fold.add(delta, 1.0)
    aggregate = fold.finish()
    expected = np.sum([clip(delta, 0.5).astype(np.float64) for delta in deltas], axis=0)
    assert len(mechanism.sums) == 1
    np.testing.assert_allclose(mechanism.sums[0], expected, rtol=1e-12)
    np.testing.assert_allclose(aggregate.vector, expected / 120.0, rtol=1e-6)
    assert aggregate.denominator == 120.0
    assert aggregate.count == 100
    assert aggregate.mechanism == "clip only"


def test_an_outlier_moves_the_clipped_mean_by_at_most_its_bound() -> None:
    deltas = deltas_of(20, 6, dtype=np.float64)
    without = ClipOnly(1.0, 20.0)
    results = []
    for extra in ([], [np.full(6, 1e9)]):
        fold = strategies.get_fold("fedavg").start(6, dtype=np.float64, mechanism=without)
        for delta in [*deltas, *extra]:
            fold.add(delta, 1.0)
        results.append(fold.finish().vector)
    assert global_norm(results[1] - results[0]) <= 1.0 / 20.0 * (1 + 1e-12)


def test_an_identity_mechanism_with_the_cohort_as_denominator_is_the_plain_mean() -> None:
    deltas = deltas_of(90, 5)
    fold = strategies.get_fold("fedavg").start(5, mechanism=Identity(denominator=90.0))
    for delta in deltas:
        fold.add(delta, 1.0)
    assert fold.finish().vector.tobytes() == folded(deltas, [1.0] * 90).tobytes()


def test_a_mechanism_answers_for_an_empty_cohort_too() -> None:
    mechanism = ClipOnly(1.0, 8.0)
    aggregate = strategies.get_fold("fedavg").start(3, mechanism=mechanism).finish()
    np.testing.assert_array_equal(aggregate.vector, np.zeros(3))
    assert aggregate.count == 0
    assert len(mechanism.sums) == 1


def test_a_mechanism_is_applied_once_however_the_round_was_sharded() -> None:
    deltas = deltas_of(2 * BLOCK_SIZE + 7, 4)
    whole, merged = ClipOnly(0.3, 50.0), ClipOnly(0.3, 50.0)
    fold = strategies.get_fold("fedavg").start(4, mechanism=whole)
    for delta in deltas:
        fold.add(delta, 1.0)
    shards = [strategies.get_fold("fedavg").start(4, first_block=index, mechanism=merged) for index in range(3)]
    for index, delta in enumerate(deltas):
        shards[index // BLOCK_SIZE].add(delta, 1.0)
    shards[0].merge(shards[2])
    shards[0].merge(shards[1])
    assert shards[0].finish().vector.tobytes() == fold.finish().vector.tobytes()
    assert len(merged.sums) == len(whole.sums) == 1


def test_under_a_mechanism_weights_are_uniform() -> None:
    fold = strategies.get_fold("fedavg").start(2, mechanism=ClipOnly(1.0, 5.0))
    for weight in (0.0, 0.5, 2.0):
        with refused("not_private"):
            fold.add(np.ones(2, np.float32), weight)
    with refused("not_private"):
        fold.add_blocks([replace(good_block(), weight=5.0)])


@pytest.mark.parametrize("denominator", [0.0, -1.0, float("nan"), float("inf")])
def test_a_mechanism_without_a_usable_denominator_is_refused(denominator: float) -> None:
    with refused("not_private"):
        strategies.get_fold("fedavg").start(2, mechanism=Identity(denominator))


def test_a_strategy_that_is_not_made_for_a_mechanism_refuses_one() -> None:
    assert not strategies.get("weighted").info.privacy_compatible
    with refused("not_private"):
        strategies.get_fold("weighted").start(2, mechanism=ClipOnly(1.0, 5.0))


def test_a_mechanism_never_sees_values_that_are_not_finite() -> None:
    class Watching(ClipOnly):
        def clip(self, delta: Array) -> Array:
            assert np.isfinite(delta).all()
            return super().clip(delta)

    fold = strategies.get_fold("fedavg").start(2, mechanism=Watching(1.0, 5.0))
    with refused("not_finite"):
        fold.add(np.array([np.nan, 1e9], np.float32), 1.0)


class Elsewhere:
    """Sums over groups of learners whose deltas stay where they are."""

    def __init__(self, groups: list[Array]) -> None:
        self.groups = groups

    def blocks(self) -> Iterator[BlockSum]:
        for index, group in enumerate(self.groups):
            total = group.astype(np.float64).sum(axis=0)
            yield BlockSum(index=index, vector=total, weight=float(len(group)), count=len(group))


def test_sums_made_elsewhere_take_the_place_of_their_learners() -> None:
    deltas = deltas_of(150, 4)
    groups = [deltas[:40], deltas[40:47], deltas[47:]]
    fold = strategies.get_fold("fedavg").start(4)
    fold.add_sums(Elsewhere(groups))
    aggregate = fold.finish()
    np.testing.assert_allclose(aggregate.vector, deltas.mean(axis=0), rtol=1e-5, atol=1e-7)
    assert aggregate.count == 150
    private = strategies.get_fold("fedavg").start(4, mechanism=Identity(denominator=200.0))
    private.add_sums(Elsewhere(groups))
    np.testing.assert_allclose(private.finish().vector, deltas.sum(axis=0) / 200.0, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("other", [{"clip_norm": 2.0}, {"noise_multiplier": 1.5}, {"expected_cohort": 11.0}])
def test_folds_with_another_bound_noise_or_denominator_are_not_merged(other: dict[str, float]) -> None:
    defaults = {"clip_norm": 1.0, "noise_multiplier": 1.0, "expected_cohort": 10.0}

    def fold(first_block: int, **values: float) -> strategies.Fold:
        mechanism = GaussianSumMechanism(**{**defaults, **values})
        return strategies.get_fold("fedavg").start(3, mechanism=mechanism, first_block=first_block)

    mine = fold(0)
    with pytest.raises(StrategyError) as refused:
        mine.merge(fold(1, **other))
    assert refused.value.code == "bad_blocks"
    mine.merge(fold(1))


# --- weights ----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    weights=st.lists(st.just(0.0) | st.floats(1e-90, 1e90), min_size=1, max_size=60).filter(any),
    cap=st.floats(0.001, 1.0),
    seed=st.integers(0, 2**16),
)
def test_no_share_exceeds_the_cap_as_far_as_shares_can(weights: list[float], cap: float, seed: int) -> None:
    strategy = strategies.get("weighted")
    capped = strategy.weigh(weights, parameters={"weight_cap": cap})
    positive = sum(weight > 0 for weight in weights)
    shares = capped / capped.sum()
    assert shares.max() <= max(cap, 1.0 / positive) * (1 + 1e-9)
    assert np.array_equal(capped == 0, np.array(weights) == 0)
    descending = np.argsort(weights)
    assert np.all(np.diff(capped[descending]) >= 0)
    order = np.random.default_rng(seed).permutation(len(weights))
    reordered = strategy.weigh(np.array(weights)[order], parameters={"weight_cap": cap})
    np.testing.assert_array_equal(reordered, capped[order])


def test_capping_leaves_the_others_their_proportions() -> None:
    capped = strategies.get("weighted").weigh([1000, 10, 20, 30, 40], parameters={"weight_cap": 0.4})
    np.testing.assert_allclose(capped[1:], [10, 20, 30, 40])
    assert capped[0] / capped.sum() == pytest.approx(0.4, rel=1e-12)


def test_a_learner_who_claims_a_billion_samples_has_no_more_than_the_cap() -> None:
    deltas = np.array([[100.0]] + [[0.0]] * 19)
    result = strategies.get("weighted").aggregate(deltas, [1e9] + [50.0] * 19)
    assert result[0] == pytest.approx(10.0, rel=1e-9)


def test_quality_scales_the_samples() -> None:
    strategy = strategies.get("weighted")
    weighed = strategy.weigh([10, 10, 40], quality=[1.0, 0.5, 0.25], parameters={"weight_cap": 1.0})
    np.testing.assert_allclose(weighed, [10, 5, 10])
    deltas = np.array([[1.0], [2.0], [4.0]])
    assert strategy.aggregate(deltas, [10, 10, 40], quality=[1.0, 0.5, 0.25], weight_cap=1.0)[0] == pytest.approx(60 / 25)
    unmeasured = strategy.aggregate(deltas, [10, 10, 40], weight_cap=1.0)
    np.testing.assert_array_equal(unmeasured, strategies.get("fedavg").aggregate(deltas, [10, 10, 40]))


@pytest.mark.parametrize(
    ("quality", "code"),
    [
        ([1.0, 0.5], "wrong_shape"),
        ([[1.0, 0.5, 0.2]], "wrong_shape"),
        (0.5, "wrong_shape"),
        ([1.0, 0.5, 1.1], "bad_quality"),
        ([1.0, 0.5, -0.1], "bad_quality"),
        ([1.0, 0.5, float("nan")], "bad_quality"),
        (["a", "b", "c"], "bad_quality"),
        ([True, True, False], "bad_quality"),
        ([0.0, 0.0, 0.0], "zero_weight"),
    ],
)
def test_quality_that_was_not_measured_properly_is_refused(quality: Any, code: str) -> None:
    with refused(code):
        strategies.get("weighted").aggregate(np.ones((3, 2)), [1, 2, 3], quality=quality)


# --- names, parameters, shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("deltas", "weights", "code"),
    [
        (np.zeros((0, 3)), [], "no_contributions"),
        ([], [], "no_contributions"),
        (np.ones(3), [1.0], "wrong_shape"),
        (np.ones((2, 3, 1)), [1.0, 1.0], "wrong_shape"),
        (np.ones((2, 0)), [1.0, 1.0], "wrong_shape"),
        (np.ones((2, 3)), [1.0], "wrong_shape"),
        (np.ones((2, 3)), 1.0, "wrong_shape"),
        (np.ones((2, 3)), [[1.0, 1.0]], "wrong_shape"),
        (np.ones((2, 3)), [1.0, 1.0, 1.0], "wrong_shape"),
        (np.ones((2, 3), np.int64), [1.0, 1.0], "wrong_dtype"),
        (np.ones((2, 3), object), [1.0, 1.0], "wrong_dtype"),
        (np.ones((2, 3), complex), [1.0, 1.0], "wrong_dtype"),
        (np.full((2, 3), np.inf), [1.0, 1.0], "not_finite"),
        (np.ones((2, 3)), [1.0, float("nan")], "bad_weight"),
        (np.ones((2, 3)), [1.0, float("inf")], "bad_weight"),
        (np.ones((2, 3)), [1.0, -0.001], "bad_weight"),
        (np.ones((2, 3)), ["1", "2"], "bad_weight"),
        (np.ones((2, 3)), [True, False], "bad_weight"),
        (np.ones((2, 3)), [0, 0], "zero_weight"),
    ],
)
def test_input_that_does_not_fit_is_refused_and_never_broadcast(name: str, deltas: Any, weights: Any, code: str) -> None:
    with refused(code):
        strategies.get(name).aggregate(deltas, weights)


def test_the_message_names_the_contribution() -> None:
    deltas = np.ones((3, 2))
    deltas[1, 0] = np.nan
    with pytest.raises(StrategyError, match="contribution 1: delta"):
        strategies.get("fedavg").aggregate(deltas, [1, 1, 1])


def test_an_unknown_strategy_is_refused_with_the_allowed_names() -> None:
    assert strategies.names() == ALL
    for name in ("FedAvg", "", "krum2", "\x00"):
        with pytest.raises(StrategyError, match="fedavg, fedprox, weighted, median, trimmed_mean") as error:
            strategies.get(name)
        assert error.value.code == "unknown_strategy"


@pytest.mark.parametrize(
    ("name", "parameters"), [("fedavg", {"beta": 0.2}), ("fedavg", {"quality": [1.0]}), ("weighted", {"mu": 1.0})]
)
def test_an_unknown_parameter_is_refused_with_the_allowed_ones(name: str, parameters: dict[str, Any]) -> None:
    allowed = "weight_cap" if name == "weighted" else "none"
    with pytest.raises(StrategyError, match=f"allowed: {allowed}") as error:
        strategies.get(name).aggregate(np.ones((1, 2)), [1.0], **parameters)
    assert error.value.code == "unknown_parameter"
    if "quality" not in parameters:
        with refused("unknown_parameter"):
            strategies.get_fold(name).start(2, parameters=parameters)
    else:
        with refused("unknown_parameter"):
            strategies.get(name).weigh([1.0], quality=[1.0])


@pytest.mark.parametrize("cap", [0.0, -0.1, 1.1, float("nan"), float("inf"), "0.1", None, True])
def test_a_parameter_outside_its_range_is_refused(cap: Any) -> None:
    with refused("bad_parameter"):
        strategies.get("weighted").aggregate(np.ones((1, 2)), [1.0], weight_cap=cap)


@pytest.mark.parametrize("name", ALL)
def test_every_strategy_describes_itself(name: str) -> None:
    info = strategies.get(name).info
    assert info.name == name
    assert info.source
    assert info.memory
    assert info.weight
    assert info.breakdown_point == {"median": 0.5, "trimmed_mean": 0.2}.get(name, 0.0)
    assert info.minimum_cohort == 1
    assert info.privacy_compatible == (name in ("fedavg", "fedprox"))
    for parameter in info.parameters:
        assert parameter.low <= parameter.default <= parameter.high
        assert parameter.meaning


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"dim": 0}, "wrong_shape"),
        ({"dim": 2, "dtype": np.int32}, "wrong_dtype"),
        ({"dim": 2, "first_block": -1}, "bad_blocks"),
    ],
)
def test_a_fold_that_makes_no_sense_does_not_start(arguments: dict[str, Any], code: str) -> None:
    with refused(code):
        strategies.get_fold("fedavg").start(**arguments)


def test_a_result_beyond_the_type_of_the_deltas_is_refused() -> None:
    fold = strategies.get_fold("fedavg").start(1, dtype=np.float16, mechanism=Identity(denominator=0.001))
    fold.add(np.full(1, 60_000, np.float16), 1.0)
    with refused("not_finite"):
        fold.finish()
