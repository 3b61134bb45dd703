"""Clipped sums of private training in NumPy, as ``aivo_core.engine.reference`` is of plain training.

No sample's gradient is ever laid out. The gradient of a kernel by one sample is a sum of two outer products, a1 d1' + a2 d2'
(input and error of its first- and second-pass row), so that its squared norm is

    |a1|^2 |d1|^2 + |a2|^2 |d2|^2 + 2 (a1 . a2) (d1 . d2)

(Goodfellow 2015, "Efficient Per-Example Gradient Computations", for one row). With a 1 appended to the inputs it takes in the
biases as well. Once all errors of a sample have been scaled, the sum is the matrix product of plain training.
"""

from __future__ import annotations

import numpy as np

from aivo_core.engine.contract import LearnerTask, LocalTrainingConfig
from aivo_core.engine.generator import drop_threshold, kept_scale, layer_keys, uniform_rows
from aivo_core.engine.passes import PRODUCT
from aivo_core.engine.private import CLIP_ALLOWANCE, SQUARE_ALLOWANCE, Keys, Rows
from aivo_core.engine.reference import Block, Learner, TailTrainer, ordinal_gradient
from aivo_core.engine.tail import BlockPlace, HeadPlace, TailBase
from aivo_core.network import FloatArray
from aivo_core.privacy import DoubleArray


class NumpyPrivateTail(TailTrainer):
    """``PrivateTail`` in NumPy."""

    def __init__(self, base: TailBase, config: LocalTrainingConfig, task: LearnerTask) -> None:
        super().__init__(base, config, task, PRODUCT)
        self._learner = Learner.of(base, task.samples)
        self._clip_norm = float(config.sample_clip_norm or 0.0)
        self._keys: Keys = np.zeros(0, dtype=np.uint64)

    def clipped_sum(self, rows: Rows, keys: Keys) -> None:
        self._gradient[:] = 0.0
        if len(rows) == 0:
            return
        self._keys = keys
        hidden, blocks = self.forward(np.concatenate([self._learner.first[rows], self._learner.second[rows]]), 0, 0)
        heads = self._head_errors(hidden, rows)
        norms = SampleNorms(len(rows))
        arriving = self._arriving(hidden, heads, blocks, norms)
        factors = norms.factors(self._clip_norm)
        for errors in (*(errors for _, errors in heads), *arriving):
            _scale(errors, factors)
        for inputs in (hidden, *(part for block in blocks for part in (block.inputs, block.hidden))):
            inputs[np.resize(factors, len(inputs)) == 0.0] = 0.0  # 0 times what is not finite would be NaN
        for head, errors in heads:
            np.dot(hidden[: len(errors)].T, errors, out=self._kernel(head.kernel, hidden.shape[1], head.units, self._gradient))
            np.sum(errors, axis=0, out=self._vector(head.bias, head.units, self._gradient))
        for layer, errors in enumerate(arriving):
            self._sum_block(layer, blocks[layer], errors)

    def noised_step(self, noise: DoubleArray, expected: int, size: np.float32) -> None:
        self._gradient[:] = (self._gradient + noise) / expected
        self._update(size)

    def tail(self) -> FloatArray:
        return self.weights.copy()

    def last_sum(self) -> FloatArray:
        """(tail_size,) float32, a copy of the last clipped sum; no more after a step."""
        return self._gradient.copy()

    def _kept(self, place: BlockPlace, shape: tuple[int, ...], _key: int, /) -> FloatArray | None:
        """As in plain training, but by each sample's own key and its pass."""
        if not self._config.dropout or place.rate == 0.0:
            return None
        layer = self._base.layout.blocks.index(place)
        keys = np.concatenate([layer_keys(self._keys, one_pass, layer) for one_pass in range(2)])
        dropped = uniform_rows(keys, shape[1]) < np.uint32(drop_threshold(place.rate))
        return np.where(dropped, np.float32(0.0), kept_scale(place.rate))

    def _head_errors(self, hidden: FloatArray, rows: Rows) -> list[tuple[HeadPlace, FloatArray]]:
        """Each head with the gradient of the samples' objectives by its logits; content and path see first rows alone."""
        layout, learner, count = self._base.layout, self._learner, len(rows)
        heads = []
        for head, labels in ((layout.content, learner.content[rows]), (layout.path, learner.path[rows])):
            errors = np.exp(self._logits(head, hidden[:count]))
            errors /= errors.sum(axis=1, keepdims=True)
            errors[np.arange(count), labels] -= np.float32(1.0)
            heads.append((head, errors))
        allowed, score = np.tile(learner.allowed[rows], (2, 1)), np.tile(learner.score[rows], 2)
        _losses, errors = ordinal_gradient(self._logits(layout.difficulty, hidden), allowed, score)
        return [*heads, (layout.difficulty, errors * np.float32(0.5))]

    def _arriving(
        self, hidden: FloatArray, heads: list[tuple[HeadPlace, FloatArray]], blocks: list[Block], norms: SampleNorms
    ) -> list[FloatArray]:
        """What arrives at each block's normalisation from above; ``norms`` gets everything on the way."""
        upstream = np.zeros_like(hidden)
        for head, errors in heads:
            norms.add_product(hidden[: len(errors)], errors)
            upstream[: len(errors)] += errors @ self._kernel(head.kernel, hidden.shape[1], head.units).T
        arriving = []
        for layer in range(len(blocks) - 1, -1, -1):
            place, block, inverse = self._base.layout.blocks[layer], blocks[layer], self._base.inverse_deviation[layer]
            if block.kept is not None:
                upstream *= block.kept
            arriving.append(upstream)
            norms.add_vector(upstream)
            norms.add_vector((block.hidden - self._base.mean[layer]) * upstream * inverse)
            errors = upstream * (self._vector(place.gamma, place.units) * inverse) * (block.hidden > 0.0)
            norms.add_product(block.inputs, errors)
            upstream = errors @ self._kernel(place.kernel, place.rows, place.units).T
        return arriving[::-1]

    def _sum_block(self, layer: int, block: Block, errors: FloatArray) -> None:
        place, inverse = self._base.layout.blocks[layer], self._base.inverse_deviation[layer]
        np.sum(errors, axis=0, out=self._vector(place.beta, place.units, self._gradient))
        centred = (block.hidden - self._base.mean[layer]) * errors
        np.multiply(centred.sum(axis=0), inverse, out=self._vector(place.gamma, place.units, self._gradient))
        errors = errors * (self._vector(place.gamma, place.units) * inverse) * (block.hidden > 0.0)
        np.sum(errors, axis=0, out=self._vector(place.bias, place.units, self._gradient))
        np.dot(block.inputs.T, errors, out=self._kernel(place.kernel, place.rows, place.units, self._gradient))


class SampleNorms:
    """Squared norms of ``count`` samples' gradients, added up tensor by tensor in double precision.

    A sample's rows are number i of the first ``count`` and, where there are as many again, number ``count`` + i.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._squares = np.zeros(count)
        self._apart = np.zeros(count)

    def add_product(self, inputs: FloatArray, errors: FloatArray) -> None:
        """A kernel and its biases: (rows, k) inputs and (rows, units) errors."""
        left, right = inputs.astype(np.float64), errors.astype(np.float64)
        own = (np.sum(left * left, axis=1) + 1.0) * np.sum(right * right, axis=1)
        self._apart += own.reshape(-1, self._count).sum(axis=0)
        self._squares += own.reshape(-1, self._count).sum(axis=0)
        if len(errors) > self._count:
            between = [np.sum(x[: self._count] * x[self._count :], axis=1) for x in (left, right)]
            self._squares += 2.0 * (between[0] + 1.0) * between[1]

    def add_vector(self, gradients: FloatArray) -> None:
        """A vector of weights: (2 count, units), what each row adds to its gradient."""
        rows = gradients.astype(np.float64).reshape(2, self._count, -1)
        self._apart += np.sum(rows * rows, axis=(0, 2))
        self._squares += np.sum(np.square(rows.sum(axis=0)), axis=1)

    def factors(self, clip_norm: float) -> FloatArray:
        """(count,) what clips each sample's gradient to ``clip_norm``; 0 where it is not finite."""
        squares = np.maximum(self._squares, 0.0) + SQUARE_ALLOWANCE * self._apart
        bounds = np.sqrt(squares) + CLIP_ALLOWANCE * np.sqrt(2.0 * self._apart)
        factors = np.where(bounds <= clip_norm, 1.0, clip_norm / bounds)
        return np.where(np.isfinite(bounds), factors, 0.0).astype(np.float32)


def _scale(errors: FloatArray, factors: FloatArray) -> None:
    by_row = np.resize(factors, len(errors))
    errors *= by_row[:, None]
    errors[by_row == 0.0] = 0.0
