"""Where everything lies in the flat tail vector, and what a base version lends to the training of tails.

A tail has 0 to n hidden blocks (``Dense -> ReLU -> BatchNorm -> Dropout``) and three heads; every ``NetworkSpec`` with the
heads of the objective fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from aivo_core.engine.contract import EngineError
from aivo_core.inference import FoldedTrunk, fold_trunk
from aivo_core.network import (
    BATCH_NORM_EPSILON,
    CONTENT_HEAD,
    DIFFICULTY_HEAD,
    PATH_HEAD,
    FloatArray,
    NetworkError,
    NetworkSpec,
    Weights,
    block_layers,
    check_weights,
)
from aivo_core.ordinal import CLASSES

IntTable = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BlockPlace:
    """One hidden block of the tail: widths, dropout rate, and where its tensors begin in the flat vector."""

    rows: int
    units: int
    rate: float
    kernel: int
    bias: int
    gamma: int
    beta: int


@dataclass(frozen=True)
class HeadPlace:
    """One head: width, and where its tensors begin in the flat vector."""

    units: int
    kernel: int
    bias: int


@dataclass(frozen=True)
class TailLayout:
    """The tail of one ``NetworkSpec``.

    Attributes:
        feature_dim: width of the trunk's output.
        hidden_dim: width of what the heads stand on.
        size: numbers in the tail; heads_start of them belong to the hidden blocks.
    """

    feature_dim: int
    hidden_dim: int
    size: int
    heads_start: int
    blocks: tuple[BlockPlace, ...]
    content: HeadPlace
    difficulty: HeadPlace
    path: HeadPlace

    @property
    def block_table(self) -> IntTable:
        """(blocks, 6) int64: rows, units, and offsets of kernel, bias, gamma, beta."""
        rows = [(b.rows, b.units, b.kernel, b.bias, b.gamma, b.beta) for b in self.blocks]
        return np.array(rows, dtype=np.int64).reshape(len(rows), 6)

    @property
    def head_table(self) -> IntTable:
        """(3, 3) int64: units and offsets of kernel and bias, for content, path, difficulty."""
        return np.array([(h.units, h.kernel, h.bias) for h in (self.content, self.path, self.difficulty)], dtype=np.int64)


@lru_cache(maxsize=32)
def tail_layout(spec: NetworkSpec) -> TailLayout:
    """The layout of ``spec``'s tail.

    Raises:
        EngineError: ``bad_heads``: not the three heads that the objective is defined on.
    """
    units = {head.name: head.units for head in spec.heads}
    if set(units) != {CONTENT_HEAD, DIFFICULTY_HEAD, PATH_HEAD} or units[DIFFICULTY_HEAD] != CLASSES:
        raise EngineError(
            f"heads must be {CONTENT_HEAD}, {DIFFICULTY_HEAD} (with {CLASSES} units) and {PATH_HEAD}, not {units}",
            code="bad_heads",
        )
    starts = {name: part.start for name, part in spec.tail_slices().items()}
    heads = {n: HeadPlace(units[n], starts[f"{n}/kernel"], starts[f"{n}/bias"]) for n in units}
    return TailLayout(
        feature_dim=spec.feature_dim,
        hidden_dim=spec.hidden_layers[-1],
        size=spec.tail_size,
        heads_start=min(head.kernel for head in heads.values()),
        blocks=tuple(_block_place(spec, starts, i) for i in range(spec.frozen_blocks + 1, len(spec.hidden_layers) + 1)),
        content=heads[CONTENT_HEAD],
        difficulty=heads[DIFFICULTY_HEAD],
        path=heads[PATH_HEAD],
    )


def _block_place(spec: NetworkSpec, starts: dict[str, int], index: int) -> BlockPlace:
    dense, norm, _ = block_layers(index)
    rows, units = spec.block_tensors(index)[0].shape
    return BlockPlace(
        rows=rows,
        units=units,
        rate=spec.dropout_rates[index - 1],
        kernel=starts[f"{dense}/kernel"],
        bias=starts[f"{dense}/bias"],
        gamma=starts[f"{norm}/gamma"],
        beta=starts[f"{norm}/beta"],
    )


@dataclass(frozen=True)
class TailBase:
    """What a base version lends to all learners: its trunk, and the moving statistics of the tail's normalisations.

    Attributes:
        mean, inverse_deviation: one float32 (units,) array per hidden block of the tail;
            inverse_deviation is 1 / sqrt(variance + epsilon).
    """

    layout: TailLayout
    trunk: FoldedTrunk
    mean: tuple[FloatArray, ...]
    inverse_deviation: tuple[FloatArray, ...]


def tail_base(spec: NetworkSpec, weights: Weights) -> TailBase:
    """Prepare a base version; ``weights`` are all of ``spec.tensors``, of which the tail is not read.

    Raises:
        EngineError: ``bad_heads``.
        NetworkError: a tensor is missing or wrong, or a moving variance is negative.
    """
    layout = tail_layout(spec)
    check_weights(weights, spec.tensors)
    means, inverses = [], []
    for index in range(spec.frozen_blocks + 1, len(spec.hidden_layers) + 1):
        norm = block_layers(index)[1]
        variance = weights[f"{norm}/moving_variance"].astype(np.float64)
        if not (variance >= 0.0).all():
            raise NetworkError(f"{norm}/moving_variance must be 0 or more everywhere", code="bad_statistics")
        means.append(weights[f"{norm}/moving_mean"].copy())
        inverses.append((1.0 / np.sqrt(variance + BATCH_NORM_EPSILON)).astype(np.float32))
    return TailBase(layout, fold_trunk(spec, weights), tuple(means), tuple(inverses))
