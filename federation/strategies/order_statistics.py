"""The coordinate-wise median and trimmed mean: what a minority of learners sends cannot move without bound.

Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", definitions 1 and 2. Both are
unweighted, as published: a learner who claims many samples counts as one. Neither has bounded sensitivity in the sense that
a privacy mechanism needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from federation.strategies.base import Parameter, StrategyInfo
from federation.strategies.blocks import DoubleArray, FloatingArray
from federation.strategies.coordinate import CoordinateStrategy

DEFAULT_BETA = 0.2
MAX_BETA = 0.49

_SOURCE = "Yin et al. 2018, Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates"
_MEMORY = "constant in the number of learners: as many coordinates of all deltas at a time as fit 32 MiB, read again for each"
_WEIGHT = "1 for every learner, whatever the samples"


class Median(CoordinateStrategy):
    """The middle value of each coordinate; with an even number of learners the mean of the two middle ones."""

    info = StrategyInfo(
        name="median",
        source=f"{_SOURCE}; definition 1",
        breakdown_point=0.5,
        minimum_cohort=1,
        privacy_compatible=False,
        memory=_MEMORY,
        weight=_WEIGHT,
    )

    def kept(self, count: int, parameters: Mapping[str, float]) -> int:  # noqa: ARG002
        return 2 - count % 2

    def reduce_sorted(self, ordered: FloatingArray, parameters: Mapping[str, float]) -> DoubleArray:  # noqa: ARG002
        count = ordered.shape[1]
        return _mean_of(ordered[:, (count - 1) // 2 : count // 2 + 1])


class TrimmedMean(CoordinateStrategy):
    """The mean of each coordinate without its floor(beta n) smallest and as many largest values."""

    info = StrategyInfo(
        name="trimmed_mean",
        source=f"{_SOURCE}; definition 2, with the number cut on each side rounded down",
        breakdown_point=DEFAULT_BETA,
        minimum_cohort=1,
        privacy_compatible=False,
        memory=_MEMORY,
        weight=_WEIGHT,
        parameters=(
            Parameter(
                name="beta",
                default=DEFAULT_BETA,
                low=0.0,
                high=MAX_BETA,
                meaning="share of the learners that is cut on each side, rounded down; also the breakdown point. "
                "With fewer than 1/beta learners nothing is cut",
            ),
        ),
    )

    def kept(self, count: int, parameters: Mapping[str, float]) -> int:
        return count - 2 * cut_per_side(count, parameters["beta"])

    def reduce_sorted(self, ordered: FloatingArray, parameters: Mapping[str, float]) -> DoubleArray:
        count = ordered.shape[1]
        cut = cut_per_side(count, parameters["beta"])
        return _mean_of(ordered[:, cut : count - cut])


def cut_per_side(count: int, beta: float) -> int:
    """floor(beta n) with beta as it is written: .29 of 100 is 29, where the floating-point product is below it."""
    return int(Fraction(repr(float(beta))) * count)


def _mean_of(values: FloatingArray) -> DoubleArray:
    """(k,) means of (k, m) ascending values, in float64; of equal values exactly that value."""
    means = np.asarray(values.sum(axis=1, dtype=np.float64) / values.shape[1])
    inside: DoubleArray = np.clip(means, values[:, 0], values[:, -1])
    return inside  # rounding never leaves the range of what was averaged
