"""The pass over a learner's events in order: everything that depends on what came before.

Mastery: m <- .7 m + .3 score per category. Elo ratings with decreasing steps for learner and category (Pelanek 2016,
"Applications of the Elo rating system in adaptive educational systems"). Rows are made of the result by ``rows``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aivo_core.encoding.columns import SLOTS, SUBJECT_SLOTS
from aivo_core.encoding.errors import EncodingError
from aivo_core.encoding.events import Event
from aivo_core.encoding.labels import SESSION_GAP_SECONDS, path_id, relation
from aivo_core.encoding.state import RECENT_DECILES, RECENT_SCORES, RECENT_SLOTS, SNAPSHOT, SNAPSHOT_INDEX, EncoderState
from aivo_core.encoding.tables import Place, Scale, Vocabulary

Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MASTERY_STEP = 0.3
FAST_STEP, SLOW_STEP = 0.2, 0.03
SIDE_STEP = 0.1
"""Step of the running means of attempts and of response times; both start at their first known value."""

MAX_ATTEMPTS = 10.0


@dataclass(frozen=True)
class Trail:
    """A learner's states before, between and after n events: state j is the learner after j of them.

    Attributes:
        before: events the learner had before these.
        mean: where running means start.
        snapshots: (n + 1, fields of SNAPSHOT) float64; row 0 is all zero when ``before`` is 0.
        versions: (n + 1, 128) int64, for each state and slot the index into the three arrays below.
        mastery, ability: (128 + n,) float32, one value per slot at the start, then the event's slot after each event.
        last_seen: (128 + n,) int64, position of the slot's last event, -1 where never seen.
        scores: (20 + n,), deciles: (5 + n,) float64, slots: (6 + n,) int64, each led by the latest from before.
        subject_counts, subject_scores: (n + 1, 8) float64, running sums.
        path: (n,) int64, level: (n,) float64: labels of the events.
    """

    before: int
    mean: float
    snapshots: Float64Array
    versions: IntArray
    mastery: npt.NDArray[np.float32]
    ability: npt.NDArray[np.float32]
    last_seen: IntArray
    scores: Float64Array
    deciles: Float64Array
    slots: IntArray
    subject_counts: Float64Array
    subject_scores: Float64Array
    path: IntArray
    level: Float64Array

    def __len__(self) -> int:
        return int(self.path.shape[0])


@dataclass(frozen=True, slots=True)
class _Known:
    """What the tables say about an event: slot, item index, subject slot, decile, place."""

    slot: int
    item: int
    subject: int
    decile: int
    place: Place


def scan(
    vocabulary: Vocabulary, scale: Scale, state: EncoderState, events: Sequence[Event], *, ruler: Scale | None = None
) -> Trail:
    """Move ``state`` past the events (in place) and say what the learner looked like on the way.

    Args:
        scale: item means, offsets and levels.
        ruler: whose deciles measure a step (path label, decile columns); None takes ``scale``.

    Raises:
        EncodingError: ``bad_event``, naming the event's place in ``events`` and its field. The state is then unusable.
    """
    n = len(events)
    start = state.copy() if n else state
    snapshots: list[tuple[float, ...]] = []
    paths: list[int] = []
    levels: list[float] = []
    for position, event in enumerate(events):
        check_event(event, position)
        slot, item = vocabulary.slot(event.category), vocabulary.item(event.item)
        place = scale.place(item, slot)
        decile = place.decile if ruler is None else ruler.place(item, slot).decile
        paths.append(_path(state, event, slot, decile))
        levels.append(place.level)
        known = _Known(slot, item, vocabulary.subject_slot(event.subject), decile, place)
        snapshots.append(_advance(state, event, known))
    trail = _trail(start, snapshots, paths, levels)
    if n:
        _complete(state, trail)
    return trail


def check_event(event: Event, position: int) -> None:
    """Refuse a score outside 0..1 and times, response times or attempts that are no numbers.

    Raises:
        EncodingError: ``bad_event``.
    """
    try:
        if not 0.0 <= event.score <= 1.0:
            raise EncodingError(f"event {position}: score must lie in 0..1, not {event.score}", code="bad_event")
        if event.seconds is not None and not math.isfinite(event.seconds):
            raise EncodingError(f"event {position}: seconds must be finite or None, not {event.seconds}", code="bad_event")
        if event.response_ms is not None and not 0.0 <= event.response_ms < math.inf:
            raise EncodingError(
                f"event {position}: response_ms must be 0 or more or None, not {event.response_ms}", code="bad_event"
            )
        if event.attempts is not None and not 0.0 <= event.attempts < math.inf:
            raise EncodingError(f"event {position}: attempts must be 0 or more or None, not {event.attempts}", code="bad_event")
    except TypeError as error:
        raise EncodingError(
            f"event {position}: score, seconds, response_ms and attempts must be numbers: {error}", code="bad_event"
        ) from error


def _path(state: EncoderState, event: Event, slot: int, decile: int) -> int:
    """Path label of an event, from the state before it."""
    if not state.events:
        return 0
    kind = relation(
        item_seen=event.item in state.items,
        same_category=slot == state.last_slot,
        category_seen=state.counts[slot] > 0,
        same_subject=event.subject == state.last_subject,
    )
    change = decile - state.last_item_decile
    return path_id(relation=kind, decile_change=change, after_break=_begins_session(state, event.seconds))


def _begins_session(state: EncoderState, seconds: float | None) -> bool:
    return seconds is not None and state.last_seconds is not None and seconds - state.last_seconds > SESSION_GAP_SECONDS


def _advance(state: EncoderState, event: Event, known: _Known) -> tuple[float, ...]:
    """Update the state with one event and return its snapshot."""
    slot, place = known.slot, known.place
    score = float(event.score)
    before = state.events
    count = state.counts[slot] + 1
    _update_ability(state, slot, score, before, count, place)
    state.mastery[slot] += MASTERY_STEP * (score - state.mastery[slot])
    state.score_mean_fast += FAST_STEP * (score - state.score_mean_fast)
    state.score_mean_slow += SLOW_STEP * (score - state.score_mean_slow)
    state.counts[slot] = count
    state.last_seen[slot] = before
    state.largest_count = max(state.largest_count, count)
    right = score >= 0.5
    state.streak = (max(state.streak, 0) + 1) if right else (min(state.streak, 0) - 1)
    state.run = state.run + 1 if slot == state.last_slot else 1
    if event.item:
        state.items[event.item] = None
    gap = _update_session(state, event.seconds, score)
    attempts = 0.0 if event.attempts is None else min(float(event.attempts), MAX_ATTEMPTS)
    if event.attempts is not None:
        state.attempts_mean = _running(state.attempts_mean, attempts)
    if event.response_ms is not None:
        state.response_mean = _running(state.response_mean, float(event.response_ms))
    state.last_slot = slot
    state.last_subject = event.subject
    state.last_item_decile = known.decile
    state.events = before + 1
    state.snapshot = (
        float(slot),
        float(known.item),
        place.mean,
        float(known.decile),
        float(known.subject),
        state.mastery[slot],
        state.ability[slot],
        state.overall_ability,
        state.score_mean_fast,
        state.score_mean_slow,
        float(state.streak),
        state.attempts_mean or 0.0,
        state.response_mean or 0.0,
        0.0 if event.response_ms is None else 1.0,
        float(len(state.items)),
        float(state.largest_count),
        float(count),
        float(state.session_events),
        state.session_score,
        float(state.session_index),
        float(state.run),
        0.0 if gap is None else max(gap, 0.0),
        0.0 if gap is None else 1.0,
        0.0 if event.seconds is None else 1.0,
        attempts,
        score,
    )
    return state.snapshot


def _update_ability(state: EncoderState, slot: int, score: float, before: int, count: int, place: Place) -> None:
    error = score - 1.0 / (1.0 + math.exp(place.offset - state.overall_ability - state.ability[slot]))
    state.overall_ability += 0.12 * (1.0 + 2.0 / (1.0 + before / 5.0)) * error
    state.ability[slot] += 0.25 / (1.0 + count / 10.0) * error


def _update_session(state: EncoderState, seconds: float | None, score: float) -> float | None:
    """Move the session on; returns the seconds since the event before, or None where one of the times is unknown."""
    gap = None if seconds is None or state.last_seconds is None else float(seconds) - state.last_seconds
    if not state.events or (gap is not None and gap > SESSION_GAP_SECONDS):
        state.session_index += 1
        state.session_events, state.session_score = 0, 0.0
    state.session_events += 1
    state.session_score += score
    state.last_seconds = None if seconds is None else float(seconds)
    return gap


def _running(mean: float | None, value: float) -> float:
    return value if mean is None else mean + SIDE_STEP * (value - mean)


def _trail(start: EncoderState, snapshots: list[tuple[float, ...]], paths: list[int], levels: list[float]) -> Trail:
    """Arrays of all states, from the state before the events and the snapshot after each."""
    n = len(snapshots)
    table = np.array([start.snapshot or (0.0,) * len(SNAPSHOT), *snapshots], dtype=np.float64)
    after = {name: table[1:, index] for name, index in SNAPSHOT_INDEX.items()}
    slot = after["slot"].astype(np.int64)
    row = np.arange(n)
    versions = np.zeros((n + 1, SLOTS), dtype=np.int64)
    versions[0] = np.arange(SLOTS)
    versions[row + 1, slot] = SLOTS + row
    np.maximum.accumulate(versions, axis=0, out=versions)
    counts, scores = np.zeros((n + 1, SUBJECT_SLOTS)), np.zeros((n + 1, SUBJECT_SLOTS))
    counts[0], scores[0] = start.subject_counts, start.subject_scores
    subject = after["subject"].astype(np.int64)
    counts[row + 1, subject] = 1.0
    scores[row + 1, subject] = after["score"]
    return Trail(
        before=start.events,
        mean=start.mean,
        snapshots=table,
        versions=versions,
        mastery=np.concatenate([start.mastery, after["mastery"]]).astype(np.float32),
        ability=np.concatenate([start.ability, after["category_ability"]]).astype(np.float32),
        last_seen=np.concatenate([start.last_seen, start.events + row]).astype(np.int64),
        scores=np.concatenate([start.recent_scores, after["score"]]),
        deciles=np.concatenate([start.recent_deciles, after["decile"]]),
        slots=np.concatenate([start.recent_slots, slot]).astype(np.int64),
        subject_counts=np.add.accumulate(counts, axis=0),
        subject_scores=np.add.accumulate(scores, axis=0),
        path=np.array(paths, dtype=np.int64),
        level=np.array(levels, dtype=np.float64),
    )


def _complete(state: EncoderState, trail: Trail) -> None:
    """Carry the windows and running sums at the end of the trail into the state."""
    state.recent_scores = trail.scores[-RECENT_SCORES:].tolist()
    state.recent_deciles = trail.deciles[-RECENT_DECILES:].tolist()
    state.recent_slots = trail.slots[-RECENT_SLOTS:].tolist()
    state.subject_counts = trail.subject_counts[-1].tolist()
    state.subject_scores = trail.subject_scores[-1].tolist()
