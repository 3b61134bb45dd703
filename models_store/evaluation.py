"""What a model is worth: figures per head, per learner and by length of history. NumPy only, no Django.

Content is the mixture of the network's forecast with the encoder's own (``mix_content``) wherever a decision stands on it;
the figures give the network alone beside it. Success is read from the second pass, at the level of the event.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aivo_core.ordinal import score_log_loss, success_at
from aivo_core.samples import TRAIN_SHARE, Samples
from models_store.bootstrap import Change, bootstrap_interval, paired_change
from models_store.metrics import (
    EvaluationError,
    binary_losses,
    class_figures,
    class_losses,
    roc_auc,
    success_figures,
    top_k,
)
from models_store.success_tables import level_distance, target_success

__all__ = [
    "MIX_WEIGHTS",
    "Change",
    "Evaluated",
    "EvaluationError",
    "Forecast",
    "LearnerLosses",
    "bootstrap_interval",
    "choose_mix",
    "learner_losses",
    "level_distance",
    "main_metrics",
    "mix_content",
    "paired_change",
    "target_success",
]

Array = npt.NDArray[np.floating]
FloatArray = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

MIX_WEIGHTS = tuple(round(0.05 * step, 2) for step in range(9))
"""Weights of the encoder's forecast that are tried: 0, .05 ... .4."""

MIX_FLOOR = 1e-6
HISTORY_BINS = ((1, 4), (5, 9), (10, 19), (20, 29), (30, 99), (100, 199), (200, None))
"""Events of history before a sample, both ends included."""


@dataclass(frozen=True)
class Forecast:
    """Probabilities of a model for n samples.

    Attributes:
        content: (n, 128), path: (n, 32), difficulty_first: (n, 10), of the first-pass rows.
        difficulty_second: (n, 10), of the second-pass rows.
    """

    content: FloatArray
    path: FloatArray
    difficulty_first: FloatArray
    difficulty_second: FloatArray

    def __len__(self) -> int:
        return len(self.content)

    def take(self, index: slice | npt.NDArray[np.int64] | Mask) -> Forecast:
        """The rows at ``index``, in that order."""
        return Forecast(self.content[index], self.path[index], self.difficulty_first[index], self.difficulty_second[index])


@dataclass(frozen=True)
class Evaluated:
    """All samples of one learner with a model's forecasts.

    Attributes:
        expected_level: (n,) level expected after the last item (``Encoder.expected_levels``), or None.
        item_mean: (n,) mean score of the event's item (``Baselines.item_means``), or None.
    """

    key: str
    samples: Samples
    forecast: Forecast
    expected_level: Float64Array | None = None
    item_mean: Float64Array | None = None


@dataclass(frozen=True)
class LearnerLosses:
    """Mean losses of one learner's samples under one model.

    Attributes:
        content: log loss of the mixture. path: log loss. score: second-pass log loss at the level of the event.
        content_top1, content_top5, path_top1: shares.
        score_first: first-pass log loss; not part of the total.
    """

    key: str
    samples: int
    content: float
    path: float
    score: float
    content_top1: float
    content_top5: float
    path_top1: float
    score_first: float

    @property
    def total(self) -> float:
        """content + path + score, unweighted."""
        return self.content + self.path + self.score

    def heads(self) -> Mapping[str, float]:
        """The losses that are compared, by head, and their total."""
        return {"content": self.content, "path": self.path, "score": self.score, "total": self.total}


def mix_content(network: Array, prior: Array, weight: float) -> Array:
    """Geometric mixture: normalise((network + 1e-6)^(1 - weight) (prior + 1e-6)^weight), row by row.

    Args:
        network, prior: (..., 128) distributions. weight: 0 (the network alone, returned as it is) .. 1.

    Raises:
        EvaluationError: ``bad_range``, ``wrong_shape``.
    """
    if not 0.0 <= weight <= 1.0:
        raise EvaluationError(f"the mixture's weight must lie in 0..1, not {weight}", code="bad_range")
    if network.shape != prior.shape:
        raise EvaluationError(f"network {network.shape} and prior {prior.shape} must have one shape", code="wrong_shape")
    if weight == 0.0:
        return network
    mixed = np.exp((1.0 - weight) * np.log(network + MIX_FLOOR) + weight * np.log(prior + MIX_FLOOR))
    return np.asarray((mixed / mixed.sum(axis=-1, keepdims=True)).astype(network.dtype))


def choose_mix(forecasts: Sequence[Forecast], samples: Sequence[Samples]) -> float:
    """The weight of ``MIX_WEIGHTS`` with the least content log loss over all samples; of equal ones the smallest.

    Args:
        forecasts, samples: of the curriculum's validation learners, one entry per learner.

    Raises:
        EvaluationError: ``no_samples``, ``wrong_shape``, ``not_finite``.
    """
    if len(forecasts) != len(samples):
        raise EvaluationError(f"{len(forecasts)} forecasts for the samples of {len(samples)} learners", code="wrong_shape")
    pairs = [(forecast, part) for forecast, part in zip(forecasts, samples, strict=True) if len(part)]
    if not pairs:
        raise EvaluationError("there are no samples to choose the mixture on", code="no_samples")
    loss = [
        math.fsum(class_losses(mix_content(f.content, s.content_prior, weight), s.content).sum() for f, s in pairs)
        for weight in MIX_WEIGHTS
    ]
    return MIX_WEIGHTS[int(np.argmin(loss))]


def learner_losses(key: str, forecast: Forecast, samples: Samples, mix: float) -> LearnerLosses:
    """Losses of one learner; pass the part of the samples that counts.

    Raises:
        EvaluationError: ``no_samples``, ``wrong_shape``, ``not_finite``.
    """
    _check_rows(forecast, samples)
    content = mix_content(forecast.content, samples.content_prior, mix)
    losses = LearnerLosses(
        key=key,
        samples=len(samples),
        content=float(class_losses(content, samples.content).mean()),
        path=float(class_losses(forecast.path, samples.path).mean()),
        score=_score_loss(forecast.difficulty_second, samples),
        content_top1=top_k(content, samples.content, 1),
        content_top5=top_k(content, samples.content, 5),
        path_top1=top_k(forecast.path, samples.path, 1),
        score_first=_score_loss(forecast.difficulty_first, samples),
    )
    if not math.isfinite(losses.total):
        raise EvaluationError(f"a loss of learner {key} is not finite", code="not_finite")
    return losses


def main_metrics(
    learners: Sequence[Evaluated], *, mix: float, share: float = TRAIN_SHARE, draws: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Figures of a main model on learners it never saw.

    Args:
        learners: with all their samples. Headline figures are over the later part of each (from ``share`` of the events
            on), pooled over samples; ``by_history`` is over all samples.
        mix: weight of the encoder's forecast in the mixture.

    Returns:
        ``metrics`` (content, difficulty, path; beside them content_mixed with its paired change against the network alone,
        difficulty_first, level_distance, target_success), ``evaluated_on`` and ``by_history``.

    Raises:
        EvaluationError: ``no_learners``, ``no_samples`` (nobody has a later part), ``wrong_shape``, ``not_finite``.
    """
    if not learners:
        raise EvaluationError("there are no learners to evaluate on", code="no_learners")
    for learner in learners:
        _check_shapes(learner)
    later = [_later(learner, share) for learner in learners]
    later = [learner for learner in later if len(learner.samples)]
    if not later:
        raise EvaluationError("no learner has samples in the later part", code="no_samples")
    pooled = _Pool.of(later)
    content = mix_content(pooled.content, pooled.prior, mix)
    difficulty = success_figures(success_at(pooled.second, pooled.level), pooled.score)
    metrics: dict[str, Any] = {
        "content": class_figures(pooled.content, pooled.label, 5),
        "difficulty": difficulty,
        "path": class_figures(pooled.path, pooled.path_label),
        "content_mixed": {
            **class_figures(content, pooled.label, 5),
            "weight": mix,
            "change": _mixture_change(later, mix, draws, seed),
        },
        "difficulty_first": success_figures(success_at(pooled.first, pooled.level), pooled.score),
        "level_distance": level_distance(pooled.second, pooled.level, pooled.score, pooled.expected_level),
        "target_success": target_success(pooled.second, pooled.level, pooled.score),
    }
    return {
        "metrics": metrics,
        "evaluated_on": {"learners": len(later), "samples": len(pooled.label)},
        "by_history": by_history(learners),
    }


def by_history(learners: Sequence[Evaluated]) -> dict[str, Any]:
    """Content (network alone) and success figures by events of history before the sample, over all samples.

    An empty bin has null figures; ``item_mean`` is there where every learner brings it.
    """
    pool = _Pool.of(learners)
    table: dict[str, Any] = {}
    for low, high in HISTORY_BINS:
        mask = (pool.position >= low) & (pool.position <= (math.inf if high is None else high))
        table[f"{low}+" if high is None else f"{low}-{high}"] = _history_figures(pool, mask)
    return table


@dataclass(frozen=True)
class _Pool:
    """Samples and forecasts of several learners one after the other."""

    content: FloatArray
    prior: FloatArray
    label: npt.NDArray[np.int64]
    path: FloatArray
    path_label: npt.NDArray[np.int64]
    first: Float64Array
    second: Float64Array
    level: Float64Array
    score: Float64Array
    position: npt.NDArray[np.int64]
    expected_level: Float64Array | None
    item_mean: Float64Array | None

    @classmethod
    def of(cls, learners: Sequence[Evaluated]) -> _Pool:
        samples, forecasts = [x.samples for x in learners], [x.forecast for x in learners]
        return cls(
            content=np.concatenate([x.content for x in forecasts]),
            prior=np.concatenate([x.content_prior for x in samples]),
            label=np.concatenate([x.content for x in samples]),
            path=np.concatenate([x.path for x in forecasts]),
            path_label=np.concatenate([x.path for x in samples]),
            first=np.concatenate([x.difficulty_first for x in forecasts]).astype(np.float64),
            second=np.concatenate([x.difficulty_second for x in forecasts]).astype(np.float64),
            level=np.concatenate([x.level for x in samples]).astype(np.float64),
            score=np.concatenate([x.score for x in samples]).astype(np.float64),
            position=np.concatenate([x.position for x in samples]),
            expected_level=_joined([x.expected_level for x in learners]),
            item_mean=_joined([x.item_mean for x in learners]),
        )


def _joined(parts: Sequence[Float64Array | None]) -> Float64Array | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present and len(present) == len(parts) else None


def _later(learner: Evaluated, share: float) -> Evaluated:
    mask = learner.samples.position >= share * learner.samples.events
    return Evaluated(
        key=learner.key,
        samples=learner.samples.take(mask),
        forecast=learner.forecast.take(mask),
        expected_level=None if learner.expected_level is None else learner.expected_level[mask],
        item_mean=None if learner.item_mean is None else learner.item_mean[mask],
    )


def _mixture_change(learners: Sequence[Evaluated], mix: float, draws: int, seed: int) -> dict[str, Any]:
    """Paired change of the content log loss from the network alone to the mixture."""
    alone = [learner_losses(x.key, x.forecast, x.samples, 0.0) for x in learners]
    mixed = [learner_losses(x.key, x.forecast, x.samples, mix) for x in learners]
    return paired_change(alone, mixed, draws=draws, seed=seed)["content"].to_json()


def _history_figures(pool: _Pool, mask: Mask) -> dict[str, Any]:
    n = int(mask.sum())
    empty: dict[str, float | None] = {"auc": None, "log_loss": None}
    figures: dict[str, Any] = {"samples": n, "content": {"top1": None, "log_loss": None}, "difficulty": empty}
    if n:
        probability = success_at(pool.second[mask], pool.level[mask])
        figures["content"] = class_figures(pool.content[mask], pool.label[mask])
        figures["difficulty"] = _success(probability, pool.score[mask])
    if pool.item_mean is not None:
        figures["item_mean"] = _success(pool.item_mean[mask], pool.score[mask]) if n else empty
    return figures


def _success(probability: Array, score: Array) -> dict[str, float | None]:
    return {"auc": roc_auc(probability, score), "log_loss": float(binary_losses(probability, score).mean())}


def _score_loss(probabilities: FloatArray, samples: Samples) -> float:
    return float(score_log_loss(probabilities.astype(np.float64), samples.level, samples.score).mean())


def _check_shapes(learner: Evaluated) -> None:
    if len(learner.samples):
        _check_rows(learner.forecast, learner.samples)
    for name in ("expected_level", "item_mean"):
        values = getattr(learner, name)
        if values is not None and values.shape != (len(learner.samples),):
            raise EvaluationError(f"{name} of learner {learner.key} needs one value per sample", code="wrong_shape")


def _check_rows(forecast: Forecast, samples: Samples) -> None:
    if not len(samples):
        raise EvaluationError("there are no samples to evaluate", code="no_samples")
    rows = {len(forecast.content), len(forecast.path), len(forecast.difficulty_first), len(forecast.difficulty_second)}
    if rows != {len(samples)}:
        raise EvaluationError(f"the forecast has {sorted(rows)} rows for {len(samples)} samples", code="wrong_shape")
    for name in ("difficulty_first", "difficulty_second"):
        if not np.all(np.isfinite(getattr(forecast, name))):
            raise EvaluationError(f"{name} must be finite", code="not_finite")
