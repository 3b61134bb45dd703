"""Sums over fixed blocks of learners, so that the result does not depend on who summed what.

Adding floating-point numbers is not associative. Contributions therefore come ordered by subject key, learner i of the
accepted set belongs to block i // BLOCK_SIZE, each block is summed in float64 in this order, and block sums are added
in block order, one after the other. Any distribution of whole blocks over processes gives the same bytes. A learner
that is left out of the set leaves no trace, not even in the rounding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from federation.strategies.errors import StrategyError, refuse

DoubleArray = npt.NDArray[np.float64]
FloatingArray = npt.NDArray[np.floating[Any]]

BLOCK_SIZE = 64
"""Learners in a block. Part of every stored non-private result: another value changes its last bits."""

MAX_SUM = 1e290
"""Largest number in a block's sum, so that adding blocks cannot overflow."""

_TENSOR_NAME = re.compile(r"block/(\d{1,9})/(vector|totals)")


@dataclass(frozen=True, eq=False)
class BlockSum:
    """The weighted sum of the deltas of block ``index``, or of blocks 0..span-1 already added in order.

    Attributes:
        index: first block.
        span: number of blocks; above 1 only from block 0 on, where adding in order begins.
        vector: (d,) float64, sum of weight x delta.
        weight: sum of the weights.
        count: learners in it; every block but the last of a round is full.
        pre_summed: whether the learners were summed before they came here (a masked sum): the block may then hold
            fewer than BLOCK_SIZE learners, those that dropped out, or more.
    """

    index: int
    vector: DoubleArray
    weight: float
    count: int
    span: int = 1
    pre_summed: bool = False

    @property
    def full(self) -> bool:
        return self.pre_summed or self.count == self.span * BLOCK_SIZE


class SumSource(Protocol):
    """Where sums come from whose summands are never seen, for instance a round of secure aggregation."""

    def blocks(self) -> Iterator[BlockSum]:
        """Sums with ``pre_summed`` set, each block once."""
        ...


class OrderedSum:
    """Adds block sums in block order; holds one vector, and those blocks whose predecessors are not there yet."""

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._prefix: BlockSum | None = None
        self._waiting: dict[int, BlockSum] = {}

    def add(self, block: BlockSum) -> None:
        """Add ``block``; its vector is kept, never changed.

        Raises:
            StrategyError: a block that is there already, or one that is malformed; nothing was added.
        """
        check_block(block, self._dim)
        taken = [index for index in self._waiting if block.index <= index < block.index + block.span]
        if taken or self.holds(block.index):
            refuse("bad_blocks", f"block {taken[0] if taken else block.index} is there already")
        self._waiting[block.index] = block
        self._collapse()

    def holds(self, index: int) -> bool:
        """Whether block ``index`` is there already."""
        return index in self._waiting or (self._prefix is not None and index < self._prefix.span)

    def _collapse(self) -> None:
        if self._prefix is None:
            self._prefix = self._waiting.pop(0, None)
        while self._prefix is not None and self._prefix.full and self._prefix.span in self._waiting:
            self._prefix = _added(self._prefix, self._waiting.pop(self._prefix.span))

    def parts(self) -> Iterator[BlockSum]:
        """What is held, in block order."""
        if self._prefix is not None:
            yield self._prefix
        for index in sorted(self._waiting):
            yield self._waiting[index]

    def total(self) -> BlockSum | None:
        """The sum of all blocks, or None when there are none.

        Raises:
            StrategyError: a block is missing, or one that is not the last holds too few learners (``bad_blocks``).
        """
        if self._waiting:
            present = 0 if self._prefix is None else self._prefix.span
            if self._prefix is not None and not self._prefix.full:
                refuse("bad_blocks", f"block {present - 1} is not full, yet block {min(self._waiting)} is there")
            refuse("bad_blocks", f"block {present} is missing, yet block {min(self._waiting)} is there")
        return self._prefix


class OpenBlock:
    """The block that learners are being added to."""

    def __init__(self, index: int, dim: int) -> None:
        self.index = index
        self.count = 0
        self._vector = np.zeros(dim, dtype=np.float64)
        self._weight = 0.0

    def add(self, delta: FloatingArray, weight: float, *, scratch: DoubleArray) -> None:
        """Add weight x delta, computed in float64 in ``scratch``, (d,) float64: nothing is allocated for a learner."""
        np.copyto(scratch, delta)
        np.multiply(scratch, weight, out=scratch)
        np.add(self._vector, scratch, out=self._vector)
        self._weight += weight
        self.count += 1

    def close(self) -> BlockSum:
        return BlockSum(index=self.index, vector=self._vector, weight=self._weight, count=self.count)


def check_block(block: BlockSum, dim: int) -> None:
    """Check a block's fields against one another.

    Raises:
        StrategyError: ``wrong_shape``, ``wrong_dtype``, ``not_finite``, ``bad_weight`` or ``bad_blocks``.
    """
    if block.vector.shape != (dim,):
        refuse("wrong_shape", f"the sum of block {block.index} must have shape ({dim},), not {block.vector.shape}")
    if block.vector.dtype != np.float64:
        refuse("wrong_dtype", f"the sum of block {block.index} must be float64, not {block.vector.dtype}")
    if not np.abs(block.vector).max(initial=0.0) <= MAX_SUM:
        refuse("not_finite", f"the sum of block {block.index} holds values that are infinite, not a number or above {MAX_SUM}")
    if not 0.0 <= block.weight <= MAX_SUM:
        refuse("bad_weight", f"the weight of block {block.index} must lie in [0, {MAX_SUM}], not {block.weight}")
    if block.index < 0 or block.span < 1 or (block.span > 1 and block.index != 0):
        refuse("bad_blocks", f"a sum cannot begin at block {block.index} and span {block.span} blocks")
    if block.count < 1 or (not block.pre_summed and block.count > block.span * BLOCK_SIZE):
        refuse("bad_blocks", f"block {block.index} cannot hold {block.count} learners")


def blocks_to_tensors(blocks: Iterable[BlockSum]) -> dict[str, npt.NDArray[Any]]:
    """Arrays to store, by name: what one shard of a round leaves for the one that merges."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    for block in blocks:
        tensors[f"block/{block.index}/vector"] = block.vector
        tensors[f"block/{block.index}/totals"] = np.array(
            [block.weight, block.count, block.span, block.pre_summed], dtype=np.float64
        )
    return tensors


def blocks_from_tensors(tensors: Mapping[str, npt.NDArray[Any]]) -> list[BlockSum]:
    """Inverse of ``blocks_to_tensors``, in block order.

    Raises:
        StrategyError: names or shapes of something else (``bad_blocks``).
    """
    parts: dict[int, dict[str, npt.NDArray[Any]]] = {}
    for name, array in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise StrategyError(f"{name[:80]!a} is no part of a block sum", code="bad_blocks")
        parts.setdefault(int(match[1]), {})[match[2]] = array
    return [_block_from(index, parts[index]) for index in sorted(parts)]


def _block_from(index: int, part: Mapping[str, npt.NDArray[Any]]) -> BlockSum:
    if part.keys() != {"vector", "totals"} or part["totals"].shape != (4,):
        refuse("bad_blocks", f"block {index} needs a vector and four totals")
    weight, count, span, pre_summed = (float(value) for value in part["totals"])
    if not (count.is_integer() and span.is_integer() and pre_summed in (0.0, 1.0)):
        refuse("bad_blocks", f"the totals of block {index} are not those of a block sum")
    return BlockSum(
        index=index,
        vector=part["vector"],
        weight=weight,
        count=int(count),
        span=int(span),
        pre_summed=bool(pre_summed),
    )


def _added(prefix: BlockSum, following: BlockSum) -> BlockSum:
    return BlockSum(
        index=0,
        vector=prefix.vector + following.vector,
        weight=prefix.weight + following.weight,
        count=prefix.count + following.count,
        span=prefix.span + following.span,
        pre_summed=prefix.pre_summed or following.pre_summed,
    )
