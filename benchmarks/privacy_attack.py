"""A membership attack on private aggregation: how well does somebody who sees the release tell whether a learner took part?

The attacker knows everything but that: all other deltas, the canary's delta, C, z and the denominator. The canary's delta is huge
and points where every number grows, so that clipping takes it to norm C exactly; the others' are small and orthogonal to it.
The statistic is the released sum along the canary's direction in units of C: about 0 without the canary, about 1 with it.

From the counts of right and wrong guesses over many releases follow two lower bounds on ε at the release's δ. Each is wrong,
that is above a claim that holds, with probability of at most 1 - confidence:

- *by counts* (Jagielski et al. 2020): (ε, δ) bounds P(guess "in" | in) by e^ε P(guess "in" | out) + δ, and the same for "out".
  Clopper-Pearson bounds on the probabilities bound ε. No assumption; but N releases cannot show more than about ln N, nor the
  far tails that a small δ speaks of.
- *by shape* (Nasr et al. 2023, "Tight Auditing of Differentially Private Machine Learning"): for noise of normal shape the two
  error rates at the threshold in the middle bound the distance mu of the two distributions, and mu gives ε at any δ exactly
  (Balle and Wang 2018, theorem 8). Not for releases sampled by chance, whose shape is another.

Thresholds come from the first half of the releases, counts from the second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import exp, log, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from aivo_core.privacy_mechanisms import GaussianSumMechanism
from aivo_core.privacy_sampling import Randomness, poisson_cohort
from federation.privacy.self_test import MakesMechanism
from federation.strategies.base import PrivacyMechanism
from federation.strategies.mean import FedAvg

Doubles = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Deltas = list[npt.NDArray[np.float32]]
Releases = Callable[[Deltas], npt.NDArray[np.floating[Any]]]
"""Makes one release, the mean (d,), of these deltas."""

OTHERS = 7
HUGE = 1000.0
"""Norm of the canary's delta in C."""

THRESHOLDS = np.arange(-2.0, 4.0, 0.05)


@dataclass(frozen=True, slots=True)
class Bound:
    """What the attack found.

    Attributes:
        by_counts, by_shape: lower bounds on ε; None for the shape where it is not normal.
        most: the largest that ``by_counts`` could have been with so many releases.
        shift, spread: mean of the statistic with the canary less that without, and its standard deviation without; in C.
    """

    by_counts: float
    by_shape: float | None
    most: float
    shift: float
    spread: float
    releases: int
    confidence: float

    @property
    def epsilon(self) -> float:
        """The tighter of the two bounds."""
        return self.by_counts if self.by_shape is None else max(self.by_counts, self.by_shape)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "epsilon": self.epsilon}


def canary(dim: int, clip_norm: float) -> npt.NDArray[np.float32]:
    """The learner whose part in the release is asked about, (dim,): every number the same, the norm far above C."""
    return np.full(dim, HUGE * clip_norm / sqrt(dim), np.float32)


def others(dim: int, clip_norm: float) -> Deltas:
    """Learners who are in every release: norms below C, orthogonal to the canary; ``dim`` is even."""
    signs = (-1.0) ** np.arange(dim)
    return [(clip_norm * (number + 1) / (2 * OTHERS) / sqrt(dim) * signs).astype(np.float32) for number in range(OTHERS)]


def folded(make: MakesMechanism, *, dim: int, clip_norm: float, noise_multiplier: float, expected_cohort: float) -> Releases:
    """Releases through the product's fold, a new mechanism each."""

    def release(deltas: Deltas) -> npt.NDArray[np.floating[Any]]:
        mechanism: PrivacyMechanism = make(
            clip_norm=clip_norm, noise_multiplier=noise_multiplier, expected_cohort=expected_cohort
        )
        fold = FedAvg().start(dim, mechanism=mechanism)
        for delta in deltas:
            fold.add(delta, 1.0)
        return fold.finish().vector

    return release


def attack(
    release: Releases,
    *,
    dim: int,
    clip_norm: float,
    expected_cohort: float,
    delta: float,
    releases: int,
    confidence: float,
    copies: int = 1,
    rate: tuple[int, int] = (1, 1),
    randomness: Randomness | None = None,
) -> Bound:
    """Make ``releases`` with and as many without the canary, and bound ε.

    Args:
        delta: of the claim.
        copies: of the canary in a release; more than 1 is a fold that lets a learner in twice.
        rate: with which each learner is drawn; below 1 only counts bound ε.
        randomness: of the drawing; None for the secure generator.
    """
    direction = np.full(dim, 1.0 / sqrt(dim))
    background, added = others(dim, clip_norm), canary(dim, clip_norm)
    drawn = {} if randomness is None else {"randomness": randomness}

    def statistic(with_canary: bool) -> float:
        members = [*background, *([added] if with_canary else [])]
        chosen = poisson_cohort(members, *rate, **drawn) if rate != (1, 1) else members
        cohort = [one for one in chosen for _copy in range(copies if one is added else 1)]
        return float(release(cohort).astype(np.float64) @ direction) * expected_cohort / clip_norm

    # Alternating, so that anything that drifts meets both alike.
    pairs = np.array([(statistic(True), statistic(False)) for _ in range(releases)])
    return bound(pairs[:, 0], pairs[:, 1], delta=delta, confidence=confidence, normal=rate == (1, 1))


def bound(inside: Doubles, outside: Doubles, *, delta: float, confidence: float, normal: bool) -> Bound:
    """Lower bounds on ε from the statistics with and without the canary, (n,) each; with ``normal`` also by shape.

    The error allowed is shared among all that is asserted: two ways, each with an upper and a lower bound, by counts for two
    directions of the inequality.
    """
    failure = (1.0 - confidence) / (2.0 if normal else 1.0)
    half = len(inside) // 2
    counted = len(inside) - half
    counts = _by_counts(inside, outside, half=half, delta=delta, failure=failure)
    return Bound(
        by_counts=counts,
        by_shape=_by_shape(inside, outside, half=half, delta=delta, failure=failure) if normal else None,
        most=float(_ratio(np.array([counted]), np.array([0]), counted, delta=delta, failure=failure / 2.0)[0]),
        shift=float(inside.mean() - outside.mean()),
        spread=float(outside.std()),
        releases=2 * len(inside),
        confidence=confidence,
    )


def epsilon_of_distance(mu: float, delta: float) -> float:
    """ε at ``delta`` of two normal distributions of the same spread, ``mu`` spreads apart; 0 where δ alone explains them."""
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    def excess(epsilon: float) -> float:
        return exp(log_ndtr(mu / 2.0 - epsilon / mu)) - exp(epsilon + log_ndtr(-mu / 2.0 - epsilon / mu)) - delta

    if mu <= 0.0 or excess(0.0) <= 0.0:
        return 0.0
    return float(brentq(excess, 0.0, mu * mu / 2.0 + mu * sqrt(-2.0 * log(delta)) + 1.0))


def _by_counts(inside: Doubles, outside: Doubles, *, half: int, delta: float, failure: float) -> float:
    """Both directions: "in" above a threshold, "out" below one; each has half of the error."""
    found = 0.0
    for hits, misses, thresholds in ((inside, outside, THRESHOLDS), (-outside, -inside, -THRESHOLDS)):
        choosing = _ratios(hits[:half], misses[:half], thresholds, delta=delta, failure=failure / 2.0)
        best = thresholds[[int(np.argmax(choosing))]]
        found = max(found, float(_ratios(hits[half:], misses[half:], best, delta=delta, failure=failure / 2.0)[0]))
    return found


def _ratios(hits: Doubles, misses: Doubles, thresholds: Doubles, *, delta: float, failure: float) -> Doubles:
    """For each threshold ln((p - δ) / p'), p the share of ``hits`` above it and p' that of ``misses``."""
    right, wrong = (np.sum(values > thresholds[:, None], axis=1) for values in (hits, misses))
    return _ratio(right, wrong, len(hits), delta=delta, failure=failure)


def _ratio(right: Counts, wrong: Counts, trials: int, *, delta: float, failure: float) -> Doubles:
    """ln((p - δ) / p') with p as small and p' as large as the counts allow; 0 where that bounds nothing."""
    low, high = _lowest(right, trials, failure / 2.0), _highest(wrong, trials, failure / 2.0)
    return np.maximum(np.log(np.maximum(low - delta, 1e-300) / high), 0.0)


def _by_shape(inside: Doubles, outside: Doubles, *, half: int, delta: float, failure: float) -> float:
    from scipy.stats import norm

    middle = (inside[:half].mean() + outside[:half].mean()) / 2.0
    hits, false_alarms = (np.sum(values[half:] > middle, keepdims=True) for values in (inside, outside))
    trials = len(inside) - half
    hit, false_alarm = _lowest(hits, trials, failure / 2.0), _highest(false_alarms, trials, failure / 2.0)
    return epsilon_of_distance(float((norm.ppf(hit) - norm.ppf(false_alarm))[0]), delta)


def _lowest(counts: Counts, trials: int, failure: float) -> Doubles:
    """Clopper and Pearson 1934: each probability is at least this, but for ``failure``."""
    from scipy.special import betaincinv

    found: Doubles = np.where(counts == 0, 0.0, betaincinv(np.maximum(counts, 1), trials - counts + 1, failure))
    return found


def _highest(counts: Counts, trials: int, failure: float) -> Doubles:
    """Each probability is at most this, but for ``failure``: one less the least of the other outcome."""
    return 1.0 - _lowest(trials - counts, trials, failure)


# --- Mechanisms that are wrong --------------------------------------------------------------------------------------------


class HalfTheNoise(GaussianSumMechanism):
    """Draws z C / 2 and calls it z C."""

    @property
    def noise_std(self) -> float:
        return super().noise_std / 2.0


class NoNoise(GaussianSumMechanism):
    """Adds nothing."""

    def add_noise(self, total: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return total


class ClipsEachTensor(GaussianSumMechanism):
    """Clips each of four parts to C, so that the whole may have norm 2 C."""

    def clip(self, delta: npt.NDArray[Any]) -> npt.NDArray[Any]:
        clip = super().clip
        return np.concatenate([clip(part) for part in np.array_split(delta, 4)])
