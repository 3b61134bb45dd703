"""The difficulty head's reading: a distribution over attained levels, and the success curve it implies.

The ten probabilities p_0..p_9 say how likely it is that T, the highest level the learner would get right now, is
0..9. P(right at level d) = G(d) = sum of p_k for k >= d; between levels G is linear. An event of continuous level x
with score s tells only T >= x or T < x, so its loss is -[s log G(x) + (1 - s) log(1 - G(x))]: an ordinal likelihood
censored on one side.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LEVELS = 9
"""Levels of tasks and recommendations: 1..9. Attained levels: 0..9."""

CLASSES = LEVELS + 1
MIN_PROBABILITY = 1e-6
"""G is clipped to [MIN_PROBABILITY, 1 - MIN_PROBABILITY] in every loss."""

Array = npt.NDArray[np.floating]


def level_weights(level: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Weights a with G(level) = a . p, for continuous levels in [0, 10].

    Args:
        level: shape (n,).

    Returns:
        float32 of shape (n, 10): 0 for k < floor(level), 1 - fraction at k = floor(level), 1 above.
    """
    x = np.asarray(level, dtype=np.float64)[:, None]
    k = np.arange(CLASSES, dtype=np.float64)[None, :]
    return np.clip(k + 1.0 - x, 0.0, 1.0).astype(np.float32)


def success_curve(probabilities: Array) -> Array:
    """G at the levels 1..9.

    Args:
        probabilities: shape (..., 10), each row a distribution.

    Returns:
        shape (..., 9); entry d - 1 is P(right at level d), falling in d.
    """
    reversed_sums = np.cumsum(probabilities[..., ::-1], axis=-1)[..., ::-1]
    return np.asarray(np.minimum(reversed_sums[..., 1:], 1.0))


def success_at(probabilities: Array, level: npt.ArrayLike) -> Array:
    """G at one continuous level per row: probabilities (n, 10), level (n,) -> (n,)."""
    return np.asarray(np.sum(probabilities * level_weights(level), axis=-1))


def score_log_loss(probabilities: Array, level: npt.ArrayLike, score: npt.ArrayLike) -> Array:
    """Per-row loss of the censored ordinal likelihood: (n, 10), (n,), (n,) -> (n,), natural logarithm."""
    g = np.clip(success_at(probabilities, level), MIN_PROBABILITY, 1.0 - MIN_PROBABILITY)
    s = np.asarray(score, dtype=g.dtype)
    return np.asarray(-(s * np.log(g) + (1.0 - s) * np.log1p(-g)))


def attained_level(probabilities: Array) -> Array:
    """Expected attained level, sum of k p_k: (..., 10) -> (...)."""
    return np.asarray(probabilities @ np.arange(CLASSES, dtype=probabilities.dtype))


def recommended_level(probabilities: Array, target: float = 0.7) -> npt.NDArray[np.int64]:
    """The level 1..9 whose success chance is nearest ``target``; the lower level wins a tie. (n, 10) -> (n,)."""
    return np.asarray(np.argmin(np.abs(success_curve(probabilities) - target), axis=-1) + 1, dtype=np.int64)
