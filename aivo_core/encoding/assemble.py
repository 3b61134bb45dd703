"""Samples from a trail and a forecast: the step that prediction rows and training rows share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aivo_core.encoding.rows import KnownCategory, RawRows, Scaler, second_pass
from aivo_core.encoding.scan import Trail
from aivo_core.encoding.state import RECENT_SCORES, RECENT_SLOTS, SNAPSHOT_INDEX
from aivo_core.encoding.tables import Forecast, Scale
from aivo_core.samples import Samples

IntArray = npt.NDArray[np.int64]


def sample_states(trail: Trail) -> IntArray:
    """States right before each event that gives a sample: all but a learner's state before the first event."""
    return np.arange(0 if trail.before else 1, len(trail), dtype=np.int64)


def last_items(trail: Trail, states: IntArray) -> tuple[IntArray, IntArray]:
    """Index and slot of the last item in each of the given states."""
    item = trail.snapshots[states, SNAPSHOT_INDEX["item"]].astype(np.int64)
    slot = trail.snapshots[states, SNAPSHOT_INDEX["slot"]].astype(np.int64)
    return item, slot


def event_slots(trail: Trail, states: IntArray) -> IntArray:
    """Slot of the event after each of the given states."""
    return trail.slots[states + RECENT_SLOTS]


def known_category(raw: RawRows, slot: IntArray, scale: Scale) -> KnownCategory:
    """What the second pass is told when the categories of the next events are known."""
    row = np.arange(len(slot))
    return KnownCategory(
        slot=slot,
        is_last=slot == raw.last_slot,
        mastery=raw.mastery[row, slot],
        ability=raw.ability[row, slot],
        seen=raw.seen[row, slot],
        mean=scale.category_mean[slot],
    )


def samples(
    trail: Trail,
    states: IntArray,
    *,
    forecast: Forecast,
    raw: RawRows,
    scale: Scale,
    scaler: Scaler,
    context_slots: IntArray,
) -> Samples:
    """Samples of the events that follow the given states."""
    content = event_slots(trail, states)
    first = raw.first_pass(scaler)
    return Samples(
        first=first,
        second=second_pass(first, known_category(raw, content, scale), context_slots, scaler),
        content=content,
        path=trail.path[states],
        level=trail.level[states].astype(np.float32),
        score=trail.scores[states + RECENT_SCORES].astype(np.float32),
        position=trail.before + states,
        content_prior=forecast.q,
        events=trail.before + len(trail),
    )
