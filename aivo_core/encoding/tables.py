"""The tables that an encoder reads: names to slots, difficulty scale, category transitions.

All of them come from the curriculum learners alone. A cell (an item's mean, a count of category after item, ...) is used
only where at least ``MIN_LEARNERS`` learners stand behind it; the count of a smaller cell goes to the cell's fallback, so that
nothing about one or two learners can be read out of a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from aivo_core.encoding.columns import OVERFLOW_SLOT, SLOTS, SUBJECT_SLOTS

Float64Array = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

MIN_LEARNERS = 3
ITEM_PRIOR = 10.0
"""Pseudo-counts of the category's mean in an item's mean."""

CATEGORY_PRIOR = 20.0
"""Pseudo-counts of the overall mean in a category's mean."""

BASE_PRIOR = 0.1
"""Pseudo-count of every slot in the base rates."""

CATEGORY_NEXT_PRIOR = 5.0
"""Pseudo-counts of the base rates in P(next category | last category), and of the overall mean in its expected item mean."""

ITEM_NEXT_PRIOR = 3.0
"""Pseudo-counts of the category's row in P(next category | last item), and of its value in the expected item mean."""

MIN_MEAN, MAX_MEAN = 0.02, 0.98
"""Item means are clipped to this range before they become an Elo offset."""

DECILES = 10


@dataclass(frozen=True)
class Vocabulary:
    """Names known to the encoder, most frequent first.

    Attributes:
        categories: up to 127 names; every other name goes to slot 127.
        subjects: up to 7 names; every other name goes to slot 7.
        items: items with at least ``MIN_LEARNERS`` learners; every other item has index ``len(items)``.
    """

    categories: tuple[str, ...]
    subjects: tuple[str, ...]
    items: tuple[str, ...]

    @cached_property
    def slots(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.categories)}

    @cached_property
    def subject_slots(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.subjects)}

    @cached_property
    def item_indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.items)}

    def slot(self, category: str) -> int:
        """Slot 0..127 of a category; unknown categories share slot 127."""
        return self.slots.get(category, OVERFLOW_SLOT)

    def subject_slot(self, subject: str) -> int:
        """Slot 0..7 of a subject; unknown subjects share slot 7."""
        return self.subject_slots.get(subject, SUBJECT_SLOTS - 1)

    def item(self, item: str) -> int:
        """Index of an item; unknown and empty ones share ``len(items)``."""
        return self.item_indices.get(item, len(self.items))


@dataclass(frozen=True, slots=True)
class Place:
    """Where an item stands on the difficulty scale.

    Attributes:
        mean: shrunken mean score of the item.
        decile: 0 (easiest) .. 9, ten equal shares of the curriculum's events.
        level: continuous level .5 .. 9.5; a whole number in the middle of its level.
        offset: Elo offset of the item in logits, positive = hard.
    """

    mean: float
    decile: int
    level: float
    offset: float


@dataclass(frozen=True)
class Scale:
    """Item means and the difficulty scale made of them.

    Attributes:
        mean: mean score of all events.
        category_mean: (128,) float64.
        item_sum, item_count: (items + 1,) float64, scores and events of the item; 0 for a suppressed or unknown item.
        points: (k,) float64, the different item means of all events, rising.
        cumulative: (k + 1,) int64, events with a mean below each point, and all of them.
    """

    mean: float
    category_mean: Float64Array
    item_sum: Float64Array
    item_count: Float64Array
    points: Float64Array
    cumulative: IntArray
    _places: dict[int, Place] = field(default_factory=dict, repr=False, compare=False)

    def item_mean(self, item: npt.ArrayLike, slot: npt.ArrayLike) -> Float64Array:
        """(n,) item indices and (n,) slots -> (n,) means: (sum + 10 category mean) / (count + 10)."""
        i = np.asarray(item)
        fallback = self.category_mean[np.asarray(slot)]
        return np.asarray((self.item_sum[i] + ITEM_PRIOR * fallback) / (self.item_count[i] + ITEM_PRIOR))

    def hardness(self, mean: npt.ArrayLike) -> Float64Array:
        """1 - mid-rank share of a mean among all events: 0 = easiest, 1 = hardest; .5 where nothing is known."""
        p = np.asarray(mean, dtype=np.float64)
        total = int(self.cumulative[-1])
        if total == 0:
            return np.full(p.shape, 0.5)
        below = self.cumulative[np.searchsorted(self.points, p, side="left")]
        up_to = self.cumulative[np.searchsorted(self.points, p, side="right")]
        return np.asarray(1.0 - (below + up_to) / (2.0 * total))

    def place(self, item: int, slot: int) -> Place:
        """Place of one (item index, slot); remembered, the number of pairs of known items and slots bounds the memory."""
        key = item * SLOTS + slot
        found = self._places.get(key)
        if found is None:
            found = self._places[key] = self._place(item, slot)
        return found

    def _place(self, item: int, slot: int) -> Place:
        mean = float(self.item_mean(item, slot))
        hardness = float(self.hardness(mean))
        clipped = min(max(mean, MIN_MEAN), MAX_MEAN)
        return Place(
            mean=mean,
            decile=min(int(hardness * DECILES), DECILES - 1),
            level=0.5 + 9.0 * hardness,
            offset=-math.log(clipped / (1.0 - clipped)),
        )


def fit_scale(*, score: Float64Array, slot: IntArray, item: IntArray, learner: IntArray, items: int, learners: int) -> Scale:
    """Item means, category means and the difficulty scale of the given events.

    Args:
        score, slot, item, learner: (n,) one entry per event; ``item`` is ``items`` where the item is unknown.
        items, learners: how many there are.
    """
    mean = float(score.mean()) if len(score) else 0.5
    slot_sum, slot_count = _kept_sums(score, slot, learner, SLOTS, learners)
    category_mean = (slot_sum + CATEGORY_PRIOR * mean) / (slot_count + CATEGORY_PRIOR)
    known = item < items
    item_sum, item_count = _kept_sums(score[known], item[known], learner[known], items + 1, learners)
    empty = Scale(mean, category_mean, item_sum, item_count, np.zeros(0), np.zeros(1, dtype=np.int64))
    points, counts = np.unique(empty.item_mean(item, slot), return_counts=True)
    cumulative = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Scale(mean, category_mean, item_sum, item_count, points, cumulative)


def distinct_learners(cell: IntArray, learner: IntArray, cells: int, learners: int) -> IntArray:
    """(n,) cells and (n,) learners -> (cells,) number of different learners in each cell."""
    pairs = np.unique(cell * learners + learner)
    return np.bincount(pairs // learners, minlength=cells).astype(np.int64)


def _kept_sums(
    value: Float64Array, cell: IntArray, learner: IntArray, cells: int, learners: int
) -> tuple[Float64Array, Float64Array]:
    """Sum and count per cell, both 0 where fewer than MIN_LEARNERS learners stand behind the cell."""
    kept = distinct_learners(cell, learner, cells, learners) >= MIN_LEARNERS
    total = np.bincount(cell, weights=value, minlength=cells)
    count = np.bincount(cell, minlength=cells).astype(np.float64)
    return np.where(kept, total, 0.0), np.where(kept, count, 0.0)


def smooth(kept: Float64Array, total: Float64Array, weight: float, fallback: Float64Array) -> Float64Array:
    """(kept counts + (weight + suppressed) fallback) / (total + weight), row by row.

    Args:
        kept: (n, 128) counts of the cells that may be used.
        total: (n,) counts of all cells; what is not in ``kept`` is suppressed and follows the fallback.
        weight: pseudo-counts of the fallback.
        fallback: (n, 128) or (128,) distribution.
    """
    suppressed = total - np.add.reduce(kept, axis=1)
    return np.asarray((kept + (weight + suppressed)[:, None] * fallback) / (total + weight)[:, None])


@dataclass(frozen=True)
class Transitions:
    """What tends to come next.

    Attributes:
        base_rates: (128,) float64, u.
        category_next: (128, 128) float32, T[a][b] = P(next slot b | last slot a).
        item_kept: (items + 1, 128) float32, kept counts of next slots after an item; the last row (unknown item) is 0.
        item_total: (items + 1,) float32, all counts after an item, suppressed ones included.
        category_expected_mean: (128,) float64, mean item mean of what follows a category.
        item_expected_sum, item_expected_count: (items + 1,) float64, the same after an item; 0 where suppressed.
    """

    base_rates: Float64Array
    category_next: Float32Array
    item_kept: Float32Array
    item_total: Float32Array
    category_expected_mean: Float64Array
    item_expected_sum: Float64Array
    item_expected_count: Float64Array

    @cached_property
    def item_rest(self) -> Float32Array:
        """(items + 1,) weight of the category's row after an item: pseudo-counts plus suppressed counts."""
        rest = np.float32(ITEM_NEXT_PRIOR) + self.item_total - np.add.reduce(self.item_kept, axis=1)
        return np.asarray(rest, dtype=np.float32)

    def forecast(self, item: IntArray, slot: IntArray) -> Forecast:
        """Forecast after the last (n,) items and their (n,) slots."""
        rows = self.category_next[slot]
        q = mix_item_row(self.item_kept[item], self.item_rest[item], self.item_total[item], rows)
        expected = (self.item_expected_sum[item] + ITEM_NEXT_PRIOR * self.category_expected_mean[slot]) / (
            self.item_expected_count[item] + ITEM_NEXT_PRIOR
        )
        return Forecast(q=q, self_transition=rows[np.arange(len(slot)), slot], expected_mean=expected)


def mix_item_row(kept: Float32Array, rest: Float32Array, total: Float32Array, rows: Float32Array) -> Float32Array:
    """q = (kept counts + rest T[a]) / (total + 3) in float32: (n, 128), (n,), (n,), (n, 128) -> (n, 128)."""
    scaled = rows * rest[:, None]
    scaled += kept
    scaled /= (total + np.float32(ITEM_NEXT_PRIOR))[:, None]
    return scaled


@dataclass(frozen=True)
class Forecast:
    """The tables' own forecast for n rows.

    Attributes:
        q: (n, 128) float32, distribution of the next slot.
        self_transition: (n,) float32, T[last][last].
        expected_mean: (n,) float64, expected item mean of the next item.
    """

    q: Float32Array
    self_transition: Float32Array
    expected_mean: Float64Array


def most_frequent(names: Iterable[str], limit: int) -> tuple[str, ...]:
    """The ``limit`` most frequent names, most frequent first, ties by name."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return tuple(sorted(counts, key=lambda name: (-counts[name], name))[:limit])
