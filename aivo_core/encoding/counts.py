"""Everything that is counted over the curriculum's events, and the tables that stand on the counts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from aivo_core.encoding.columns import SLOTS
from aivo_core.encoding.tables import (
    BASE_PRIOR,
    CATEGORY_NEXT_PRIOR,
    MIN_LEARNERS,
    Scale,
    Transitions,
    distinct_learners,
    fit_scale,
    smooth,
)

Float64Array = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

FOLDS = 5
"""A training row's item means come from the learners outside its own learner's fold."""


def fold_of(key: str) -> int:
    """Fold 0..4 of a learner, by a hash of the key: the same in every process and for every set of learners."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % FOLDS


@dataclass(frozen=True)
class Log:
    """The curriculum's events as numbers, learner after learner: (n,) each.

    ``item`` is ``items`` where the item is unknown (empty, or fewer than three learners).
    """

    learner: IntArray
    slot: IntArray
    item: IntArray
    score: Float64Array
    learners: int
    items: int

    @cached_property
    def steps(self) -> IntArray:
        """Positions of the events that follow another event of the same learner."""
        return np.flatnonzero(self.learner[1:] == self.learner[:-1]) + 1


@dataclass(frozen=True)
class ExpectedMeans:
    """Sums of the item means of what follows, by one scale: overall, (128,) per category, (items + 1,) per item."""

    overall: float
    category: Float64Array
    item: Float64Array

    @classmethod
    def of(cls, log: Log, scale: Scale) -> ExpectedMeans:
        after, before = log.steps, log.steps - 1
        mean = scale.item_mean(log.item[after], log.slot[after])
        return cls(
            overall=float(mean.sum()),
            category=_sums(log.slot[before], mean, SLOTS),
            item=_sums(log.item[before], mean, log.items + 1),
        )


@dataclass(frozen=True)
class Counts:
    """Counts of events and steps with the number of different learners behind each cell.

    Attributes:
        slot_count, slot_learners: (128,) events per slot.
        pair_count, pair_learners: (128, 128) steps from slot to slot.
        category_learners: (128,) learners with a step from the slot; item_learners: (items + 1,) from the item.
        item_total: (items + 1,) steps from each item.
        cell_key, cell_count, cell_learners: (k,) steps from an item to a slot, key = item * 128 + slot, rising.
        steps: all steps.
    """

    slot_count: Float64Array
    slot_learners: IntArray
    pair_count: Float64Array
    pair_learners: IntArray
    category_learners: IntArray
    item_total: Float64Array
    item_learners: IntArray
    cell_key: IntArray
    cell_count: Float64Array
    cell_learners: IntArray
    steps: int

    @classmethod
    def of(cls, log: Log) -> Counts:
        after, before = log.steps, log.steps - 1
        learner, n = log.learner[after], log.learners
        pair = log.slot[before] * SLOTS + log.slot[after]
        known = log.item[before] < log.items
        cell = (log.item[before] * SLOTS + log.slot[after])[known]
        cell_key, index, cell_count = np.unique(cell, return_inverse=True, return_counts=True)
        item_total = np.bincount(log.item[before], minlength=log.items + 1).astype(np.float64)
        item_total[-1] = 0.0
        return cls(
            slot_count=np.bincount(log.slot, minlength=SLOTS).astype(np.float64),
            slot_learners=distinct_learners(log.slot, log.learner, SLOTS, n),
            pair_count=np.bincount(pair, minlength=SLOTS * SLOTS).reshape(SLOTS, SLOTS).astype(np.float64),
            pair_learners=distinct_learners(pair, learner, SLOTS * SLOTS, n).reshape(SLOTS, SLOTS),
            category_learners=distinct_learners(log.slot[before], learner, SLOTS, n),
            item_total=item_total,
            item_learners=distinct_learners(log.item[before], learner, log.items + 1, n),
            cell_key=cell_key,
            cell_count=cell_count.astype(np.float64),
            cell_learners=distinct_learners(index.reshape(-1), learner[known], len(cell_key), n),
            steps=len(after),
        )

    @property
    def items(self) -> int:
        return len(self.item_total) - 1

    @cached_property
    def item_kept(self) -> Float32Array:
        """(items + 1, 128) float32, counts of the cells that enough learners stand behind."""
        kept = np.zeros((self.items + 1, SLOTS), dtype=np.float32)
        enough = self.cell_learners >= MIN_LEARNERS
        kept.reshape(-1)[self.cell_key[enough]] = self.cell_count[enough]
        return kept

    def suppressed(self) -> dict[str, float]:
        """How many cells of the two transition tables were suppressed, and their share of all steps."""
        few_pairs = (self.pair_learners > 0) & (self.pair_learners < MIN_LEARNERS)
        few_cells = self.cell_learners < MIN_LEARNERS
        return {
            "category_cells": int((self.pair_learners > 0).sum()),
            "category_cells_suppressed": int(few_pairs.sum()),
            "category_share_suppressed": float(self.pair_count[few_pairs].sum() / self.steps),
            "item_cells": len(self.cell_key),
            "item_cells_suppressed": int(few_cells.sum()),
            "item_share_suppressed": float(self.cell_count[few_cells].sum() / max(self.item_total.sum(), 1.0)),
        }


def _sums(cell: IntArray, value: Float64Array, cells: int) -> Float64Array:
    return np.bincount(cell, weights=value, minlength=cells).astype(np.float64)


def base_rates(kept: Float64Array, total: Float64Array) -> Float64Array:
    """(n, 128) kept counts of slots and (n,) all events -> (n, 128); a suppressed count is spread evenly."""
    return smooth(kept, total, BASE_PRIOR * SLOTS, np.full(SLOTS, 1.0 / SLOTS))


def fit_transitions(log: Log, counts: Counts, expected: ExpectedMeans) -> Transitions:
    """The tables for prediction: every learner counts, nothing is taken out."""
    u = base_rates(np.where(counts.slot_learners >= MIN_LEARNERS, counts.slot_count, 0.0)[None], np.array([len(log.slot)]))[0]
    kept = np.where(counts.pair_learners >= MIN_LEARNERS, counts.pair_count, 0.0)
    category_total = counts.pair_count.sum(axis=1)
    overall = expected.overall / counts.steps
    category_mean = np.where(
        counts.category_learners >= MIN_LEARNERS,
        (expected.category + CATEGORY_NEXT_PRIOR * overall) / (category_total + CATEGORY_NEXT_PRIOR),
        overall,
    )
    enough = counts.item_learners >= MIN_LEARNERS
    enough[-1] = False
    return Transitions(
        base_rates=u,
        category_next=smooth(kept, category_total, CATEGORY_NEXT_PRIOR, u).astype(np.float32),
        item_kept=counts.item_kept,
        item_total=counts.item_total.astype(np.float32),
        category_expected_mean=category_mean,
        item_expected_sum=np.where(enough, expected.item, 0.0),
        item_expected_count=np.where(enough, counts.item_total, 0.0),
    )


def fold_scales(log: Log, folds: Sequence[int]) -> tuple[Scale, ...]:
    """For each fold the scale of all learners outside it; ``folds`` gives each learner's fold."""
    fold = np.asarray(folds, dtype=np.int64)[log.learner]
    return tuple(_scale(log, fold != outside) for outside in range(FOLDS))


def full_scale(log: Log) -> Scale:
    """The scale for prediction, from all learners."""
    return _scale(log, np.ones(len(log.slot), dtype=bool))


def _scale(log: Log, mask: npt.NDArray[np.bool_]) -> Scale:
    return fit_scale(
        score=log.score[mask],
        slot=log.slot[mask],
        item=log.item[mask],
        learner=log.learner[mask],
        items=log.items,
        learners=log.learners,
    )
