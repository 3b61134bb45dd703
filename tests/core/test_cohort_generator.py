"""The dropout's generator: the same bits in both backends, uniform, and independent from place to place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from aivo_core.engine import compiled
from aivo_core.engine.generator import GOLDEN, LAYERS, drop_threshold, kept_scale, layer_key, pass_key, uniform_words
from aivo_core.engine.passes import ADAM_BETA_1, ADAM_BETA_2, ADAM_EPSILON
from aivo_core.ordinal import CLASSES, MIN_PROBABILITY


@njit
def compiled_layer_key(key, step, layer):
    return compiled.layer_key(key, step, layer)


@njit
def compiled_fill_kept(kept, key, threshold, scale):
    compiled.fill_kept(kept, key, threshold, scale)


@njit
def compiled_exponentials(x):
    out = np.empty_like(x)
    for i in range(x.size):
        out[i] = compiled.exponential(x[i])
    return out


KEYS = st.integers(0, 2**64 - 1)


@settings(max_examples=60, deadline=None)
@given(key=KEYS, step=st.integers(0, 10**6), layer=st.integers(0, 255), count=st.integers(1, 400), rate=st.floats(0.01, 0.95))
def test_the_compiled_generator_gives_the_same_bits(key: int, step: int, layer: int, count: int, rate: float) -> None:
    own_key = layer_key(key, step, layer)
    assert int(compiled_layer_key(np.uint64(key), step, layer)) == own_key
    words = uniform_words(own_key, count)
    expected = np.where(words >= drop_threshold(rate), kept_scale(rate), np.float32(0.0))
    kept = np.full(count, np.nan, np.float32)
    compiled_fill_kept(kept, np.uint64(own_key), np.uint64(drop_threshold(rate)), kept_scale(rate))
    assert kept.tobytes() == expected.tobytes()


def test_splitmix64_reproduces_its_published_sequence() -> None:
    """First numbers of SplitMix64 from the state 1234567 (the reference implementation by Vigna)."""
    words = uniform_words(1234567, 6).astype(np.uint64)
    assert list(words[:3] | words[3:] << np.uint64(32)) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_words_are_uniform_and_layers_steps_and_seeds_are_independent() -> None:
    """Chi-square over 256 cells and correlations of 2^18 numbers; each check has a false alarm below 1e-5."""
    count = 2**18
    streams = [
        uniform_words(layer_key(pass_key(seed, which), step, layer), count)
        for seed, which, step, layer in [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0)]
    ]
    for words in streams:
        for part in (words >> np.uint32(24), words & np.uint32(255)):
            cells = np.bincount(part, minlength=256)
            assert np.sum((cells - count / 256) ** 2) / (count / 256) < 360  # 255 degrees of freedom: 1e-5 at 360
    centred = [words / 2.0**32 - 0.5 for words in streams]
    bound = 4.5 / np.sqrt(count)
    for i, one in enumerate(centred):
        assert abs(12 * np.mean(one[:-1] * one[1:])) < bound
        for other in centred[i + 1 :]:
            assert abs(12 * np.mean(one * other)) < bound


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.3, 0.5])
def test_units_are_dropped_at_their_rate_and_the_mean_stays(rate: float) -> None:
    kept = np.zeros(10**6, np.float32)
    compiled_fill_kept(kept, np.uint64(5), np.uint64(drop_threshold(rate)), kept_scale(rate))
    assert abs(np.mean(kept == 0.0) - rate) < 4.5 * np.sqrt(rate * (1 - rate) / kept.size)
    assert set(np.unique(kept)) == {np.float32(0.0), kept_scale(rate)}
    assert float(kept_scale(rate)) * (1 - rate) == pytest.approx(1.0, abs=1e-6)


def test_the_compiled_file_repeats_the_constants_of_the_other_modules() -> None:
    """It cannot import them: the cache of compiled code would not see them change."""
    assert np.float32(1.0 - ADAM_BETA_1) == compiled.BETA_1_REST and np.float32(1.0 - ADAM_BETA_2) == compiled.BETA_2_REST
    assert np.float32(ADAM_EPSILON) == compiled.EPSILON
    assert np.float32(MIN_PROBABILITY) == compiled.LOWEST and np.float32(1.0 - MIN_PROBABILITY) == compiled.HIGHEST
    assert (compiled.LEVELS, int(compiled.GOLDEN), int(compiled.LAYERS)) == (CLASSES, GOLDEN, LAYERS)


def test_the_compiled_exponential_is_accurate_and_lets_nan_through() -> None:
    x = -np.geomspace(1e-7, 87.0, 20_000).astype(np.float32)
    found = compiled_exponentials(np.concatenate([x, np.array([0.0, -200.0, -np.inf, np.nan], np.float32)]))
    expected = np.exp(x.astype(np.float64))
    assert np.max(np.abs(found[:-4] / expected - 1.0)) < 3e-7
    assert found[-4] == 1.0 and 0.0 <= found[-3] < 1e-37 and 0.0 <= found[-2] < 1e-37 and np.isnan(found[-1])
