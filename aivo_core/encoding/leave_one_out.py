"""The forecast of a training row, from tables without the row's own step.

Inputs that contain their own label teach the network to read it; on new learners it then finds nothing. So the row's own
step is taken out of every count (base rates, category after category, category after item, expected item mean), and a cell
counts as known only where at least three *other* learners stand behind it. Item means, and the level label, come from a scale
without the row's whole fold of learners. Only the deciles by which steps are measured (path label, decile columns) are those
of the version's own scale: a label means what the version's tables say, and there the row's own score shifts an item's rank
by one part in its count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from aivo_core.encoding.columns import SLOTS
from aivo_core.encoding.counts import Counts, ExpectedMeans, base_rates
from aivo_core.encoding.tables import (
    CATEGORY_NEXT_PRIOR,
    ITEM_NEXT_PRIOR,
    MIN_LEARNERS,
    Forecast,
    Scale,
    mix_item_row,
    smooth,
)

Float64Array = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Number = TypeVar("Number", np.float32, np.float64)


@dataclass(frozen=True)
class LeaveOneOut:
    """Forecasts for the curriculum learners' own rows.

    Attributes:
        counts: over all curriculum learners.
        events: all their events.
        scale, expected: item means and sums without the learner's fold.
    """

    counts: Counts
    events: int
    scale: Scale
    expected: ExpectedMeans

    def forecast(self, slot: IntArray, item: IntArray) -> Forecast:
        """Forecast for each step of one learner of the fit.

        Args:
            slot, item: (n,) the learner's whole history as it was fitted.

        Returns:
            n - 1 rows, one per step.
        """
        last_item, last, own = item[:-1], slot[:-1], slot[1:]
        rates = self._base_rates(slot, own)
        rows = self._category_rows(last, own, rates).astype(np.float32)
        q = self._item_rows(last_item, own, rows)
        own_mean = self.scale.item_mean(item[1:], own)
        expected = self._expected_means(last_item, last, own_mean)
        return Forecast(q=q, self_transition=rows[np.arange(len(last)), last], expected_mean=expected)

    def _base_rates(self, slot: IntArray, own: IntArray) -> Float64Array:
        others = self.counts.slot_learners.copy()
        others[np.unique(slot)] -= 1
        kept = np.where(others >= MIN_LEARNERS, self.counts.slot_count, 0.0)
        return base_rates(_without(np.repeat(kept[None], len(own), axis=0), own), np.full(len(own), self.events - 1.0))

    def _category_rows(self, last: IntArray, own: IntArray, rates: Float64Array) -> Float64Array:
        others = self.counts.pair_learners.copy()
        mine = np.zeros((SLOTS, SLOTS), dtype=bool)
        mine[last, own] = True
        others[mine] -= 1
        kept = np.where(others >= MIN_LEARNERS, self.counts.pair_count, 0.0)[last]
        total = self.counts.pair_count.sum(axis=1)[last] - 1.0
        return smooth(_without(kept, own), total, CATEGORY_NEXT_PRIOR, rates)

    def _item_rows(self, item: IntArray, own: IntArray, rows: Float32Array) -> Float32Array:
        counts = self.counts
        known = item < counts.items
        different, index = np.unique(item, return_inverse=True)
        kept = counts.item_kept[different]
        cells = np.unique((item * SLOTS + own)[known])
        position = np.searchsorted(counts.cell_key, cells)
        barely = cells[counts.cell_learners[position] == MIN_LEARNERS]
        kept[np.searchsorted(different, barely // SLOTS), barely % SLOTS] = 0.0
        kept = _without(kept[index.reshape(-1)], own)
        total = (counts.item_total[item] - known).astype(np.float32)
        rest = np.float32(ITEM_NEXT_PRIOR) + total - np.add.reduce(kept, axis=1)
        return mix_item_row(kept, rest, total, rows)

    def _expected_means(self, item: IntArray, last: IntArray, own_mean: Float64Array) -> Float64Array:
        counts, expected = self.counts, self.expected
        other_steps = counts.steps - 1
        overall = (expected.overall - own_mean) / other_steps if other_steps else np.full(len(last), self.scale.mean)
        total = counts.pair_count.sum(axis=1)[last] - 1.0
        category = (expected.category[last] - own_mean + CATEGORY_NEXT_PRIOR * overall) / (total + CATEGORY_NEXT_PRIOR)
        category = np.where(counts.category_learners[last] - 1 >= MIN_LEARNERS, category, overall)
        enough = (counts.item_learners[item] - 1 >= MIN_LEARNERS) & (item < counts.items)
        own = (expected.item[item] - own_mean + ITEM_NEXT_PRIOR * category) / (counts.item_total[item] - 1.0 + ITEM_NEXT_PRIOR)
        return np.where(enough, own, category)


def _without(kept: npt.NDArray[Number], own: IntArray) -> npt.NDArray[Number]:
    """Take one count out of each row's own cell where that cell is kept; changes ``kept``."""
    row = np.arange(len(own))
    kept[row, own] -= kept[row, own] > 0
    return kept
