"""Paired comparison of two models on the same learners, with a bootstrap over learners.

Samples of one learner hang together, so that learners, not samples, are drawn (Efron 1979; percentile interval).
A change is candidate minus current: negative is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from models_store.metrics import EvaluationError

Float64Array = npt.NDArray[np.float64]

DRAWS = 2000
SAME = 1e-6
"""Changes of at most this size count as the same."""

_BLOCK = 1 << 21
"""Indices drawn at a time, which bounds the memory."""


class Losses(Protocol):
    """Losses of one learner under one model."""

    @property
    def key(self) -> str: ...

    @property
    def samples(self) -> int: ...

    def heads(self) -> Mapping[str, float]:
        """Loss per head, and their ``total``."""
        ...


@dataclass(frozen=True)
class Change:
    """How one loss changes over learners.

    Attributes:
        mean: over learners, each counting once.
        interval: 95 % bootstrap interval of the mean.
        better, same, worse: shares of learners.
        worst: the largest change of a learner.
        current, candidate: mean loss over learners.
        learners: how many.
    """

    mean: float
    interval: tuple[float, float]
    better: float
    same: float
    worse: float
    worst: float
    current: float
    candidate: float
    learners: int

    @property
    def relative_fall(self) -> float:
        """Fall of the mean loss as a share of the current one: positive is better."""
        return (self.current - self.candidate) / self.current if self.current else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "interval": list(self.interval)}


def paired_change(
    current: Sequence[Losses], candidate: Sequence[Losses], *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Change]:
    """Change of every head's loss and of the total, learner by learner.

    Args:
        current, candidate: losses of the same learners on the same number of samples, in any order.
        draws: bootstrap draws, at least 1. seed: of the draws.

    Returns:
        By head, as ``Losses.heads`` names them. The same for every order of the learners.

    Raises:
        EvaluationError: ``no_learners``; ``duplicate_learner``; ``different_learners`` (also with other samples or heads);
            ``no_samples`` of a learner; ``not_finite``.
    """
    before, after = _by_key(current, "current"), _by_key(candidate, "candidate")
    if set(before) != set(after):
        missing = sorted(set(before) ^ set(after))
        raise EvaluationError(f"current and candidate have different learners, such as {missing[0]}", code="different_learners")
    if draws < 1:
        raise EvaluationError(f"draws must be at least 1, not {draws}", code="bad_range")
    keys = sorted(before)
    heads = list(before[keys[0]].heads())
    tables = []
    for key in keys:
        one, two = before[key], after[key]
        if one.samples != two.samples or list(one.heads()) != heads or list(two.heads()) != heads:
            raise EvaluationError(f"learner {key} was measured on other samples or heads", code="different_learners")
        tables.append(([one.heads()[head] for head in heads], [two.heads()[head] for head in heads]))
    table = np.array(tables, dtype=np.float64)
    if not np.all(np.isfinite(table)):
        raise EvaluationError("a loss is not finite", code="not_finite")
    return _changes(heads, table[:, 0], table[:, 1], draws, seed)


def bootstrap_interval(values: Float64Array, *, draws: int = DRAWS, seed: int = 0) -> Float64Array:
    """95 % percentile interval of column means over resampled rows: (learners, k) -> (k, 2).

    Raises:
        EvaluationError: ``no_learners``, ``not_finite``.
    """
    if len(values) == 0:
        raise EvaluationError("there are no learners to compare", code="no_learners")
    if not np.all(np.isfinite(values)):
        raise EvaluationError("a value is not finite", code="not_finite")
    rng = np.random.default_rng(seed)
    n = len(values)
    block = max(1, _BLOCK // (n * values.shape[1]))
    means = []
    for start in range(0, draws, block):
        index = rng.integers(0, n, size=(min(block, draws - start), n))
        means.append(values[index].mean(axis=1))
    return np.asarray(np.quantile(np.concatenate(means), [0.025, 0.975], axis=0).T)


def _changes(heads: list[str], before: Float64Array, after: Float64Array, draws: int, seed: int) -> dict[str, Change]:
    change = after - before
    intervals = bootstrap_interval(change, draws=draws, seed=seed)
    return {
        head: Change(
            mean=math.fsum(change[:, i]) / len(change),
            interval=(float(intervals[i, 0]), float(intervals[i, 1])),
            better=float(np.mean(change[:, i] < -SAME)),
            same=float(np.mean(np.abs(change[:, i]) <= SAME)),
            worse=float(np.mean(change[:, i] > SAME)),
            worst=float(change[:, i].max()),
            current=math.fsum(before[:, i]) / len(change),
            candidate=math.fsum(after[:, i]) / len(change),
            learners=len(change),
        )
        for i, head in enumerate(heads)
    }


def _by_key(losses: Sequence[Losses], name: str) -> dict[str, Losses]:
    if not losses:
        raise EvaluationError(f"{name} has no learners", code="no_learners")
    found = {loss.key: loss for loss in losses}
    if len(found) != len(losses):
        raise EvaluationError(f"{name} names a learner twice", code="duplicate_learner")
    for loss in losses:
        if loss.samples < 1:
            raise EvaluationError(f"learner {loss.key} of {name} has no samples", code="no_samples")
    return found
