"""Clipping bounds one norm whatever the numbers are; noise has the spread that the accountant is told."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings

from aivo_core.privacy import PrivacyError, clip, gaussian, global_norm
from tests.shared import SHARED, needs_vectors

DRAWS = 400_000


def finite_vectors(width: int) -> st.SearchStrategy[np.ndarray[Any, Any]]:
    dtype = np.dtype(f"f{width // 8}")
    return hnp.arrays(dtype, st.integers(0, 40), elements=st.floats(width=width, allow_nan=False, allow_infinity=False))


vectors = st.one_of(finite_vectors(16), finite_vectors(32), finite_vectors(64))
norms = st.floats(min_value=1e-300, max_value=1e300)


def exact_square(vector: np.ndarray[Any, Any]) -> Fraction:
    return sum((Fraction(float(value)) ** 2 for value in vector), Fraction(0))


def flat(tensors: list[Any], dtype: str) -> np.ndarray[Any, Any]:
    return np.concatenate([np.asarray(tensor, dtype=dtype).ravel() for tensor in tensors])


def mechanics() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((SHARED / "vectors" / "dp_mechanics.json").read_text())
    return loaded


@needs_vectors
def test_clipping_reproduces_the_reference_values() -> None:
    reference = mechanics()
    assert len(reference["global_norm_clip"]["cases"]) == 24
    for case in reference["global_norm_clip"]["cases"]:
        tolerance = reference["meta"]["tolerance"][case["dtype"]]
        vector = flat(case["tensors"], case["dtype"])
        assert global_norm(vector) == pytest.approx(case["norm_before"], rel=tolerance["rtol"], abs=tolerance["atol"])
        clipped = clip(vector, case["C"])
        np.testing.assert_allclose(clipped, flat(case["expected"], case["dtype"]), **tolerance, err_msg=case["id"])
        assert clipped.dtype == case["dtype"]
        assert global_norm(clipped) <= case["C"]
        if global_norm(vector) <= case["C"]:
            assert not case["clipped"]
            np.testing.assert_array_equal(clipped, vector)


@needs_vectors
@pytest.mark.parametrize("secure", [True, False])
def test_noise_passes_the_reference_bounds_on_its_spread(secure: bool) -> None:
    for case in mechanics()["empirical_sd_test"]["cases"]:
        rng = None if secure else np.random.default_rng(case["N"])
        std = 1.1 * 0.5
        ratio = gaussian(case["N"], std, rng=rng) / std
        bounds = case["known_zero_mean"]
        assert bounds["sd_ratio_low"] < math.sqrt(np.mean(ratio**2)) < bounds["sd_ratio_high"]
        assert abs(ratio.mean()) < case["abs_mean_bound_in_sd"]
        assert np.abs(ratio).max() < case["max_abs_bound_in_sd"]


@needs_vectors
def test_the_reference_bounds_notice_noise_ten_percent_too_small() -> None:
    case = next(case for case in mechanics()["empirical_sd_test"]["cases"] if case["N"] == 100_000)
    ratio = gaussian(case["N"], 0.9)
    assert math.sqrt(np.mean(ratio**2)) < case["known_zero_mean"]["sd_ratio_low"]


@settings(max_examples=400, deadline=None)
@given(vector=vectors, c=norms)
@example(vector=np.array([3.4e38, 3.4e38], np.float32), c=1.0)
@example(vector=np.array([1.7e308, -1.7e308]), c=1.0)
@example(vector=np.array([5e-324, 5e-324]), c=1e-300)
@example(vector=np.array([1e-45, 1e-45], np.float32), c=1.2e-45)
@example(vector=np.array([1.0, 1.0], np.float32), c=1e-46)
@example(vector=np.array([1.0, 1.0], np.float16), c=1e-9)
def test_the_norm_is_never_above_c_and_nothing_else_changes(vector: np.ndarray[Any, Any], c: float) -> None:
    before = vector.copy()
    vector.flags.writeable = False
    clipped = clip(vector, c)
    assert global_norm(clipped) <= c
    assert exact_square(clipped) <= Fraction(c) ** 2 * (1 + Fraction(1, 10**13))
    assert clipped.dtype == vector.dtype
    assert clipped.shape == vector.shape
    assert not np.shares_memory(clipped, vector)
    assert vector.tobytes() == before.tobytes()
    if global_norm(vector) <= c:
        assert clipped.tobytes() == vector.tobytes()
    else:
        assert np.all(np.sign(clipped) * np.sign(vector) >= 0)


@settings(max_examples=200, deadline=None)
@given(
    vector=hnp.arrays(
        np.float32, st.integers(1, 40), elements=st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)
    ),
    c=st.floats(1e-3, 1e3),
)
def test_clipping_keeps_the_direction_and_uses_the_whole_norm(vector: np.ndarray[Any, Any], c: float) -> None:
    norm = global_norm(vector)
    clipped = clip(vector, c)
    np.testing.assert_allclose(clipped, vector * min(1.0, c / norm) if norm else vector, rtol=1e-6, atol=1e-12 * c)
    if norm > c:
        assert global_norm(clipped) > c * (1 - 1e-6)
    np.testing.assert_array_equal(clip(clipped, c), clipped)


def test_the_zero_vector_stays_zero() -> None:
    for dtype in (np.float16, np.float32, np.float64):
        assert global_norm(np.zeros(5, dtype)) == 0.0
        np.testing.assert_array_equal(clip(np.zeros(5, dtype), 0.1), np.zeros(5, dtype))
    assert global_norm(np.zeros(0)) == 0.0
    assert clip(np.zeros(0, np.float32), 1.0).shape == (0,)


def test_one_norm_covers_all_tensors_so_many_tensors_do_not_raise_the_sensitivity() -> None:
    tensors = [np.full(10, 1.0), np.full(1000, 1.0), np.full(3, 1.0)]
    assert global_norm(clip(np.concatenate(tensors), 1.0)) <= 1.0
    assert math.sqrt(sum(global_norm(clip(tensor, 1.0)) ** 2 for tensor in tensors)) == pytest.approx(math.sqrt(3))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_not_finite_are_refused(value: float, dtype: type) -> None:
    vector = np.array([0.0, value, 1e4], dtype=dtype)
    for call in (lambda: clip(vector, 1.0), lambda: global_norm(vector)):
        with pytest.raises(PrivacyError) as refused:
            call()
        assert refused.value.code == "not_finite"


@pytest.mark.parametrize("c", [0.0, -0.0, -1.0, float("nan"), float("inf"), float("-inf")])
def test_a_clipping_norm_that_is_not_positive_and_finite_is_refused(c: float) -> None:
    with pytest.raises(PrivacyError) as refused:
        clip(np.zeros(3), c)
    assert refused.value.code == "bad_clip_norm"


@pytest.mark.parametrize("vector", [np.array([3, 4]), np.array(["3"]), np.array([object()]), np.array([1 + 2j])])
def test_other_dtypes_are_refused(vector: Any) -> None:
    with pytest.raises(PrivacyError) as refused:
        clip(vector, 1.0)
    assert refused.value.code == "wrong_dtype"


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_noise_without_a_positive_finite_spread_is_refused(std: float) -> None:
    with pytest.raises(PrivacyError) as refused:
        gaussian(3, std)
    assert refused.value.code == "bad_noise"


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(PrivacyError) as refused:
        gaussian(-1, 1.0)
    assert refused.value.code == "bad_noise"


@pytest.mark.parametrize("size", [0, 1, 2, 5, 52_586])
def test_noise_has_the_size_asked_for(size: int) -> None:
    noise = gaussian(size, 2.0)
    assert noise.shape == (size,)
    assert noise.dtype == np.float64
    assert np.isfinite(noise).all()


def test_secure_noise_is_normal_and_its_halves_are_independent() -> None:
    noise = gaussian(DRAWS, 1.0)
    assert scipy.stats.kstest(noise, "norm").pvalue > 1e-6
    first, second = noise[: DRAWS // 2], noise[DRAWS // 2 :]
    for one, other in ((first, second), (first**2, second**2), (noise[:-1], noise[1:])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5.0 / math.sqrt(len(one))


def test_secure_noise_never_repeats_and_ignores_the_global_seed() -> None:
    np.random.seed(1)
    first = gaussian(100, 1.0)
    np.random.seed(1)
    second = gaussian(100, 1.0)
    assert not np.intersect1d(first, second).size


def test_a_test_may_fix_the_noise() -> None:
    np.testing.assert_array_equal(
        gaussian(7, 3.0, rng=np.random.default_rng(5)), gaussian(7, 1.0, rng=np.random.default_rng(5)) * 3.0
    )


def test_the_extreme_bits_of_the_secure_generator_give_finite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    for byte in (b"\x00", b"\xff"):
        monkeypatch.setattr("aivo_core.privacy.os.urandom", lambda count, byte=byte: byte * count)
        noise = gaussian(4, 1.0)
        assert np.isfinite(noise).all()
        assert np.abs(noise).max() < 9.5
