"""The network's declaration: tensors, their order, and the split into trunk and tail.

Nothing here computes; Keras, the inference code and the training engines all read this one declaration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Weights = Mapping[str, FloatArray]

BATCH_NORM_EPSILON = 1e-3
"""Added to the moving variance under the root, as Keras does by default."""

CONTENT_HEAD = "content_output"
DIFFICULTY_HEAD = "difficulty_output"
PATH_HEAD = "path_output"


class NetworkError(ValueError):
    """A network declaration, or weights for one, that cannot be used.

    ``code`` is stable; the message names the field and what is allowed.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name and shape of one float32 tensor."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """One softmax head on the last hidden block."""

    name: str
    units: int


DEFAULT_HEADS = (HeadSpec(CONTENT_HEAD, 128), HeadSpec(DIFFICULTY_HEAD, 10), HeadSpec(PATH_HEAD, 32))
DEFAULT_HIDDEN = (512, 256, 128, 64)
DEFAULT_DROPOUT = (0.3, 0.3, 0.2, 0.2)


def block_layers(index: int) -> tuple[str, str, str]:
    """Layer names of hidden block ``index`` (counted from 1): dense, batch normalisation, dropout."""
    return f"shared_dense_{index}", f"shared_bn_{index}", f"shared_dropout_{index}"


def default_freeze_layers(blocks: int = 2) -> tuple[str, ...]:
    """All layer names of the first ``blocks`` blocks."""
    return tuple(name for index in range(1, blocks + 1) for name in block_layers(index))


@dataclass(frozen=True)
class NetworkSpec:
    """Declaration of the AIVO network.

    Hidden block i is ``Dense(units, ReLU) -> BatchNorm -> Dropout``; the heads stand directly on the last block.
    ``freeze_layers`` must be a prefix of the hidden layers; layers without tensors (dropout) may be left out of it.

    Raises:
        NetworkError: sizes that are not positive, rates outside [0, 1), a freeze list that is no prefix.
    """

    input_dim: int = 256
    hidden_layers: tuple[int, ...] = DEFAULT_HIDDEN
    dropout_rates: tuple[float, ...] = DEFAULT_DROPOUT
    heads: tuple[HeadSpec, ...] = DEFAULT_HEADS
    freeze_layers: tuple[str, ...] = field(default_factory=default_freeze_layers)

    def __post_init__(self) -> None:
        if self.input_dim < 1:
            raise NetworkError(f"input_dim must be at least 1, not {self.input_dim}", code="bad_network")
        if not self.hidden_layers or min(self.hidden_layers) < 1:
            raise NetworkError("hidden_layers needs at least one size, each at least 1", code="bad_network")
        if len(self.dropout_rates) != len(self.hidden_layers):
            raise NetworkError("dropout_rates needs one rate per hidden layer", code="bad_network")
        if not all(0.0 <= rate < 1.0 for rate in self.dropout_rates):
            raise NetworkError("dropout_rates must lie in [0, 1)", code="bad_network")
        if not self.heads or min(head.units for head in self.heads) < 2:
            raise NetworkError("heads needs at least one head, each with at least 2 units", code="bad_network")
        if len({head.name for head in self.heads}) != len(self.heads):
            raise NetworkError("heads must have different names", code="bad_network")
        _frozen_blocks(self)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """All layer names in network order, heads last."""
        hidden = default_freeze_layers(len(self.hidden_layers))
        return hidden + tuple(head.name for head in self.heads)

    @cached_property
    def frozen_blocks(self) -> int:
        """Number of whole hidden blocks in the trunk."""
        return _frozen_blocks(self)

    @property
    def feature_dim(self) -> int:
        """Width of the trunk's output, the tail's input."""
        return self.hidden_layers[self.frozen_blocks - 1] if self.frozen_blocks else self.input_dim

    def block_tensors(self, index: int) -> tuple[TensorSpec, ...]:
        """Tensors of hidden block ``index`` (from 1): kernel, bias, gamma, beta, moving mean, moving variance."""
        rows = self.input_dim if index == 1 else self.hidden_layers[index - 2]
        units = self.hidden_layers[index - 1]
        dense, norm, _ = block_layers(index)
        return (
            TensorSpec(f"{dense}/kernel", (rows, units)),
            TensorSpec(f"{dense}/bias", (units,)),
            TensorSpec(f"{norm}/gamma", (units,)),
            TensorSpec(f"{norm}/beta", (units,)),
            TensorSpec(f"{norm}/moving_mean", (units,)),
            TensorSpec(f"{norm}/moving_variance", (units,)),
        )

    def head_tensors(self) -> tuple[TensorSpec, ...]:
        rows = self.hidden_layers[-1]
        return tuple(
            tensor
            for head in self.heads
            for tensor in (TensorSpec(f"{head.name}/kernel", (rows, head.units)), TensorSpec(f"{head.name}/bias", (head.units,)))
        )

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor of the network in declared order."""
        blocks = range(1, len(self.hidden_layers) + 1)
        return tuple(tensor for index in blocks for tensor in self.block_tensors(index)) + self.head_tensors()

    @property
    def tail_tensors(self) -> tuple[TensorSpec, ...]:
        """What a clone owns, trains and contributes, in declared order: no frozen layer, no moving statistics."""
        blocks = range(self.frozen_blocks + 1, len(self.hidden_layers) + 1)
        hidden = (tensor for index in blocks for tensor in self.block_tensors(index))
        return tuple(t for t in hidden if not is_moving_statistic(t.name)) + self.head_tensors()

    @property
    def parameter_count(self) -> int:
        """Numbers in the whole network, moving statistics included."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def tail_size(self) -> int:
        """Numbers in the tail."""
        return sum(tensor.size for tensor in self.tail_tensors)

    def tail_slices(self) -> dict[str, slice]:
        """Where each tail tensor lies in the flat tail vector."""
        slices: dict[str, slice] = {}
        start = 0
        for tensor in self.tail_tensors:
            slices[tensor.name] = slice(start, start + tensor.size)
            start += tensor.size
        return slices

    def flatten_tail(self, weights: Weights) -> FloatArray:
        """Copy the tail out of ``weights`` as one float32 vector of shape (tail_size,), in declared order."""
        check_weights(weights, self.tail_tensors)
        return np.concatenate([weights[tensor.name].ravel() for tensor in self.tail_tensors])

    def unflatten_tail(self, tail: FloatArray) -> dict[str, FloatArray]:
        """Views into a flat (tail_size,) float32 vector, by tensor name."""
        if tail.shape != (self.tail_size,) or tail.dtype != np.float32:
            raise NetworkError(
                f"tail must be float32 of shape ({self.tail_size},), not {tail.dtype} {tail.shape}", code="wrong_shape"
            )
        slices = self.tail_slices()
        return {tensor.name: tail[slices[tensor.name]].reshape(tensor.shape) for tensor in self.tail_tensors}

    def with_tail(self, weights: Weights, tail: FloatArray) -> dict[str, FloatArray]:
        """The whole network's weights with the tail replaced; everything else is shared, nothing is copied."""
        return {**weights, **self.unflatten_tail(tail)}

    def with_freeze_layers(self, freeze_layers: Sequence[str]) -> NetworkSpec:
        return replace(self, freeze_layers=tuple(freeze_layers))

    def to_json(self) -> dict[str, Any]:
        return {
            "input_dim": self.input_dim,
            "hidden_layers": list(self.hidden_layers),
            "dropout_rates": list(self.dropout_rates),
            "heads": [{"name": head.name, "units": head.units} for head in self.heads],
            "freeze_layers": list(self.freeze_layers),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NetworkSpec:
        """Inverse of ``to_json``.

        Raises:
            NetworkError: missing or unknown fields, or values that ``NetworkSpec`` refuses.
        """
        names = {"input_dim", "hidden_layers", "dropout_rates", "heads", "freeze_layers"}
        if set(data) != names:
            raise NetworkError(f"architecture needs exactly the fields {sorted(names)}, not {sorted(data)}", code="bad_network")
        try:
            return cls(
                input_dim=int(data["input_dim"]),
                hidden_layers=tuple(int(units) for units in data["hidden_layers"]),
                dropout_rates=tuple(float(rate) for rate in data["dropout_rates"]),
                heads=tuple(HeadSpec(str(head["name"]), int(head["units"])) for head in data["heads"]),
                freeze_layers=tuple(str(name) for name in data["freeze_layers"]),
            )
        except (TypeError, KeyError, ValueError) as error:
            if isinstance(error, NetworkError):
                raise
            raise NetworkError(f"architecture cannot be read: {error}", code="bad_network") from error


def is_moving_statistic(name: str) -> bool:
    """Whether a tensor is a batch-normalisation statistic: never trained locally, contributed or noised."""
    return name.endswith(("/moving_mean", "/moving_variance"))


def check_weights(weights: Weights, expected: Iterable[TensorSpec]) -> None:
    """Check that every expected tensor is there with its shape and dtype.

    Raises:
        NetworkError: naming the first tensor that is missing or wrong.
    """
    for tensor in expected:
        value = weights.get(tensor.name)
        if value is None:
            raise NetworkError(f"tensor {tensor.name} is missing", code="wrong_name")
        if value.shape != tensor.shape:
            raise NetworkError(f"tensor {tensor.name} must have shape {tensor.shape}, not {value.shape}", code="wrong_shape")
        if value.dtype != np.float32:
            raise NetworkError(f"tensor {tensor.name} must be float32, not {value.dtype}", code="wrong_dtype")


def _frozen_blocks(spec: NetworkSpec) -> int:
    """Blocks that the freeze list covers; refuses every list that is not a prefix of whole blocks."""
    listed = set(spec.freeze_layers)
    known = default_freeze_layers(len(spec.hidden_layers))
    unknown = sorted(listed - set(known))
    if unknown:
        raise NetworkError(
            f"freeze_layers names layers that cannot be frozen: {', '.join(unknown)}; allowed: {', '.join(known)}",
            code="unknown_layer",
        )
    if len(listed) != len(spec.freeze_layers):
        raise NetworkError("freeze_layers names a layer twice", code="bad_freeze_list")
    frozen = 0
    for index in range(1, len(spec.hidden_layers) + 1):
        dense, norm, dropout = block_layers(index)
        if not listed & {dense, norm, dropout}:
            break
        if not {dense, norm} <= listed:
            raise NetworkError(
                f"freeze_layers must freeze block {index} whole: it needs {dense} and {norm}", code="bad_freeze_list"
            )
        frozen = index
    covered = {name for index in range(1, frozen + 1) for name in block_layers(index)}
    if not listed <= covered:
        raise NetworkError(
            f"freeze_layers is not a prefix of the network: {', '.join(sorted(listed - covered))} "
            f"may be frozen only together with every layer before, in the order {', '.join(known)}",
            code="bad_freeze_list",
        )
    return frozen
