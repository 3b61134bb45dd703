"""The mechanism on a sum and on an upload: what bounds, what covers, what is refused, and that broken ones are seen."""

from __future__ import annotations

import json
import math
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings

from aivo_core.privacy import PrivacyError, clip, global_norm
from aivo_core.privacy_clipping import AdaptiveGaussianSumMechanism
from aivo_core.privacy_mechanisms import GaussianSumMechanism, privatise_upload
from federation import strategies
from federation.strategies import PrivacyMechanism
from tests.shared import SHARED, needs_vectors

GOOD: dict[str, Any] = {"clip_norm": 0.5, "noise_multiplier": 1.1, "expected_cohort": 20.0}
BAD_NUMBERS = [0.0, -1.0, math.nan, math.inf, -math.inf]


def refused(code: str) -> Any:
    return pytest.raises(PrivacyError, check=lambda error: error.code == code)


def mechanics() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((SHARED / "vectors" / "dp_mechanics.json").read_text())
    return loaded


def folded(mechanism: PrivacyMechanism, deltas: list[np.ndarray[Any, Any]], dim: int) -> np.ndarray[Any, Any]:
    fold = strategies.get("fedavg").start(dim, dtype=np.float64, mechanism=mechanism)
    for delta in deltas:
        fold.add(delta, 1.0)
    return np.asarray(fold.finish().vector)


def spread_bounds(count: int) -> tuple[float, float]:
    low, high = scipy.stats.chi2.ppf([5e-7, 1 - 5e-7], count)
    return math.sqrt(low / count), math.sqrt(high / count)


def spread(noise: np.ndarray[Any, Any]) -> float:
    return float(np.sqrt(np.mean(noise**2)))


# --- noise ------------------------------------------------------------------------------------------------------------


@needs_vectors
def test_noise_on_sum_and_mean_has_the_reference_spread() -> None:
    low, high = spread_bounds(100_000)
    for case in mechanics()["noise_sd"]["cases"]:
        settings_of = {"clip_norm": case["C"], "noise_multiplier": case["z"], "expected_cohort": case["expected_cohort"]}
        if case["z"] == 0.0:
            with refused("bad_noise_multiplier"):
                GaussianSumMechanism(**settings_of)
            continue
        on_sum = GaussianSumMechanism(**settings_of).add_noise(np.zeros(100_000))
        assert low < spread(on_sum) / case["sd_on_sum"] < high
        on_mean = folded(GaussianSumMechanism(**settings_of), [], 100_000)
        assert low < spread(on_mean) / case["sd_on_mean"] < high


@needs_vectors
def test_zero_deltas_over_many_rounds_stay_within_the_reference_bounds_and_doubling_c_doubles_them() -> None:
    bounds = next(case for case in mechanics()["empirical_sd_test"]["cases"] if case["N"] == 379_498)["known_zero_mean"]
    dim = 10_000
    for factor in (1.0, 2.0):
        rounds = [
            folded(GaussianSumMechanism(**{**GOOD, "clip_norm": factor * 0.5}), [np.zeros(dim, np.float32)] * 5, dim)
            for _ in range(38)
        ]
        noise = np.concatenate(rounds)[:379_498] * 20.0 / (1.1 * 0.5)
        assert factor * bounds["sd_ratio_low"] < spread(noise) < factor * bounds["sd_ratio_high"]
        assert scipy.stats.kstest(noise / factor, "norm").pvalue > 1e-6
        assert np.unique(noise).size == noise.size


@pytest.mark.parametrize("wrong", [0.5, 0.9, 1.1, 2.0])
def test_the_bounds_notice_a_wrong_spread(wrong: float) -> None:
    low, high = spread_bounds(100_000)
    noise = GaussianSumMechanism(**{**GOOD, "noise_multiplier": wrong * 1.1}).add_noise(np.zeros(100_000))
    assert not low < spread(noise) / (1.1 * 0.5) < high


def test_each_release_draws_anew_and_one_mechanism_draws_once() -> None:
    np.random.seed(3)
    first = GaussianSumMechanism(**GOOD)
    drawn = first.add_noise(np.zeros(50))
    np.random.seed(3)
    assert not np.intersect1d(drawn, GaussianSumMechanism(**GOOD).add_noise(np.zeros(50))).size
    with refused("already_drawn"):
        first.add_noise(np.zeros(50))


def test_a_sum_that_is_refused_has_drawn_nothing() -> None:
    mechanism = GaussianSumMechanism(**GOOD)
    for total, code in (
        (np.array([0.0, np.nan]), "not_finite"),
        (np.array([np.inf]), "not_finite"),
        (np.zeros((2, 2)), "wrong_shape"),
        (np.zeros(3, np.float32), "wrong_dtype"),
    ):
        with refused(code):
            mechanism.add_noise(total)
    assert mechanism.add_noise(np.zeros(3)).shape == (3,)


def test_the_sum_given_is_not_changed() -> None:
    total = np.arange(5.0)
    total.flags.writeable = False
    noised = GaussianSumMechanism(**GOOD).add_noise(total)
    assert not np.shares_memory(noised, total)
    np.testing.assert_array_equal(total, np.arange(5.0))


# --- bounds -----------------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    deltas=hnp.arrays(np.float32, (6, 9), elements=st.floats(-1e3, 1e3, width=32)),
    outlier=hnp.arrays(np.float32, 9, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    c=st.floats(1e-2, 10.0),
    adaptive=st.booleans(),
)
def test_one_learner_moves_the_result_by_at_most_c_over_n(
    deltas: np.ndarray[Any, Any], outlier: np.ndarray[Any, Any], c: float, adaptive: bool
) -> None:
    def mechanism() -> GaussianSumMechanism:
        values = {**GOOD, "clip_norm": c, "rng": np.random.default_rng(7)}
        return AdaptiveGaussianSumMechanism(**values) if adaptive else GaussianSumMechanism(**values)

    def result(rows: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        if adaptive:
            return folded(mechanism(), [np.append(row, np.float32(0)) for row in rows], 10)[:-1]
        return folded(mechanism(), rows, 9)

    shift = global_norm(result([*deltas, outlier]) - result(list(deltas)))
    assert shift <= c / 20.0 * (1 + 1e-9) + 1e-12


def test_weights_other_than_one_and_strategies_without_a_bound_are_refused() -> None:
    fold = strategies.get("fedavg").start(3, mechanism=GaussianSumMechanism(**GOOD))
    with pytest.raises(strategies.StrategyError) as error:
        fold.add(np.ones(3, np.float32), 2.0)
    assert error.value.code == "not_private"
    with pytest.raises(strategies.StrategyError) as error:
        strategies.get("weighted").start(3, mechanism=GaussianSumMechanism(**GOOD))
    assert error.value.code == "not_private"


def test_clipping_is_one_norm_over_the_whole_delta() -> None:
    delta = np.concatenate([np.full(10, 3.0), np.full(90, 1e-3), np.full(1, -7.0)])
    clipped = GaussianSumMechanism(**GOOD).clip(delta)
    np.testing.assert_allclose(clipped, delta * (0.5 / global_norm(delta)), rtol=1e-12)
    assert global_norm(clipped) <= 0.5


def test_the_denominator_is_the_expected_cohort_whoever_came() -> None:
    rng = np.random.default_rng(1)
    rows = [clip(row, 0.5) for row in rng.normal(size=(3, 4))]
    result = folded(GaussianSumMechanism(**GOOD, rng=np.random.default_rng(9)), rows, 4)
    noise = np.random.default_rng(9).standard_normal(4) * 0.55
    np.testing.assert_allclose(result, (np.sum(rows, axis=0) + noise) / 20.0, rtol=1e-9)


# --- refused settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GaussianSumMechanism, AdaptiveGaussianSumMechanism])
@pytest.mark.parametrize("value", BAD_NUMBERS)
def test_settings_that_protect_nobody_are_refused(kind: Any, value: float) -> None:
    for name, code in (
        ("clip_norm", "bad_clip_norm"),
        ("noise_multiplier", "bad_noise_multiplier"),
        ("expected_cohort", "bad_denominator"),
    ):
        with refused(code):
            kind(**{**GOOD, name: value})


def test_an_expected_cohort_below_one_and_noise_that_vanishes_are_refused() -> None:
    with refused("bad_denominator"):
        GaussianSumMechanism(**{**GOOD, "expected_cohort": 0.5})
    for c, z in ((1e-300, 1e-300), (1e300, 1e300)):
        with refused("bad_noise"):
            GaussianSumMechanism(clip_norm=c, noise_multiplier=z, expected_cohort=20.0)


# --- an upload --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_upload_is_the_clipped_delta_with_noise_in_its_own_dtype(dtype: type) -> None:
    delta = np.linspace(-3.0, 3.0, 60).astype(dtype)
    before = delta.tobytes()
    upload = privatise_upload(delta, clip_norm=0.5, noise_multiplier=2.0, rng=np.random.default_rng(4))
    noise = np.random.default_rng(4).standard_normal(60) * 1.0
    np.testing.assert_array_equal(upload, (clip(delta, 0.5).astype(np.float64) + noise).astype(dtype))
    assert upload.dtype == dtype
    assert delta.tobytes() == before


def test_an_uploads_noise_has_the_spread_that_is_charged() -> None:
    low, high = spread_bounds(400_000)
    noise = privatise_upload(np.zeros(400_000), clip_norm=0.5, noise_multiplier=1.1)
    assert low < spread(noise) / 0.55 < high
    assert not np.intersect1d(noise, privatise_upload(np.zeros(400_000), clip_norm=0.5, noise_multiplier=1.1)).size


@settings(derandomize=True, max_examples=60, deadline=None)
@given(pair=hnp.arrays(np.float64, (2, 7), elements=st.floats(-1e9, 1e9)), c=st.floats(1e-2, 10.0))
def test_one_delta_in_place_of_another_moves_an_upload_by_at_most_twice_c(pair: np.ndarray[Any, Any], c: float) -> None:
    one, other = (privatise_upload(row, clip_norm=c, noise_multiplier=1.0, rng=np.random.default_rng(2)) for row in pair)
    assert global_norm(one - other) <= 2.0 * c * (1 + 1e-9)


@pytest.mark.parametrize(
    ("delta", "changes", "code"),
    [
        (np.zeros(3), {"clip_norm": 0.0}, "bad_clip_norm"),
        (np.zeros(3), {"clip_norm": math.nan}, "bad_clip_norm"),
        (np.zeros(3), {"noise_multiplier": 0.0}, "bad_noise_multiplier"),
        (np.zeros(3), {"noise_multiplier": -1.0}, "bad_noise_multiplier"),
        (np.zeros(3), {"noise_multiplier": math.nan}, "bad_noise_multiplier"),
        (np.array([1.0, np.nan]), {}, "not_finite"),
        (np.zeros((2, 2)), {}, "wrong_shape"),
        (np.array([1, 2]), {}, "wrong_dtype"),
        (np.zeros(200, np.float16), {"noise_multiplier": 1e6}, "not_finite"),
    ],
)
def test_an_upload_that_would_protect_nobody_is_refused(delta: Any, changes: dict[str, float], code: str) -> None:
    with refused(code):
        privatise_upload(delta, **{"clip_norm": 1.0, "noise_multiplier": 1.0, **changes})
