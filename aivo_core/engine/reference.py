"""One learner's local training in NumPy: what the compiled engine is compared with, and what runs where it is not there.

Arithmetic is float32; the objective is in ``aivo_core.engine.contract``, its gradient is written out by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aivo_core.engine.contract import LearnerTask, LocalTrainingConfig
from aivo_core.engine.generator import drop_threshold, kept_scale, layer_key, uniform_words
from aivo_core.engine.passes import (
    ADAM_BETA_1,
    ADAM_BETA_2,
    ADAM_EPSILON,
    PRODUCT,
    PassOutcome,
    TrainingPass,
    bias_pass,
    level_classes,
    tail_pass,
)
from aivo_core.engine.tail import BlockPlace, HeadPlace, TailBase
from aivo_core.inference import trunk_features
from aivo_core.network import FloatArray
from aivo_core.ordinal import CLASSES, MIN_PROBABILITY, level_weights
from aivo_core.samples import Samples

Rows = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Learner:
    """One learner's data, trunk output and labels ready for batches; all (n, ...) in the order of the samples."""

    first: FloatArray
    second: FloatArray
    content: npt.NDArray[np.int64]
    path: npt.NDArray[np.int64]
    allowed: FloatArray
    score: FloatArray
    level_class: npt.NDArray[np.int64]

    @classmethod
    def of(cls, base: TailBase, samples: Samples) -> Learner:
        """Runs the trunk once over both passes."""
        features = trunk_features(base.trunk, np.concatenate([samples.first, samples.second]))
        return cls(
            first=features[: len(samples)],
            second=features[len(samples) :],
            content=samples.content.astype(np.int64),
            path=samples.path.astype(np.int64),
            allowed=level_weights(samples.level),
            score=samples.score.astype(np.float32),
            level_class=level_classes(samples.level),
        )


@dataclass
class Block:
    """What the backward pass needs of one block's forward pass."""

    inputs: FloatArray
    hidden: FloatArray
    kept: FloatArray | None


class TailTrainer:
    """The tail of one learner while it is trained; ``weights`` is the flat tail, changed in place."""

    def __init__(self, base: TailBase, config: LocalTrainingConfig, task: LearnerTask, objective: str) -> None:
        self._base = base
        self._both_passes = objective == PRODUCT
        self._config = config
        self._anchor = task.anchor_tail
        self.weights: FloatArray = task.start_tail.copy()
        self._gradient = np.zeros_like(self.weights)
        self._first_moment = np.zeros_like(self.weights)
        self._second_moment = np.zeros_like(self.weights)

    def step(self, learner: Learner, rows: Rows, key: int, number: int, size: np.float32) -> float:
        """One step of the tail pass; the objective before it."""
        count, layout = len(rows), self._base.layout
        class_heads = [(layout.content, learner.content[rows]), (layout.path, learner.path[rows])]
        features = learner.first[rows]
        if self._both_passes:
            features = np.concatenate([features, learner.second[rows]])
        else:
            class_heads.append((layout.difficulty, learner.level_class[rows]))
        hidden, blocks = self.forward(features, key, number)
        upstream = np.zeros_like(hidden)
        loss = self._ordinal_head(hidden, upstream, learner, rows) if self._both_passes else 0.0
        for head, labels in class_heads:
            loss += self._class_head(head, hidden[:count], upstream[:count], labels, count)
        self._backward(blocks, upstream)
        return float(loss) + self._update(size)

    def bias_step(self, learner: Learner, rows: Rows, key: int, number: int, size: np.float32, moments: FloatArray) -> float:
        """One step of the difficulty head's biases by Adam with ``moments`` (2, 10); the ordinal loss before it."""
        head = self._base.layout.difficulty
        hidden, _ = self.forward(learner.second[rows], key, number)
        losses, gradient = ordinal_gradient(self._logits(head, hidden), learner.allowed[rows], learner.score[rows])
        adam(self._vector(head.bias, head.units), gradient.mean(axis=0), moments[0], moments[1], size)
        return float(np.mean(losses, dtype=np.float64))

    def forward(self, features: FloatArray, key: int, number: int) -> tuple[FloatArray, list[Block]]:
        """Hidden blocks, dropout as the configuration says."""
        kept_blocks = []
        for layer, place in enumerate(self._base.layout.blocks):
            hidden = features @ self._kernel(place.kernel, place.rows, place.units)
            hidden += self._vector(place.bias, place.units)
            np.maximum(hidden, 0.0, out=hidden)
            scale = self._vector(place.gamma, place.units) * self._base.inverse_deviation[layer]
            shift = self._vector(place.beta, place.units) - self._base.mean[layer] * scale
            output = hidden * scale
            output += shift
            kept = self._kept(place, hidden.shape, layer_key(key, number, layer))
            if kept is not None:
                output *= kept
            kept_blocks.append(Block(features, hidden, kept))
            features = output
        return features, kept_blocks

    def _kept(self, place: BlockPlace, shape: tuple[int, ...], key: int, /) -> FloatArray | None:
        if not self._config.dropout or place.rate == 0.0:
            return None
        words = uniform_words(key, shape[0] * shape[1]).reshape(shape)
        return np.where(words >= np.uint32(drop_threshold(place.rate)), kept_scale(place.rate), np.float32(0.0))

    def _class_head(
        self, head: HeadPlace, hidden: FloatArray, upstream: FloatArray, labels: npt.NDArray[np.int64], count: int
    ) -> float:
        """Mean cross entropy; adds to ``upstream`` and writes the head's gradient."""
        logits = self._logits(head, hidden)
        everyone = np.arange(count)
        own = logits[everyone, labels]
        exponentials, total = _exponentials(logits)
        loss = np.sum(np.log(total[:, 0]) - own, dtype=np.float64)
        exponentials /= total
        exponentials[everyone, labels] -= np.float32(1.0)
        exponentials /= np.float32(count)
        self._head_backward(head, hidden, upstream, exponentials)
        return float(loss) / count

    def _ordinal_head(self, hidden: FloatArray, upstream: FloatArray, learner: Learner, rows: Rows) -> float:
        """Half the ordinal loss of each pass, as a mean over samples."""
        head, count = self._base.layout.difficulty, len(rows)
        allowed, score = np.tile(learner.allowed[rows], (2, 1)), np.tile(learner.score[rows], 2)
        losses, gradient = ordinal_gradient(self._logits(head, hidden), allowed, score)
        gradient *= np.float32(0.5 / count)
        self._head_backward(head, hidden, upstream, gradient)
        return 0.5 * float(np.sum(losses, dtype=np.float64)) / count

    def _logits(self, head: HeadPlace, hidden: FloatArray) -> FloatArray:
        """Shifted by a constant per row so that the largest is 0."""
        logits: FloatArray = hidden @ self._kernel(head.kernel, hidden.shape[1], head.units)
        logits += self._vector(head.bias, head.units)
        logits -= logits.max(axis=1, keepdims=True)
        return logits

    def _head_backward(self, head: HeadPlace, hidden: FloatArray, upstream: FloatArray, gradient: FloatArray) -> None:
        width = hidden.shape[1]
        np.dot(hidden.T, gradient, out=self._kernel(head.kernel, width, head.units, self._gradient))
        np.sum(gradient, axis=0, out=self._vector(head.bias, head.units, self._gradient))
        upstream += gradient @ self._kernel(head.kernel, width, head.units).T

    def _backward(self, blocks: list[Block], upstream: FloatArray) -> None:
        for layer in range(len(blocks) - 1, -1, -1):
            place, block = self._base.layout.blocks[layer], blocks[layer]
            if block.kept is not None:
                upstream *= block.kept
            inverse = self._base.inverse_deviation[layer]
            np.sum(upstream, axis=0, out=self._vector(place.beta, place.units, self._gradient))
            centred = (block.hidden - self._base.mean[layer]) * upstream
            np.multiply(centred.sum(axis=0), inverse, out=self._vector(place.gamma, place.units, self._gradient))
            upstream *= self._vector(place.gamma, place.units) * inverse
            upstream *= block.hidden > 0.0
            np.sum(upstream, axis=0, out=self._vector(place.bias, place.units, self._gradient))
            np.dot(block.inputs.T, upstream, out=self._kernel(place.kernel, place.rows, place.units, self._gradient))
            if layer:
                upstream = upstream @ self._kernel(place.kernel, place.rows, place.units).T

    def _update(self, size: np.float32) -> float:
        """One optimiser step with the proximal term; that term before the step."""
        mu = np.float32(self._config.proximal_mu)
        term = 0.0
        if mu > 0.0:
            distance = self.weights - self._anchor
            term = 0.5 * float(mu) * float(np.dot(distance, distance))
            distance *= mu
            self._gradient += distance
        if self._config.optimiser == "adam":
            adam(self.weights, self._gradient, self._first_moment, self._second_moment, size)
        else:
            self._first_moment *= np.float32(self._config.momentum)
            self._gradient *= size
            self._first_moment -= self._gradient
            self.weights += self._first_moment
        return term

    def _kernel(self, start: int, rows: int, units: int, flat: FloatArray | None = None) -> FloatArray:
        source = self.weights if flat is None else flat
        return source[start : start + rows * units].reshape(rows, units)

    def _vector(self, start: int, units: int, flat: FloatArray | None = None) -> FloatArray:
        source = self.weights if flat is None else flat
        return source[start : start + units]


def train_learner(base: TailBase, config: LocalTrainingConfig, task: LearnerTask, objective: str = PRODUCT) -> PassOutcome:
    """Both passes of one learner's checked task."""
    with np.errstate(all="ignore"):  # a learner who diverges is told so by what comes out
        learner = Learner.of(base, task.samples)
        trainer = TailTrainer(base, config, task, objective)
        tail_training, bias_training = tail_pass(config, task), bias_pass(config, task)
        tail_losses = _run_tail_pass(trainer, learner, tail_training)
        after_tail_pass = trainer.weights.copy()
        bias_losses = _run_bias_pass(trainer, learner, bias_training)
    steps = sum(training.steps for training in (tail_training, bias_training) if training)
    return PassOutcome(trainer.weights, after_tail_pass, tail_losses, bias_losses, steps)


def _run_tail_pass(trainer: TailTrainer, learner: Learner, training: TrainingPass | None) -> tuple[float, ...]:
    if training is None:
        return ()
    steps = enumerate(zip(training.batches(), training.step_sizes, strict=True))
    losses = [trainer.step(learner, rows, training.key, number, size) for number, (rows, size) in steps]
    return training.plan.epoch_means(np.array(losses, dtype=np.float32))


def _run_bias_pass(trainer: TailTrainer, learner: Learner, training: TrainingPass | None) -> tuple[float, ...]:
    if training is None:
        return ()
    moments = np.zeros((2, CLASSES), dtype=np.float32)
    steps = enumerate(zip(training.batches(), training.step_sizes, strict=True))
    losses = [trainer.bias_step(learner, rows, training.key, number, size, moments) for number, (rows, size) in steps]
    return training.plan.epoch_means(np.array(losses, dtype=np.float32))


def ordinal_gradient(logits: FloatArray, allowed: FloatArray, score: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Ordinal losses per row and their gradient by the logits (``aivo_core.ordinal.score_log_loss``).

    Args:
        logits, allowed: (n, 10) float32, ``allowed`` from ``level_weights``. score: (n,).

    Returns:
        (n,) and (n, 10); the gradient is 0 where the chance of success is clipped.
    """
    probabilities, total = _exponentials(logits - logits.max(axis=1, keepdims=True))
    probabilities /= total
    success = np.sum(probabilities * allowed, axis=1)
    low, high = np.float32(MIN_PROBABILITY), np.float32(1.0 - MIN_PROBABILITY)
    clipped = np.clip(success, low, high)
    failure = np.float32(1.0) - clipped
    losses: FloatArray = -(score * np.log(clipped) + (np.float32(1.0) - score) * np.log1p(-clipped))
    slope = np.where(clipped == success, (np.float32(1.0) - score) / failure - score / clipped, np.float32(0.0))
    slope = np.where(np.isnan(success), success, slope)
    gradient: FloatArray = probabilities * (allowed - success[:, None]) * slope[:, None]
    return losses, gradient


def adam(weights: FloatArray, gradient: FloatArray, first: FloatArray, second: FloatArray, size: np.float32) -> None:
    """One step of Adam as Keras defines it, in place; ``size`` from ``adam_step_sizes``; ``gradient`` is used up."""
    first += (gradient - first) * np.float32(1.0 - ADAM_BETA_1)
    np.square(gradient, out=gradient)
    gradient -= second
    gradient *= np.float32(1.0 - ADAM_BETA_2)
    second += gradient
    denominator = np.sqrt(second)
    denominator += np.float32(ADAM_EPSILON)
    weights -= first * size / denominator


def _exponentials(shifted: FloatArray) -> tuple[FloatArray, FloatArray]:
    """exp in place of its argument, and its sums per row."""
    np.exp(shifted, out=shifted)
    return shifted, shifted.sum(axis=1, keepdims=True)
