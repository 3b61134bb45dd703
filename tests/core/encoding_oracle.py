"""The encoder's tables once more, by plain loops over a list of steps: slow, and written apart from the product's code."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aivo_core.encoding import Encoder, Event
from aivo_core.encoding.counts import fold_of

SLOTS = 128
Histories = list[tuple[str, list[Event]]]


@dataclass
class Tally:
    """Counts and the learners behind them."""

    count: float = 0.0
    total: float = 0.0
    who: set[str] = field(default_factory=set)

    def add(self, key: str, value: float = 0.0) -> None:
        self.count += 1
        self.total += value
        self.who.add(key)


def item_mean(histories: Histories, encoder: Encoder, item: str, category: str, *, without_fold: int | None = None) -> float:
    """Shrunken item mean from the learners outside a fold, a cell standing on three learners."""
    used = [(k, e) for k, events in histories if fold_of(k) != without_fold for e in events]
    g = sum(e.score for _, e in used) / len(used)
    slot = encoder.slot(category)
    of_category, of_item = Tally(), Tally()
    known = len({k for k, events in histories if any(e.item == item for e in events)}) >= 3
    for key, event in used:
        if encoder.slot(event.category) == slot:
            of_category.add(key, event.score)
        if item and known and event.item == item:
            of_item.add(key, event.score)
    cp = (of_category.total + 20 * g) / (of_category.count + 20) if len(of_category.who) >= 3 else g
    return (of_item.total + 10 * cp) / (of_item.count + 10) if len(of_item.who) >= 3 else cp


class ForecastOracle:
    """The forecast after (last item, last slot), with one step left out and only some learners counted for the threshold.

    ``left_out``: (key, index) of the event whose step and event count are taken out, or None.
    ``excused``: a learner that does not count towards the three learners of a cell.
    ``without_fold``: fold left out of the item means.
    """

    def __init__(
        self,
        histories: Histories,
        encoder: Encoder,
        *,
        left_out: tuple[str, int] | None = None,
        excused: str | None = None,
        without_fold: int | None = None,
    ) -> None:
        self.excused = excused
        self.slots: dict[int, Tally] = defaultdict(Tally)
        self.pairs: dict[int, dict[int, Tally]] = defaultdict(lambda: defaultdict(Tally))
        self.cells: dict[str, dict[int, Tally]] = defaultdict(lambda: defaultdict(Tally))
        self.after_slot: dict[int, Tally] = defaultdict(Tally)
        self.after_item: dict[str, Tally] = defaultdict(Tally)
        self.overall = Tally()
        means: dict[tuple[str, str], float] = {}
        for key, events in histories:
            for index, event in enumerate(events):
                if (key, index) == left_out:
                    continue
                slot = encoder.slot(event.category)
                self.slots[slot].add(key)
                if not index:
                    continue
                before = events[index - 1]
                a = encoder.slot(before.category)
                name = (event.item, event.category)
                if name not in means:
                    means[name] = item_mean(histories, encoder, *name, without_fold=without_fold)
                self.pairs[a][slot].add(key)
                self.after_slot[a].add(key, means[name])
                self.overall.add(key, means[name])
                if before.item:
                    self.cells[before.item][slot].add(key)
                    self.after_item[before.item].add(key, means[name])

    def enough(self, tally: Tally) -> bool:
        return len(tally.who - {self.excused}) >= 3

    def _smoothed(self, cells: dict[int, Tally], weight: float, fallback: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        kept, suppressed, n = np.zeros(SLOTS), 0.0, 0.0
        for slot, tally in cells.items():
            n += tally.count
            if self.enough(tally):
                kept[slot] = tally.count
            else:
                suppressed += tally.count
        return (kept + (weight + suppressed) * fallback) / (n + weight)

    def base_rates(self) -> np.ndarray[Any, Any]:
        return self._smoothed(self.slots, 0.1 * SLOTS, np.full(SLOTS, 1 / SLOTS))

    def category_row(self, slot: int) -> np.ndarray[Any, Any]:
        return self._smoothed(self.pairs[slot], 5.0, self.base_rates())

    def q(self, item: str, slot: int) -> np.ndarray[Any, Any]:
        return self._smoothed(self.cells[item] if item else {}, 3.0, self.category_row(slot))

    def expected_mean(self, item: str, slot: int) -> float:
        overall = self.overall.total / self.overall.count
        by_slot, by_item = self.after_slot[slot], self.after_item[item]
        m = (by_slot.total + 5 * overall) / (by_slot.count + 5) if self.enough(by_slot) else overall
        return (by_item.total + 3 * m) / (by_item.count + 3) if item and self.enough(by_item) else m
