"""The network's forward pass in NumPy, batch normalisation folded into the layer after it.

A block is ``Dense -> ReLU -> BatchNorm``; in inference the normalisation is ``scale * h + shift`` per unit, and the layer
after it, ``W.T (scale * h + shift) + b``, equals ``(scale W).T h + (b + W.T shift)``. Dropout does nothing. The trunk is
folded once per main version, a tail per learner: the trunk's last normalisation folds into the tail's first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from aivo_core.network import (
    BATCH_NORM_EPSILON,
    CONTENT_HEAD,
    DIFFICULTY_HEAD,
    PATH_HEAD,
    FloatArray,
    NetworkError,
    NetworkSpec,
    TensorSpec,
    Weights,
    block_layers,
    check_weights,
)

_Double = npt.NDArray[np.float64]


@dataclass(frozen=True)
class HeadOutputs:
    """Probabilities of the three heads, one row per input row.

    Attributes:
        content: (n, content units) float32, for the next category.
        difficulty: (n, 10) float32, of the attained level (``aivo_core.ordinal`` reads it).
        path: (n, path units) float32, for the kind of step.
    """

    content: FloatArray
    difficulty: FloatArray
    path: FloatArray


@dataclass(frozen=True)
class _Layer:
    kernel: FloatArray
    bias: FloatArray

    def __call__(self, x: FloatArray) -> FloatArray:
        result: FloatArray = x @ self.kernel
        result += self.bias
        return result


@dataclass(frozen=True)
class FoldedTrunk:
    """The frozen blocks, up to the last ReLU; its normalisation belongs to the tail folded on top.

    Attributes:
        input_dim, units: width of what goes in and of what comes out.
        scale, shift: (units,) float32, the last block's normalisation, for ``trunk_features``.
    """

    input_dim: int
    units: int
    layers: tuple[_Layer, ...]
    scale: FloatArray
    shift: FloatArray

    def activations(self, x: FloatArray) -> FloatArray:
        """What a ``FoldedTail`` takes: float32 (n, input_dim) -> (n, units).

        Raises:
            NetworkError: ``wrong_shape`` or ``wrong_dtype``.
        """
        _check_rows("x", x, self.input_dim)
        for layer in self.layers:
            x = _relu(layer(x))
        return x


@dataclass(frozen=True)
class FoldedTail:
    """A tail on top of the trunk it was folded for: hidden layers, then all heads as one layer."""

    units: int
    layers: tuple[_Layer, ...]
    heads: _Layer
    slices: tuple[slice, slice, slice]

    def forward(self, activations: FloatArray) -> HeadOutputs:
        """Probabilities from ``FoldedTrunk.activations``: float32 (n, units) -> n rows per head.

        Raises:
            NetworkError: ``wrong_shape`` or ``wrong_dtype``.
        """
        _check_rows("activations", activations, self.units)
        hidden = activations
        for layer in self.layers:
            hidden = _relu(layer(hidden))
        logits = self.heads(hidden)
        content, difficulty, path = (_softmax(logits[:, part]) for part in self.slices)
        return HeadOutputs(content, difficulty, path)

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(layer.kernel.nbytes + layer.bias.nbytes for layer in (*self.layers, self.heads))


@dataclass(frozen=True)
class FoldedNetwork:
    """Trunk and tail together."""

    trunk: FoldedTrunk
    tail: FoldedTail

    def forward(self, x: FloatArray) -> HeadOutputs:
        """Probabilities of the heads: float32 (n, input_dim) -> n rows per head.

        Raises:
            NetworkError: ``wrong_shape`` or ``wrong_dtype``.
        """
        return self.tail.forward(self.trunk.activations(x))

    def with_tail(self, tail: FoldedTail) -> FoldedNetwork:
        """The same trunk under another tail.

        Raises:
            NetworkError: ``wrong_shape``: the tail was folded for a trunk of another width.
        """
        if tail.units != self.trunk.units:
            raise NetworkError(f"tail must stand on {self.trunk.units} units, not {tail.units}", code="wrong_shape")
        return FoldedNetwork(self.trunk, tail)


def fold(spec: NetworkSpec, weights: Weights) -> FoldedNetwork:
    """Fold a whole network, its own tail included.

    Raises:
        NetworkError: a tensor is missing or wrong, a moving variance is negative, or the heads are not the three known ones.
    """
    check_weights(weights, spec.tensors)
    return FoldedNetwork(fold_trunk(spec, weights), fold_tail(spec, weights, spec.flatten_tail(weights)))


def fold_trunk(spec: NetworkSpec, weights: Weights) -> FoldedTrunk:
    """Fold the frozen blocks of a main version; with none frozen, the trunk hands its input on.

    Raises:
        NetworkError: a trunk tensor is missing or wrong, or a moving variance is negative.
    """
    frozen = spec.frozen_blocks
    check_weights(weights, (tensor for index in range(1, frozen + 1) for tensor in spec.block_tensors(index)))
    layers = tuple(_fold_dense(weights, block_layers(i)[0], _norm_before(spec, weights, i)) for i in range(1, frozen + 1))
    scale, shift = _norm_before(spec, weights, frozen + 1)
    return FoldedTrunk(spec.input_dim, spec.feature_dim, layers, scale.astype(np.float32), shift.astype(np.float32))


def fold_tail(spec: NetworkSpec, weights: Weights, tail: FloatArray) -> FoldedTail:
    """Fold a learner's tail.

    Args:
        weights: the base main version's: its last trunk block and its moving statistics are read, its own tail is not.
        tail: (tail_size,) float32, the learner's.

    Raises:
        NetworkError: a wrong tail or tensor, a negative moving variance, or heads that are not the three known ones.
    """
    slices = _head_slices(spec)
    replaced = spec.with_tail(weights, tail)
    check_weights(replaced, _absorbed_norms(spec))
    blocks = range(spec.frozen_blocks + 1, len(spec.hidden_layers) + 1)
    layers = tuple(_fold_dense(replaced, block_layers(i)[0], _norm_before(spec, replaced, i)) for i in blocks)
    before_heads = _norm_before(spec, replaced, len(spec.hidden_layers) + 1)
    heads = [_fold_dense(replaced, head.name, before_heads) for head in spec.heads]
    together = _Layer(np.concatenate([h.kernel for h in heads], axis=1), np.concatenate([h.bias for h in heads]))
    return FoldedTail(spec.feature_dim, layers, together, slices)


@dataclass(frozen=True)
class EachOutputs:
    """As ``HeadOutputs``, of many tails: (tails, rows, units of the head) float32 each, made when they are asked for."""

    logits: FloatArray
    slices: tuple[slice, slice, slice]

    @cached_property
    def content(self) -> FloatArray:
        return _softmax(self.logits[..., self.slices[0]])

    @cached_property
    def difficulty(self) -> FloatArray:
        return _softmax(self.logits[..., self.slices[1]])

    @cached_property
    def path(self) -> FloatArray:
        return _softmax(self.logits[..., self.slices[2]])


def forward_each(tails: Sequence[FoldedTail], activations: FloatArray) -> EachOutputs:
    """Every tail on rows of its own, in one pass over the tails' memory.

    Args:
        tails: n, folded for one network.
        activations: (n, rows, units) float32, of the trunk they stand on.

    Raises:
        NetworkError: ``wrong_shape`` or ``wrong_dtype``; ``bad_network`` for tails of different networks.
    """
    if not tails or activations.ndim != 3 or len(activations) != len(tails):
        raise NetworkError(
            f"activations must have shape (tails, rows, units) for at least one tail, not {activations.shape} for {len(tails)}",
            code="wrong_shape",
        )
    first = tails[0]
    _check_rows("activations", activations[0], first.units)
    for tail in tails:
        if tail.slices != first.slices or tail.units != first.units or len(tail.layers) != len(first.layers):
            raise NetworkError("tails of different networks cannot be computed together", code="bad_network")
    hidden = activations
    for layers in zip(*(tail.layers for tail in tails), strict=True):
        hidden = _relu(_each_layer(layers, hidden))
    return EachOutputs(_each_layer([tail.heads for tail in tails], hidden), first.slices)


def _each_layer(layers: Sequence[_Layer], x: FloatArray) -> FloatArray:
    """(n, rows, k) through n layers; the biases are added to all at once, which spares a call per layer."""
    result = np.empty((*x.shape[:2], len(layers[0].bias)), dtype=np.float32)
    for rows, layer, out in zip(x, layers, result, strict=True):
        np.dot(rows, layer.kernel, out=out)
    result += np.array([layer.bias for layer in layers])[:, None]
    return result


def trunk_features(trunk: FoldedTrunk, x: FloatArray) -> FloatArray:
    """The trunk's exact output, its last normalisation applied: what a tail is trained on.

    Args:
        x: (n, input_dim) float32.

    Returns:
        (n, feature_dim) float32.

    Raises:
        NetworkError: ``wrong_shape`` or ``wrong_dtype``.
    """
    features: FloatArray = trunk.activations(x) * trunk.scale + trunk.shift
    return features


def blend(main_tail: FloatArray, tail: FloatArray, b: float) -> FloatArray:
    """``main + b (tail - main)`` on raw tails (folding is not linear); b = 0 is main and b = 1 the tail, bit for bit.

    Args:
        main_tail, tail: float32 of one shape.
        b: in [0, 1].

    Raises:
        NetworkError: ``wrong_shape``, ``wrong_dtype``, or ``bad_blend`` for b outside [0, 1].
    """
    if main_tail.ndim != 1 or main_tail.shape != tail.shape:
        raise NetworkError(
            f"main_tail and tail must be flat and of one length, not {main_tail.shape} and {tail.shape}", code="wrong_shape"
        )
    if main_tail.dtype != np.float32 or tail.dtype != np.float32:
        raise NetworkError(f"main_tail and tail must be float32, not {main_tail.dtype} and {tail.dtype}", code="wrong_dtype")
    if not 0.0 <= b <= 1.0:
        raise NetworkError(f"b must lie in [0, 1], not {b}", code="bad_blend")
    if b in (0.0, 1.0):
        return (tail if b else main_tail).copy()
    return main_tail + np.float32(b) * (tail - main_tail)


def _absorbed_norms(spec: NetworkSpec) -> list[TensorSpec]:
    """Normalisation tensors that the tail's layers absorb: of the trunk's last block and of the tail's own blocks."""
    blocks = range(max(spec.frozen_blocks, 1), len(spec.hidden_layers) + 1)
    return [t for i in blocks for t in spec.block_tensors(i) if t.name.startswith(f"{block_layers(i)[1]}/")]


def _norm_before(spec: NetworkSpec, weights: Weights, index: int) -> tuple[_Double, _Double]:
    """Scale and shift of the normalisation whose output goes into layer ``index`` (the heads count as one more)."""
    if index == 1:
        return np.ones(spec.input_dim), np.zeros(spec.input_dim)
    norm = block_layers(index - 1)[1]
    variance = weights[f"{norm}/moving_variance"].astype(np.float64)
    if not (variance >= 0.0).all():
        raise NetworkError(f"{norm}/moving_variance must be 0 or more everywhere", code="bad_statistics")
    scale = weights[f"{norm}/gamma"] / np.sqrt(variance + BATCH_NORM_EPSILON)
    return scale, weights[f"{norm}/beta"] - weights[f"{norm}/moving_mean"] * scale


def _fold_dense(weights: Weights, layer: str, norm: tuple[_Double, _Double]) -> _Layer:
    scale, shift = norm
    kernel = weights[f"{layer}/kernel"].astype(np.float64)
    bias = weights[f"{layer}/bias"] + shift @ kernel
    return _Layer((scale[:, None] * kernel).astype(np.float32), bias.astype(np.float32))


def _head_slices(spec: NetworkSpec) -> tuple[slice, slice, slice]:
    """Columns of the content, difficulty and path head among all heads side by side."""
    found: dict[str, slice] = {}
    start = 0
    for head in spec.heads:
        found[head.name] = slice(start, start + head.units)
        start += head.units
    if set(found) != {CONTENT_HEAD, DIFFICULTY_HEAD, PATH_HEAD}:
        raise NetworkError(
            f"heads must be {CONTENT_HEAD}, {DIFFICULTY_HEAD} and {PATH_HEAD}, not {', '.join(found)}", code="bad_network"
        )
    return found[CONTENT_HEAD], found[DIFFICULTY_HEAD], found[PATH_HEAD]


def _relu(fresh: FloatArray) -> FloatArray:
    """In place."""
    np.maximum(fresh, 0.0, out=fresh)
    return fresh


def _softmax(logits: FloatArray) -> FloatArray:
    shifted: FloatArray = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shifted /= shifted.sum(axis=-1, keepdims=True)
    return shifted


def _check_rows(name: str, rows: FloatArray, width: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != width:
        raise NetworkError(f"{name} must have shape (n, {width}), not {rows.shape}", code="wrong_shape")
    if rows.dtype != np.float32:
        raise NetworkError(f"{name} must be float32, not {rows.dtype}", code="wrong_dtype")
