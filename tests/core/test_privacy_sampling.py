"""Cohorts by chance: exact rates, every set as likely as another, nothing that a seed could repeat."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings

from aivo_core.privacy import PrivacyError
from aivo_core.privacy_sampling import MAX_DENOMINATOR, fixed_size_cohort, poisson_cohort, uniform_integers

FALSE_ALARM = 1e-6


def refused(code: str) -> Any:
    return pytest.raises(PrivacyError, check=lambda error: error.code == code)


def seeded(seed: int) -> Callable[[int], bytes]:
    return np.random.default_rng(seed).bytes


def words(*values: int) -> Callable[[int], bytes]:
    """Randomness that consists of these 64-bit numbers, each once."""
    left = list(values)

    def next_bytes(count: int) -> bytes:
        taken, left[:] = left[: count // 8], left[count // 8 :]
        assert len(taken) * 8 == count
        return np.array(taken, dtype=np.uint64).tobytes()

    return next_bytes


@pytest.mark.parametrize(("q_num", "q_den"), [(1, 10), (20, 200), (120, 3383), (1, 1000), (999, 1000)])
def test_the_number_chosen_is_within_the_bounds_of_its_rate(q_num: int, q_den: int) -> None:
    count = 200_000
    chosen = poisson_cohort(range(count), q_num, q_den)
    low, high = scipy.stats.binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], count, q_num / q_den)
    assert low <= len(chosen) <= high
    assert chosen == sorted(set(chosen))


def test_each_member_is_chosen_on_their_own() -> None:
    taken = np.array(
        [
            [member in set(poisson_cohort(range(4), 1, 3, randomness=source)) for member in range(4)]
            for source in itertools.repeat(seeded(11), 20_000)
        ]
    )
    patterns = Counter(map(tuple, taken.tolist()))
    expected = [
        20_000 * (1 / 3) ** sum(pattern) * (2 / 3) ** (4 - sum(pattern)) for pattern in itertools.product((True, False), repeat=4)
    ]
    seen = [patterns[pattern] for pattern in itertools.product((True, False), repeat=4)]
    assert scipy.stats.chisquare(seen, expected).pvalue > FALSE_ALARM


def test_the_size_varies_as_chance_does_and_is_not_fixed() -> None:
    sizes = [len(poisson_cohort(range(200), 1, 10, randomness=source)) for source in itertools.repeat(seeded(3), 2000)]
    assert 0.8 < np.var(sizes) / (200 * 0.1 * 0.9) < 1.2


def test_a_rate_of_one_takes_everyone_and_nobody_gives_nobody() -> None:
    assert poisson_cohort("abc", 1, 1) == ["a", "b", "c"]
    assert poisson_cohort("abc", 7, 7) == ["a", "b", "c"]
    assert poisson_cohort("", 1, 2) == []


def test_a_rate_that_no_float_can_hold_is_exact() -> None:
    # A rate of 1 - 2^-63 rounds to 1 as a float; here the one number in 2^63 that means no is still obeyed.
    q_den = MAX_DENOMINATOR
    below, at = q_den - 2, q_den - 1
    assert poisson_cohort("ab", q_den - 1, q_den, randomness=words(below, at)) == ["a"]
    assert float(q_den - 1) / float(q_den) == 1.0


def test_numbers_that_would_favour_small_values_are_drawn_again() -> None:
    # 2^64 = 6148914691236517205 x 3 + 1: the one number above the last whole multiple of 3 is refused.
    assert uniform_integers(2, 3, randomness=words(2**64 - 1, 4, 2**64 - 1, 5)).tolist() == [2, 1]
    assert uniform_integers(1, 3, randomness=words(2**64 - 2)).tolist() == [2]


@settings(derandomize=True, max_examples=100, deadline=None)
@given(count=st.integers(0, 50), below=st.integers(1, MAX_DENOMINATOR), seed=st.integers(0, 2**32))
def test_uniform_integers_are_in_range(count: int, below: int, seed: int) -> None:
    drawn = uniform_integers(count, below, randomness=seeded(seed))
    assert drawn.shape == (count,)
    assert all(0 <= int(value) < below for value in drawn)


@pytest.mark.parametrize("below", [2, 3, 7, 64, 1000])
def test_uniform_integers_are_uniform(below: int) -> None:
    counts = np.bincount(uniform_integers(200_000, below).astype(np.int64), minlength=below)
    assert scipy.stats.chisquare(counts).pvalue > FALSE_ALARM


def test_every_cohort_of_a_fixed_size_is_as_likely_as_another() -> None:
    source = seeded(5)
    seen = Counter(tuple(fixed_size_cohort("abcde", 2, randomness=source)) for _ in range(20_000))
    assert set(seen) == set(itertools.combinations("abcde", 2))
    assert scipy.stats.chisquare(list(seen.values())).pvalue > FALSE_ALARM


@settings(derandomize=True, max_examples=100, deadline=None)
@given(count=st.integers(1, 60), data=st.data())
def test_a_cohort_of_fixed_size_has_that_size_and_keeps_the_order(count: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, count))
    cohort = fixed_size_cohort(range(count), size)
    assert len(cohort) == size
    assert cohort == sorted(set(cohort))
    assert set(cohort) <= set(range(count))


def test_no_seed_that_a_program_can_set_repeats_a_cohort() -> None:
    cohorts = []
    for _ in range(2):
        np.random.seed(0)
        cohorts.append((poisson_cohort(range(500), 1, 2), fixed_size_cohort(range(500), 250)))
    assert cohorts[0][0] != cohorts[1][0]
    assert cohorts[0][1] != cohorts[1][1]


@pytest.mark.parametrize(("q_num", "q_den"), [(0, 10), (-1, 10), (11, 10), (1, 0), (1, MAX_DENOMINATOR + 1)])
def test_a_rate_outside_its_range_is_refused(q_num: int, q_den: int) -> None:
    with refused("bad_rate"):
        poisson_cohort("abc", q_num, q_den)


@pytest.mark.parametrize("size", [0, -1, 4])
def test_a_cohort_that_cannot_be_is_refused(size: int) -> None:
    with refused("bad_cohort"):
        fixed_size_cohort("abc", size)


@pytest.mark.parametrize("below", [0, -3, MAX_DENOMINATOR + 1])
def test_a_range_that_is_empty_or_too_large_is_refused(below: int) -> None:
    with refused("bad_rate"):
        uniform_integers(1, below)
