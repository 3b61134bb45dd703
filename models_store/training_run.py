"""The Keras side of one training of the main model: epochs, evaluation, and state in and out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from aivo_core.network import CONTENT_HEAD, DIFFICULTY_HEAD, PATH_HEAD, NetworkSpec
from aivo_core.samples import Samples
from models_store import keras_network
from models_store.training_checkpoint import EpochRecord, TrainingState

STOP_CHECK_STEPS = 20
"""``should_stop`` is asked every so many steps."""

EVALUATION_ROWS = 2048


class TrainingError(ValueError):
    """A training that is refused or failed; ``code`` is stable, the message names the field and what is allowed."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class TrainingStopped(TrainingError):
    """``should_stop`` said so; the checkpoint of the last whole epoch stays."""

    def __init__(self, epoch: int) -> None:
        super().__init__(f"training was stopped in epoch {epoch}", code="stopped")
        self.epoch = epoch


class TrainingRun:
    """Network, optimiser, and the two functions, each traced once."""

    def __init__(
        self,
        *,
        spec: NetworkSpec,
        model: Any,
        learning_rate: float,
        batch_size: int,
        loss_weights: tuple[float, float, float],
        seed: int,
    ) -> None:
        import keras

        self._spec = spec
        self._model = model
        self._batch_size = batch_size
        self._loss_weights = loss_weights
        self._seed = seed
        self._variables = list(model.trainable_variables)
        self._optimiser = keras.optimizers.Adam(learning_rate)
        self._optimiser.build(self._variables)
        self._dropout = keras_network.dropout_states(self._model, self._spec)
        self._train_step, self._evaluate_step = self._compile()

    def initial_state(self) -> TrainingState:
        state = TrainingState(weights={}, best={}, optimiser=[], dropout={})
        self.store(state)
        return state

    def store(self, state: TrainingState) -> None:
        """Copy everything that training changes out of Keras."""
        state.weights = keras_network.read_weights(self._model, self._spec)
        state.dropout = {name: variable.numpy().copy() for name, variable in self._dropout.items()}
        self.store_optimiser(state)

    def store_optimiser(self, state: TrainingState) -> None:
        state.optimiser = [variable.numpy().copy() for variable in self._optimiser.variables]

    def restore(self, state: TrainingState) -> None:
        """Inverse of ``store``."""
        keras_network.write_weights(self._model, self._spec, state.weights)
        for variable, value in zip(self._optimiser.variables, state.optimiser, strict=True):
            variable.assign(value.astype(variable.dtype))
        for name, variable in self._dropout.items():
            variable.assign(state.dropout[name].astype(variable.dtype))

    def reduce_learning_rate(self, factor: float) -> None:
        rate = self._optimiser.learning_rate
        rate.assign(np.float32(rate.numpy() * np.float32(factor)))

    def epoch(self, training: Samples, validation: Samples, number: int, should_stop: Callable[[], bool]) -> EpochRecord:
        """Train on every row once, then evaluate."""
        started = time.perf_counter()
        learning_rate = float(self._optimiser.learning_rate.numpy())
        loss = self._train_epoch(training, number, should_stop)
        per_head = self._evaluate(validation)
        validation_loss = sum(w * value for w, value in zip(self._loss_weights, per_head, strict=True))
        _check_finite_loss(validation_loss, number, learning_rate)
        return EpochRecord(number, loss, validation_loss, per_head, learning_rate, time.perf_counter() - started)

    def _train_epoch(self, samples: Samples, number: int, should_stop: Callable[[], bool]) -> float:
        rows = 2 * len(samples)
        size = min(self._batch_size, rows)
        order = np.random.default_rng([self._seed, number]).permutation(rows)
        steps = -(-rows // size)
        # The last batch is filled up from the epoch's beginning: these rows take part in batch normalisation's statistics
        # as any others would, their losses do not count.
        order = np.resize(order, steps * size)
        batch = RowBatch(samples, size)
        total = 0.0
        for step in range(steps):
            if step % STOP_CHECK_STEPS == 0 and should_stop():
                raise TrainingStopped(number)
            real = min(size, rows - step * size)
            loss = float(self._train_step(*batch.gather(order[step * size : (step + 1) * size], real)).numpy())
            _check_finite_loss(loss, number, float(self._optimiser.learning_rate.numpy()))
            total += loss * real
        return total / rows

    def _evaluate(self, samples: Samples) -> tuple[float, float, float]:
        rows = 2 * len(samples)
        batch = RowBatch(samples, EVALUATION_ROWS)
        sums = np.zeros(3)
        for start in range(0, rows, EVALUATION_ROWS):
            index = np.arange(start, min(start + EVALUATION_ROWS, rows))
            sums += self._evaluate_step(*batch.gather(index, len(index))).numpy()
        content, difficulty, path = sums / (len(samples), rows, len(samples))
        return float(content), float(difficulty), float(path)

    def _compile(self) -> tuple[Any, Any]:
        """The training step, returning the loss, and the evaluation step, returning sums of losses per head (3,)."""
        import tensorflow as tf

        body = keras_network.body_of(self._model, self._spec)

        def sums(rows: Any, first: Any, counted: Any, labels: tuple[Any, Any, Any, Any], training: bool) -> Any:
            content, path, level, score = labels
            hidden = body(rows, training=training)
            content_losses = keras_network.class_losses(keras_network.head_logits(self._model, CONTENT_HEAD, hidden), content)
            path_losses = keras_network.class_losses(keras_network.head_logits(self._model, PATH_HEAD, hidden), path)
            difficulty = keras_network.head_logits(self._model, DIFFICULTY_HEAD, hidden)
            ordinal_losses = keras_network.ordinal_losses(difficulty, level, score)
            return tf.stack(
                [
                    tf.reduce_sum(content_losses * first * counted),
                    tf.reduce_sum(ordinal_losses * counted),
                    tf.reduce_sum(path_losses * first * counted),
                ]
            )

        def train(rows: Any, first: Any, counted: Any, *labels: Any) -> Any:
            first_rows, all_rows = tf.reduce_sum(first * counted), tf.reduce_sum(counted)
            with tf.GradientTape() as tape:
                means = tf.math.divide_no_nan(
                    sums(rows, first, counted, labels, True), tf.stack([first_rows, all_rows, first_rows])
                )
                loss = tf.reduce_sum(means * self._loss_weights)
            gradients = tape.gradient(loss, [variable.value for variable in self._variables])
            self._optimiser.apply(gradients, self._variables)
            return loss

        def evaluate(rows: Any, first: Any, counted: Any, *labels: Any) -> Any:
            return sums(rows, first, counted, labels, False)

        floats, integers = tf.TensorSpec((None,), tf.float32), tf.TensorSpec((None,), tf.int32)
        matrix = tf.TensorSpec((None, self._spec.input_dim), tf.float32)
        signature = [matrix, floats, floats, integers, integers, floats, floats]
        return keras_network.compiled(train, signature), keras_network.compiled(evaluate, signature)


class RowBatch:
    """Gathers rows of both passes into one reused buffer; row r < n is first-pass row r, row n + r second-pass row r."""

    def __init__(self, samples: Samples, size: int) -> None:
        self._samples = samples
        self._rows = np.empty((size, samples.first.shape[1]), dtype=np.float32)

    def gather(self, index: npt.NDArray[np.int64], real: int) -> tuple[Any, ...]:
        """Features, first-pass mask, mask of rows that count (the first ``real``), content, path, level and score.

        First-pass rows come first; the order within a batch means nothing.
        """
        n = len(self._samples)
        counted = np.arange(len(index)) < real
        by_pass = np.argsort(index >= n, kind="stable")
        index, counted = index[by_pass], counted[by_pass]
        split = int(np.count_nonzero(index < n))
        sample = np.where(index < n, index, index - n)
        rows = self._rows[: len(index)]
        np.take(self._samples.first, sample[:split], axis=0, out=rows[:split], mode="clip")
        np.take(self._samples.second, sample[split:], axis=0, out=rows[split:], mode="clip")
        return (
            rows,
            (np.arange(len(index)) < split).astype(np.float32),
            counted.astype(np.float32),
            self._samples.content[sample].astype(np.int32),
            self._samples.path[sample].astype(np.int32),
            self._samples.level[sample].astype(np.float32),
            self._samples.score[sample].astype(np.float32),
        )


def _check_finite_loss(loss: float, epoch: int, learning_rate: float) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"training diverged in epoch {epoch}: the loss is not finite; lower learning_rate ({learning_rate:g})",
            code="diverged",
        )
