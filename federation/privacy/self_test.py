"""Whether this installation's privacy does what its figures assume: named checks with what was measured and allowed.

Anything that adds noise or bounds a contribution is measured from outside, through the same fold that a round uses; a
mechanism handed in is judged like the product's own. Each statistical check raises a false alarm once in a million runs.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any, Protocol

import numpy as np

from aivo_core.privacy import DoubleArray, global_norm
from aivo_core.privacy_clipping import AdaptiveGaussianSumMechanism
from aivo_core.privacy_mechanisms import FloatingArray, GaussianSumMechanism, privatise_upload
from aivo_core.privacy_sampling import poisson_cohort
from federation.privacy.references import REFERENCES
from federation.strategies.base import PrivacyMechanism
from federation.strategies.mean import FedAvg

FALSE_ALARM = 1e-6
"""Probability with which a check of chance fails although all is well."""

DRAWS = 400_000
"""Numbers of noise measured at a time: a spread 1 % off is noticed."""

COUNT_DRAWS = 4096
"""The same for noise that a release holds one number of: a spread 10 % off is noticed."""

LEAST_EXTREME = 4.0
"""In standard deviations: the largest of DRAWS normal numbers lies below with probability 1e-11, cut-off noise always."""

_CLIP_NORM, _NOISE, _COHORT = 0.5, 1.1, 20.0
_DIM = 96


class MakesMechanism(Protocol):
    """How a mechanism for one release is made."""

    def __call__(self, *, clip_norm: float, noise_multiplier: float, expected_cohort: float) -> PrivacyMechanism: ...


class MakesUpload(Protocol):
    """How a delta is made ready to leave a device."""

    def __call__(self, delta: FloatingArray, /, *, clip_norm: float, noise_multiplier: float) -> FloatingArray: ...


@dataclass(frozen=True, slots=True)
class Check:
    """One check: it passes where ``measured`` lies in [low, high].

    Attributes:
        meaning: what is measured, in which unit, against what.
    """

    name: str
    meaning: str
    measured: float
    low: float
    high: float

    @property
    def passed(self) -> bool:
        """False also for a measurement that is not a number."""
        return self.low <= self.measured <= self.high

    def to_json(self) -> dict[str, Any]:
        """All fields and the verdict."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True, slots=True)
class SelfTest:
    """All checks of one run."""

    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    @property
    def passed(self) -> bool:
        return not self.failed

    def to_json(self) -> dict[str, Any]:
        """``checks`` and the number ``failed``, as ``privacy_report`` shows them."""
        return {"checks": [check.to_json() for check in self.checks], "failed": len(self.failed)}


def self_test(*, make_mechanism: MakesMechanism = GaussianSumMechanism, upload: MakesUpload = privatise_upload) -> SelfTest:
    """Run all checks; takes a few seconds, most of them to load the accounting library.

    Args:
        make_mechanism: what is judged as the mechanism of a round.
        upload: what is judged as the mechanism of a device.
    """
    return SelfTest(
        checks=(
            *_accountant_checks(),
            *_noise_checks(make_mechanism),
            *_bound_checks(make_mechanism),
            *_upload_checks(upload),
            *_adaptive_checks(),
            _sampling_check(),
        )
    )


def _accountant_checks() -> Iterator[Check]:
    for reference in REFERENCES:
        yield Check(
            name=f"accountant:{reference.name}",
            meaning=f"epsilon by {reference.accountant}; reference: {reference.source}",
            measured=reference.computed(),
            low=reference.low,
            high=reference.high,
        )


def _noise_checks(make: MakesMechanism) -> Iterator[Check]:
    low, high = spread_bounds(DRAWS)
    spreads = {}
    for factor in (1.0, 2.0):
        mechanism = make(clip_norm=factor * _CLIP_NORM, noise_multiplier=_NOISE, expected_cohort=_COHORT)
        noise = _released(mechanism, [], dim=DRAWS) * _COHORT
        spreads[factor] = _spread(noise) / (_NOISE * _CLIP_NORM)
        if factor == 1.0:
            mean, largest = float(noise.mean()) / (_NOISE * _CLIP_NORM), float(np.abs(noise).max()) / (_NOISE * _CLIP_NORM)
    yield Check("noise_spread", "standard deviation of the noise on the sum, in z C", spreads[1.0], low, high)
    yield Check("noise_doubles_with_c", "the same with C doubled, in z C of before", spreads[2.0], 2.0 * low, 2.0 * high)
    bound = normal_bound(1) / sqrt(DRAWS)
    yield Check("noise_mean", "mean of the noise on the sum, in z C", mean, -bound, bound)
    yield Check("noise_largest", "largest noise on the sum, in z C", largest, LEAST_EXTREME, normal_bound(DRAWS))
    yield Check("noise_not_seeded", "numbers that repeat between two draws", _repeated(make), 0.0, 0.0)


def _bound_checks(make: MakesMechanism) -> Iterator[Check]:
    mechanism = make(clip_norm=_CLIP_NORM, noise_multiplier=_NOISE, expected_cohort=_COHORT)
    norms = [global_norm(mechanism.clip(delta)) for delta in _extreme_deltas()]
    yield Check("clipping_bound", "largest L2 norm of a clipped delta, in C", max(norms) / _CLIP_NORM, 0.0, 1.0)
    small = np.full(_DIM, 0.5 * _CLIP_NORM / sqrt(_DIM), np.float32)
    moved = float(np.abs(mechanism.clip(small) - small).max())
    yield Check("clipping_leaves_small_deltas", "largest change of a delta of norm C/2", moved, 0.0, 0.0)
    yield Check("outlier_bound", "how far one huge delta moves the sum, in C", _outlier_shift(make) / _CLIP_NORM, 0.0, 1.0 + 1e-9)
    recorder = _Recorder(make(clip_norm=_CLIP_NORM, noise_multiplier=_NOISE, expected_cohort=_COHORT))
    released = _released(recorder, [small] * 7)
    yield Check("noise_once", "draws of noise over one round", float(len(recorder.sums)), 1.0, 1.0)
    error = float(np.abs(released * _COHORT - recorder.noised[0]).max()) / _CLIP_NORM
    yield Check("fixed_denominator", "released mean times expected cohort against the noised sum, in C", error, 0.0, 1e-6)


def _upload_checks(upload: MakesUpload) -> Iterator[Check]:
    low, high = spread_bounds(DRAWS)
    noise = upload(np.zeros(DRAWS), clip_norm=_CLIP_NORM, noise_multiplier=_NOISE)
    yield Check(
        "upload_noise_spread",
        "standard deviation of an upload's noise, in z C",
        _spread(noise) / (_NOISE * _CLIP_NORM),
        low,
        high,
    )
    # So little noise that the norm of the upload is that of the clipped delta.
    quiet = [upload(delta, clip_norm=_CLIP_NORM, noise_multiplier=1e-12) for delta in _extreme_deltas()]
    largest = max(map(global_norm, quiet)) / _CLIP_NORM
    yield Check("upload_clipping_bound", "largest L2 norm of an upload with next to no noise, in C", largest, 0.0, 1.0 + 1e-6)


def _adaptive_checks() -> Iterator[Check]:
    low, high = spread_bounds(DRAWS)
    mechanism = _adaptive()
    noise = mechanism.add_noise(np.zeros(DRAWS + 1))[:-1]
    counts = np.concatenate([_adaptive().add_noise(np.zeros(1)) for _ in range(COUNT_DRAWS)]) / mechanism.count_noise
    both = mechanism.delta_noise_multiplier**-2 + (2.0 * mechanism.count_noise) ** -2
    expected = mechanism.delta_noise_multiplier * _CLIP_NORM
    yield Check(
        "adaptive_noise_spread",
        "standard deviation of the noise on the deltas, in z_delta C",
        _spread(noise) / expected,
        low,
        high,
    )
    yield Check(
        "adaptive_count_spread",
        "standard deviation of the noise on the bits, in sigma_b",
        _spread(counts),
        *spread_bounds(COUNT_DRAWS),
    )
    yield Check("adaptive_noise_split", "noise of deltas and bits together, in z", both**-0.5 / _NOISE, 1 - 1e-12, 1 + 1e-12)


def _adaptive() -> AdaptiveGaussianSumMechanism:
    return AdaptiveGaussianSumMechanism(clip_norm=_CLIP_NORM, noise_multiplier=_NOISE, expected_cohort=_COHORT)


def _sampling_check() -> Check:
    low, high = binomial_bounds(DRAWS, 0.1)
    chosen = float(len(poisson_cohort(range(DRAWS), 1, 10)))
    return Check("poisson_rate", f"members chosen of {DRAWS} with q = 1/10", chosen, low, high)


def spread_bounds(count: int) -> tuple[float, float]:
    """Bounds on (measured over true) standard deviation of ``count`` normal numbers of mean 0, two-sided, chi-square."""
    from scipy.stats import chi2

    return sqrt(chi2.ppf(FALSE_ALARM / 2.0, count) / count), sqrt(chi2.isf(FALSE_ALARM / 2.0, count) / count)


def normal_bound(count: int) -> float:
    """What the largest of ``count`` standard normal numbers stays below in absolute value."""
    from scipy.stats import norm

    return float(norm.isf(FALSE_ALARM / (2.0 * count)))


def binomial_bounds(count: int, probability: float) -> tuple[float, float]:
    """Bounds on the number of successes in ``count`` trials, two-sided."""
    from scipy.stats import binom

    return float(binom.ppf(FALSE_ALARM / 2.0, count, probability)), float(binom.isf(FALSE_ALARM / 2.0, count, probability))


class _Recorder:
    """Passes everything through to a mechanism and keeps what it was given."""

    def __init__(self, mechanism: PrivacyMechanism) -> None:
        self._mechanism = mechanism
        self.name, self.denominator, self.identity = mechanism.name, mechanism.denominator, mechanism.identity
        self.sums: list[DoubleArray] = []
        self.noised: list[DoubleArray] = []

    def clip(self, delta: FloatingArray) -> FloatingArray:
        return self._mechanism.clip(delta)

    def add_noise(self, total: DoubleArray) -> DoubleArray:
        self.sums.append(total.copy())
        self.noised.append(self._mechanism.add_noise(total))
        return self.noised[-1]


def _released(mechanism: PrivacyMechanism, deltas: list[FloatingArray], dim: int = _DIM) -> DoubleArray:
    fold = FedAvg().start(dim, dtype=np.float64, mechanism=mechanism)
    for delta in deltas:
        fold.add(delta, 1.0)
    return fold.finish().vector.astype(np.float64)


def _outlier_shift(make: MakesMechanism) -> float:
    """L2 norm by which the sum that gets the noise moves when one learner with a huge delta joins."""
    others: list[FloatingArray] = [np.sin(np.arange(_DIM) + 7.0 * learner).astype(np.float32) for learner in range(5)]
    sums = []
    for cohort in (others, [*others, np.full(_DIM, 1e30, np.float32)]):
        recorder = _Recorder(make(clip_norm=_CLIP_NORM, noise_multiplier=_NOISE, expected_cohort=_COHORT))
        _released(recorder, cohort)
        sums.append(recorder.sums[0])
    return global_norm(sums[1] - sums[0])


def _extreme_deltas() -> Iterator[FloatingArray]:
    """Deltas with which a bound that is not one norm over everything breaks: dense, sparse, huge, and just above C."""
    for scale in (1.0, 1e10, 1e30):
        yield np.full(_DIM, scale, np.float32)
        yield (scale * (-1.0) ** np.arange(_DIM)).astype(np.float32)
        yield np.where(np.arange(_DIM) % 17 == 0, scale, 0.0).astype(np.float32)
        yield (scale * np.eye(1, _DIM, 3)[0]).astype(np.float32)
    yield np.full(_DIM, 1.01 * _CLIP_NORM / sqrt(_DIM), np.float32)


def _repeated(make: MakesMechanism) -> float:
    """Numbers that occur in two draws: of two mechanisms with the known generators set back, and of a copy of one."""

    def fresh() -> PrivacyMechanism:
        return make(clip_norm=_CLIP_NORM, noise_multiplier=_NOISE, expected_cohort=_COHORT)

    def draw(mechanism: PrivacyMechanism) -> DoubleArray:
        return mechanism.add_noise(np.zeros(_DIM))

    original = fresh()
    twin = copy.deepcopy(original)
    draws = [draw(original), draw(twin), *_after_reset(lambda: draw(fresh())), *_after_reset(lambda: draw(fresh()))]
    every = np.concatenate(draws)
    return float(every.size - np.unique(every).size)


def _after_reset(call: Callable[[], DoubleArray]) -> list[DoubleArray]:
    """Call with the generators that a program can seed set to a fixed state, and put back what they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        random.seed(0)
        np.random.seed(0)
        return [call()]
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _spread(noise: FloatingArray) -> float:
    return float(np.sqrt(np.mean(np.square(noise, dtype=np.float64))))
