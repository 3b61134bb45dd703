"""What every local training engine does alike: the checks of a task and the order of its batches.

Two engines that share these differ only in their arithmetic, so that one can be compared with the other step by step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aivo_core.engine.contract import EngineError, LearnerTask, LocalTrainingConfig
from aivo_core.network import CONTENT_HEAD, PATH_HEAD, FloatArray, NetworkSpec
from aivo_core.samples import Samples

TAIL_PASS = 0
BIAS_PASS = 1
DROPOUT_STREAM = 2


@dataclass(frozen=True)
class BatchPlan:
    """All batches of one pass, padded to one size.

    Attributes:
        index: (steps, batch_size) int32, sample numbers; a place without a sample repeats sample 0.
        mask: (steps, batch_size) float32, 1 for a sample, 0 for padding.
        epoch: (steps,) int64, counted from 0.
    """

    index: npt.NDArray[np.int32]
    mask: npt.NDArray[np.float32]
    epoch: npt.NDArray[np.int64]

    def epoch_means(self, losses: npt.NDArray[np.float32]) -> tuple[float, ...]:
        """Mean per sample and epoch of batch means (steps,): a short last batch counts by its samples."""
        sizes = self.mask.sum(axis=1, dtype=np.float64)
        total = np.bincount(self.epoch, weights=losses.astype(np.float64) * sizes)
        return tuple(float(value) for value in total / np.bincount(self.epoch, weights=sizes))


def plan_batches(*, samples: int, batch_size: int, epochs: int, seed: int, training_pass: int) -> BatchPlan:
    """A seeded permutation per epoch, cut into batches; depends on the arguments only.

    Args:
        samples: at least 1.
        seed: the learner's, at least 0.
        training_pass: ``TAIL_PASS`` or ``BIAS_PASS``; the passes draw from different streams.
    """
    steps = -(-samples // batch_size)
    index = np.zeros((epochs, steps * batch_size), dtype=np.int32)
    for epoch in range(epochs):
        index[epoch, :samples] = np.random.default_rng([seed, training_pass, epoch]).permutation(samples)
    mask = np.zeros((epochs, steps * batch_size), dtype=np.float32)
    mask[:, :samples] = 1.0
    return BatchPlan(
        index=index.reshape(epochs * steps, batch_size),
        mask=mask.reshape(epochs * steps, batch_size),
        epoch=np.repeat(np.arange(epochs), steps),
    )


def plan_tail_pass(config: LocalTrainingConfig, task: LearnerTask) -> BatchPlan:
    """The batches of the pass over the whole tail."""
    return _plan(config, task, config.epochs, TAIL_PASS)


def plan_bias_pass(config: LocalTrainingConfig, task: LearnerTask) -> BatchPlan:
    """The batches of the pass over the difficulty head's biases."""
    return _plan(config, task, config.bias_epochs, BIAS_PASS)


def _plan(config: LocalTrainingConfig, task: LearnerTask, epochs: int, training_pass: int) -> BatchPlan:
    return plan_batches(
        samples=len(task.samples),
        batch_size=config.batch_size,
        epochs=epochs,
        seed=task.seed,
        training_pass=training_pass,
    )


def check_task(spec: NetworkSpec, task: LearnerTask) -> None:
    """Check one learner's task before any arithmetic.

    Raises:
        EngineError: with code ``no_samples``, ``wrong_shape``, ``not_finite``, ``bad_labels`` or ``bad_seed``; the message
            names the field.
    """
    if task.seed < 0:
        raise EngineError(f"seed must be 0 or more, not {task.seed}", code="bad_seed")
    _check_tails(spec, task)
    check_samples(spec, task.samples)


def check_samples(spec: NetworkSpec, samples: Samples) -> None:
    """Check that there are samples, that their features fit the network and are finite, and that labels are classes of it.

    Raises:
        EngineError: with code ``no_samples``, ``wrong_shape``, ``not_finite`` or ``bad_labels``; the message names the field.
    """
    if len(samples) == 0:
        raise EngineError("samples is empty: there is nothing to train on", code="no_samples")
    _check_features(spec, samples)
    _check_labels(spec, samples)


def _check_tails(spec: NetworkSpec, task: LearnerTask) -> None:
    for name, tail in (("start_tail", task.start_tail), ("anchor_tail", task.anchor_tail)):
        if tail.shape != (spec.tail_size,) or tail.dtype != np.float32:
            raise EngineError(
                f"{name} must be float32 of shape ({spec.tail_size},), not {tail.dtype} {tail.shape}", code="wrong_shape"
            )
        if not np.isfinite(tail).all():
            raise EngineError(f"{name} holds a number that is not finite", code="not_finite")


def _check_features(spec: NetworkSpec, samples: Samples) -> None:
    expected = (len(samples), spec.input_dim)
    for name, rows in (("first", samples.first), ("second", samples.second)):
        if rows.shape != expected or rows.dtype != np.float32:
            raise EngineError(f"{name} must be float32 of shape {expected}, not {rows.dtype} {rows.shape}", code="wrong_shape")
        if not np.isfinite(rows).all():
            raise EngineError(f"{name} holds a number that is not finite", code="not_finite")


def _check_labels(spec: NetworkSpec, samples: Samples) -> None:
    units = {head.name: head.units for head in spec.heads}
    expected = (len(samples),)
    for name in ("content", "path", "level", "score"):
        if getattr(samples, name).shape != expected:
            raise EngineError(f"{name} must have shape {expected}, not {getattr(samples, name).shape}", code="wrong_shape")
    for name, classes in (("content", units.get(CONTENT_HEAD, 0)), ("path", units.get(PATH_HEAD, 0))):
        labels = getattr(samples, name)
        if labels.dtype.kind not in "iu":
            raise EngineError(f"{name} must be integers, not {labels.dtype}", code="bad_labels")
        if labels.min() < 0 or labels.max() >= classes:
            raise EngineError(f"{name} must lie in 0..{classes - 1}; found {labels.min()}..{labels.max()}", code="bad_labels")
    for name, top in (("level", 10.0), ("score", 1.0)):
        values = getattr(samples, name)
        if not (np.isfinite(values).all() and values.min() >= 0.0 and values.max() <= top):
            raise EngineError(f"{name} must lie in [0, {top:g}]; found {values.min()}..{values.max()}", code="bad_labels")


def check_finite(tail: FloatArray, losses: tuple[float, ...], rate: float, field: str) -> None:
    """Check what a pass has made of a tail.

    Raises:
        EngineError: ``diverged``: the tail or a loss is not finite; the message names the learning rate's ``field``.
    """
    if not (np.isfinite(tail).all() and np.isfinite(losses).all()):
        raise EngineError(f"training diverged: the loss or the tail is not finite; lower {field} ({rate:g})", code="diverged")
