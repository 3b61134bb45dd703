"""The clipping norm that follows a quantile: the published trajectory, the split of the noise, the slot in the sum."""

from __future__ import annotations

import json
import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings

from aivo_core.privacy import PrivacyError, global_norm
from aivo_core.privacy_clipping import AdaptiveGaussianSumMechanism, NormAdaptation, noise_for_deltas
from federation import strategies
from federation.privacy.composition import compose
from federation.privacy.release import Release
from federation.strategies import BLOCK_SIZE, PrivacyMechanism
from tests.shared import SHARED, needs_vectors

GOOD: dict[str, Any] = {"clip_norm": 1.0, "noise_multiplier": 1.0, "expected_cohort": 100.0}


def refused(code: str) -> Any:
    return pytest.raises(PrivacyError, check=lambda error: error.code == code)


def mechanics() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((SHARED / "vectors" / "dp_mechanics.json").read_text())
    return loaded


def deltas_of_norms(norms: list[float], dim: int = 5) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(len(norms), dim))
    return [norm * row / global_norm(row) for norm, row in zip(norms, directions, strict=True)]


def folded(mechanism: PrivacyMechanism, rows: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    fold = strategies.get("fedavg").start(rows[0].shape[0], dtype=np.float64, mechanism=mechanism)
    for row in rows:
        fold.add(row, 1.0)
    return np.asarray(fold.finish().vector)


# --- the trajectory ---------------------------------------------------------------------------------------------------


@needs_vectors
def test_without_noise_the_norm_follows_the_published_rule() -> None:
    reference = mechanics()["adaptive_clipping"]
    assert len(reference["cases"]) == 10
    for case in reference["cases"]:
        adaptation = NormAdaptation(quantile=case["gamma"], learning_rate=case["eta"])
        norm = case["C0"]
        for step in range(case["rounds"]):
            unclipped = sum(value <= norm for value in case["norms"]) / len(case["norms"])
            assert unclipped == pytest.approx(case["unclipped_fraction"][step]), case["id"]
            norm = adaptation.next_norm(norm, unclipped)
            assert norm == pytest.approx(case["C"][step + 1], rel=1e-10), (case["id"], step)


@needs_vectors
@pytest.mark.parametrize("start", ["C0.1", "C10"])
def test_the_mechanism_in_a_fold_carries_the_norm_to_the_quantile(start: str) -> None:
    case = next(case for case in mechanics()["adaptive_clipping"]["cases"] if case["id"] == f"adapt-lognormal-{start}-g0.5")
    adaptation, cohort = NormAdaptation(quantile=0.5, learning_rate=0.2), len(case["norms"])
    rows = deltas_of_norms(case["norms"])
    norm, path = case["C0"], []
    for round_ in range(case["rounds"]):
        mechanism = AdaptiveGaussianSumMechanism(
            clip_norm=norm,
            noise_multiplier=1e-6,
            expected_cohort=cohort,
            count_noise=1e-5,
            rng=np.random.default_rng(round_),
        )
        _, unclipped = mechanism.split(folded(mechanism, [mechanism.extend(row) for row in rows]))
        norm = adaptation.next_norm(norm, unclipped)
        path.append(norm)
    np.testing.assert_allclose(path, case["C"][1:], rtol=1e-4)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    norm=st.floats(1e-6, 1e6),
    unclipped=st.floats(-1e9, 1e9),
    quantile=st.floats(0.0, 1.0),
    rate=st.floats(1e-3, 10.0),
)
def test_the_norm_stays_within_its_bounds_whatever_the_noise(norm: float, unclipped: float, quantile: float, rate: float) -> None:
    adaptation = NormAdaptation(quantile=quantile, learning_rate=rate)
    moved = adaptation.next_norm(norm, unclipped)
    assert adaptation.lowest <= moved <= adaptation.highest
    if unclipped > quantile:
        assert moved <= norm * (1 + 1e-12)
    if unclipped < quantile:
        assert moved >= norm * (1 - 1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantile": -0.1},
        {"quantile": 1.1},
        {"quantile": math.nan},
        {"learning_rate": 0.0},
        {"learning_rate": -1.0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"lowest": 0.0},
        {"lowest": math.nan},
        {"highest": math.inf},
        {"lowest": 2.0, "highest": 1.0},
    ],
)
def test_an_adaptation_that_leads_nowhere_is_refused(changes: dict[str, float]) -> None:
    with refused("bad_adaptation"):
        NormAdaptation(**changes)


def test_a_norm_or_share_that_is_none_is_refused() -> None:
    for norm in (0.0, -1.0, math.nan, math.inf):
        with refused("bad_clip_norm"):
            NormAdaptation().next_norm(norm, 0.5)
    for share in (math.nan, math.inf):
        with refused("not_finite"):
            NormAdaptation().next_norm(1.0, share)


# --- the split of the noise -------------------------------------------------------------------------------------------


@needs_vectors
def test_the_noise_is_split_as_published() -> None:
    cases = mechanics()["adaptive_noise_split"]["cases"]
    assert len(cases) == 7
    for case in cases:
        settings_of = {"clip_norm": 1.0, "noise_multiplier": case["z"], "expected_cohort": case["cohort"]}
        settings_of["count_noise"] = case["clipped_count_stddev"]
        if case["z_delta"] is None:
            with refused("bad_count_noise"):
                AdaptiveGaussianSumMechanism(**settings_of)
        elif case["z"] == 0.0:
            with refused("bad_noise_multiplier"):
                AdaptiveGaussianSumMechanism(**settings_of)
        else:
            mechanism = AdaptiveGaussianSumMechanism(**settings_of)
            assert mechanism.count_noise == case["effective_count_stddev"]
            assert mechanism.delta_noise_multiplier == pytest.approx(case["z_delta"], rel=1e-12)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(z=st.floats(1e-3, 1e3), excess=st.floats(1e-6, 1e6))
def test_deltas_and_bits_together_cost_what_one_release_of_z_costs(z: float, excess: float) -> None:
    count_noise = z / 2.0 * (1.0 + excess)
    for_deltas = noise_for_deltas(z, count_noise)
    assert for_deltas >= z
    assert (for_deltas**-2 + (2.0 * count_noise) ** -2) ** -0.5 == pytest.approx(z, rel=1e-9)


def test_the_ledger_may_charge_both_releases_as_one() -> None:
    mechanism = AdaptiveGaussianSumMechanism(**GOOD)
    bits_have_sensitivity_one_half = Release(z=2.0 * mechanism.count_noise, steps=30)
    both = compose([Release(z=mechanism.delta_noise_multiplier, steps=30), bits_have_sensitivity_one_half], 1e-5).epsilon
    assert both == pytest.approx(compose([Release(z=1.0, steps=30)], 1e-5).epsilon, rel=1e-9)


@pytest.mark.parametrize("count_noise", [0.0, -1.0, 0.5, math.nan, math.inf])
def test_noise_on_the_count_that_costs_more_than_z_is_refused(count_noise: float) -> None:
    with refused("bad_count_noise"):
        AdaptiveGaussianSumMechanism(**GOOD, count_noise=count_noise)


# --- the slot ---------------------------------------------------------------------------------------------------------


def test_deltas_and_bits_are_noised_with_the_norm_that_the_round_was_clipped_with() -> None:
    rounds = 5000
    low, high = (math.sqrt(bound / rounds) for bound in scipy.stats.chi2.ppf([5e-7, 1 - 5e-7], rounds))
    mechanism = AdaptiveGaussianSumMechanism(**{**GOOD, "clip_norm": 3.0})
    released = np.stack(
        [AdaptiveGaussianSumMechanism(**{**GOOD, "clip_norm": 3.0}).add_noise(np.zeros(2)) for _ in range(rounds)]
    )
    deltas, bits = released.T
    assert low < np.sqrt(np.mean(deltas**2)) / (mechanism.delta_noise_multiplier * 3.0) < high
    assert low < np.sqrt(np.mean(bits**2)) / mechanism.count_noise < high
    assert abs(np.corrcoef(deltas, bits)[0, 1]) < 5.0 / math.sqrt(rounds)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_bit_says_whether_the_delta_was_left_as_it_was(dtype: type) -> None:
    mechanism = AdaptiveGaussianSumMechanism(**GOOD)
    for norm, bit in ((0.5, 0.5), (2.0, -0.5)):
        delta = np.zeros(4, dtype)
        delta[1] = norm
        clipped = mechanism.clip(mechanism.extend(delta))
        assert clipped.dtype == dtype
        assert clipped[-1] == bit
        assert global_norm(clipped[:-1]) == min(norm, 1.0)


def test_the_share_of_unclipped_learners_survives_sharding() -> None:
    norms = [0.5] * (BLOCK_SIZE + 10) + [3.0] * 20
    values = {**GOOD, "expected_cohort": float(len(norms)), "noise_multiplier": 1e-9, "count_noise": 1e-8}

    def mechanism() -> AdaptiveGaussianSumMechanism:
        return AdaptiveGaussianSumMechanism(**values, rng=np.random.default_rng(1))

    rows = [mechanism().extend(row) for row in deltas_of_norms(norms)]
    whole = folded(mechanism(), rows)
    last = mechanism()
    first_shard = strategies.get("fedavg").start(6, dtype=np.float64, mechanism=last)
    second_shard = strategies.get("fedavg").start(6, dtype=np.float64, first_block=1, mechanism=mechanism())
    for index, row in enumerate(rows):
        (first_shard if index < BLOCK_SIZE else second_shard).add(row, 1.0)
    first_shard.merge(second_shard)
    sharded = first_shard.finish().vector
    assert sharded.tobytes() == whole.tobytes()
    update, unclipped = last.split(sharded)
    assert update.shape == (5,)
    assert unclipped == pytest.approx((BLOCK_SIZE + 10) / len(norms), abs=1e-7)


def test_an_empty_round_moves_the_norm_by_noise_alone() -> None:
    mechanism = AdaptiveGaussianSumMechanism(**GOOD, rng=np.random.default_rng(5))
    vector = np.asarray(strategies.get("fedavg").start(3, mechanism=mechanism).finish().vector)
    _, unclipped = mechanism.split(vector)
    assert abs(unclipped - 0.5) < 6 * mechanism.count_noise / 100.0


def test_a_delta_without_its_empty_slot_is_refused() -> None:
    mechanism = AdaptiveGaussianSumMechanism(**GOOD)
    for delta in (np.ones(3), np.zeros((2, 2)), np.zeros(0), np.array([0.0, np.nan])):
        with refused("wrong_shape"):
            mechanism.clip(delta)
    with refused("wrong_shape"):
        mechanism.split(np.zeros((2, 2)))
