"""Figures of forecasts: ranking, log loss and calibration. NumPy only.

Logarithms are natural. Probabilities are clipped at float64's machine epsilon before a logarithm, as scikit-learn does.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

CALIBRATION_BINS = 10
_EPSILON = float(np.finfo(np.float64).eps)


class EvaluationError(ValueError):
    """Forecasts or losses that cannot be evaluated; whoever decides on them must not go on.

    ``code`` is stable: ``no_samples``, ``no_learners``, ``different_learners``, ``duplicate_learner``, ``wrong_shape``,
    ``not_finite``, ``bad_range``. The message names what is wrong.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


def top_k(probabilities: Array, label: IntArray, k: int) -> float:
    """Share of rows whose label is among the k most probable classes; of equal ones the lower index comes first.

    Args:
        probabilities: (n, classes). label: (n,). k: at least 1; with k >= classes the answer is 1.

    Raises:
        EvaluationError: ``no_samples``, ``wrong_shape``, ``not_finite``.
    """
    own = _own_probability(probabilities, label)
    before = np.arange(probabilities.shape[1])[None, :] < label[:, None]
    ahead = (probabilities > own[:, None]) | ((probabilities == own[:, None]) & before)
    return float(np.mean(ahead.sum(axis=1) < k))


def class_losses(probabilities: Array, label: IntArray) -> Float64Array:
    """(n, classes), (n,) -> (n,) minus the log of each label's probability.

    Raises:
        EvaluationError: as ``top_k``.
    """
    return np.asarray(-np.log(np.clip(_own_probability(probabilities, label), _EPSILON, 1.0)))


def log_loss(probabilities: Array, label: IntArray) -> float:
    """Mean of ``class_losses``."""
    return float(class_losses(probabilities, label).mean())


def binary_losses(probability: Array, score: Array) -> Float64Array:
    """(n,), (n,) -> (n,): -[s log p + (1 - s) log(1 - p)] for scores 0..1.

    Raises:
        EvaluationError: ``no_samples``, ``wrong_shape``, ``not_finite``, ``bad_range``.
    """
    p, s = _binary(probability, score)
    p = np.clip(p, _EPSILON, 1.0 - _EPSILON)
    return np.asarray(-(s * np.log(p) + (1.0 - s) * np.log1p(-p)))


def brier(probability: Array, score: Array) -> float:
    """Mean squared difference of probability and score."""
    p, s = _binary(probability, score)
    return float(np.mean((p - s) ** 2))


def roc_auc(probability: Array, score: Array) -> float | None:
    """Chance that a right answer had the higher probability than a wrong one, ties counting one half.

    A row with score s counts as s of a right and 1 - s of a wrong answer. None where all answers are right or all wrong.
    """
    p, s = _binary(probability, score)
    _, group = np.unique(p, return_inverse=True)
    right = np.bincount(group.reshape(-1), weights=s)
    wrong = np.bincount(group.reshape(-1), weights=1.0 - s)
    pairs = right.sum() * wrong.sum()
    if pairs == 0.0:
        return None
    below = np.concatenate([[0.0], np.cumsum(wrong)[:-1]])
    return float(np.sum(right * (below + 0.5 * wrong)) / pairs)


def calibration(probability: Array, score: Array, bins: int = CALIBRATION_BINS) -> tuple[float, float]:
    """Mean and worst gap between mean probability and mean score over bins of equal count, by rising probability.

    The mean weighs bins by their rows; with fewer rows than bins every row is a bin.
    """
    p, s = _binary(probability, score)
    parts = np.array_split(np.argsort(p, kind="stable"), min(bins, len(p)))
    gaps = np.array([abs(float(p[part].mean() - s[part].mean())) for part in parts])
    sizes = np.array([len(part) for part in parts])
    return float(np.sum(gaps * sizes) / sizes.sum()), float(gaps.max())


def success_figures(probability: Array, score: Array) -> dict[str, float | None]:
    """auc, log_loss, brier, calibration_gap and worst_bin of P(right) forecasts: (n,), (n,)."""
    gap, worst = calibration(probability, score)
    return {
        "auc": roc_auc(probability, score),
        "log_loss": float(binary_losses(probability, score).mean()),
        "brier": brier(probability, score),
        "calibration_gap": gap,
        "worst_bin": worst,
    }


def class_figures(probabilities: Array, label: IntArray, *ks: int) -> dict[str, float | None]:
    """top1 (and topk for each further k) and log_loss of class forecasts: (n, classes), (n,)."""
    ranks: dict[str, float | None] = {f"top{k}": top_k(probabilities, label, k) for k in (1, *ks)}
    return {**ranks, "log_loss": log_loss(probabilities, label)}


def _own_probability(probabilities: Array, label: IntArray) -> Array:
    if len(label) == 0:
        raise EvaluationError("there are no samples to evaluate", code="no_samples")
    if probabilities.ndim != 2 or label.shape != probabilities.shape[:1]:
        raise EvaluationError(
            f"probabilities {probabilities.shape} and label {label.shape} must be (n, classes) and (n,)", code="wrong_shape"
        )
    if not np.all(np.isfinite(probabilities)):
        raise EvaluationError("probabilities must be finite", code="not_finite")
    if label.min() < 0 or label.max() >= probabilities.shape[1]:
        raise EvaluationError(f"label must lie in 0..{probabilities.shape[1] - 1}", code="bad_range")
    return np.asarray(probabilities[np.arange(len(label)), label])


def _binary(probability: Array, score: Array) -> tuple[Float64Array, Float64Array]:
    p, s = np.asarray(probability, dtype=np.float64), np.asarray(score, dtype=np.float64)
    if len(s) == 0:
        raise EvaluationError("there are no samples to evaluate", code="no_samples")
    if p.shape != s.shape or p.ndim != 1:
        raise EvaluationError(f"probability {p.shape} and score {s.shape} must both be (n,)", code="wrong_shape")
    if not (np.all(np.isfinite(p)) and np.all(np.isfinite(s))):
        raise EvaluationError("probability and score must be finite", code="not_finite")
    if s.min() < 0.0 or s.max() > 1.0 or p.min() < -1e-6 or p.max() > 1.0 + 1e-6:
        raise EvaluationError("probability and score must lie in 0..1", code="bad_range")
    return p, s
