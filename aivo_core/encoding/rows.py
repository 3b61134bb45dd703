"""Rows of 256 numbers from a learner's states: what the network sees before the next event.

Every sum runs over one row alone and elementwise operations do the rest, so that a row is the same, bit for bit, whether
it is made alone or among thousands.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from aivo_core.encoding.columns import (
    CLIP,
    CONTEXT_SLOTS,
    INDEX,
    INPUT_DIM,
    SCALED,
    SCALED_START,
    SLOTS,
    SUBJECT_SLOTS,
)
from aivo_core.encoding.scan import Trail
from aivo_core.encoding.state import RECENT_DECILES, RECENT_SCORES, RECENT_SLOTS, SNAPSHOT_INDEX
from aivo_core.encoding.tables import Forecast

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

TRACE_DECAY = 0.6
_TRACE_LENGTH = 64
_TRACE = np.append(TRACE_DECAY ** np.arange(_TRACE_LENGTH), 0.0).astype(np.float32)
"""Trace by age; older than 64 events it is below float32's resolution of the sum it enters."""

SEEN_BASE, SEEN_MASTERY = np.float32(0.1), np.float32(0.3)
SECOND_PASS_COLUMNS = (
    "forecast_entropy",
    "forecast_of_last_category",
    "expected_mastery",
    "expected_seen",
    "expected_category_ability",
    "expected_item_mean",
)
_SECOND_PASS = np.array([INDEX[name] for name in SECOND_PASS_COLUMNS])


@dataclass(frozen=True)
class Scaler:
    """Mean and standard deviation (+ .001) of the columns 192..255 over the curriculum's training rows: (64,) float64 each."""

    mean: Float64Array
    deviation: Float64Array

    def apply(self, raw: Float64Array, columns: IntArray | slice = slice(None)) -> Float32Array:
        """Standardise and clip (n, k) raw values of the given columns of the block."""
        return np.clip((raw - self.mean[columns]) / self.deviation[columns], -CLIP, CLIP).astype(np.float32)


@dataclass(frozen=True)
class RawRows:
    """Rows before standardisation, with what the second pass needs.

    Attributes:
        content: (n, 128) float32, context: (n, 64) float32, scaled: (n, 64) float64.
        mastery, ability: (n, 128) float32, seen: (n, 128) bool, per slot. last_slot: (n,) int64.
    """

    content: Float32Array
    context: Float32Array
    scaled: Float64Array
    mastery: Float32Array
    ability: Float32Array
    seen: npt.NDArray[np.bool_]
    last_slot: IntArray

    def first_pass(self, scaler: Scaler) -> Float32Array:
        """(n, 256) float32, the category of the next event unknown."""
        first = np.empty((len(self.last_slot), INPUT_DIM), dtype=np.float32)
        first[:, :SLOTS] = self.content
        first[:, SLOTS:SCALED_START] = self.context
        first[:, SCALED_START:] = scaler.apply(self.scaled)
        return first


def raw_rows(trail: Trail, states: IntArray, forecast: Forecast, context_slots: IntArray) -> RawRows:
    """Rows of the given states of a trail.

    Args:
        states: (n,) indices 0..len(trail); a state without any event has no row.
        forecast: of the same n states.
        context_slots: (64,) slots of the subject group.
    """
    versions = trail.versions[states]
    mastery, ability = trail.mastery[versions], trail.ability[versions]
    last_seen = trail.last_seen[versions]
    seen = last_seen >= 0
    age = np.minimum((trail.before + states - 1)[:, None] - last_seen, _TRACE_LENGTH)
    content = np.where(seen, _TRACE[age] + (SEEN_BASE + SEEN_MASTERY * mastery), np.float32(0.0))
    q = forecast.q
    snapshot = {name: trail.snapshots[states, index] for name, index in SNAPSHOT_INDEX.items()}
    last_slot = snapshot["slot"].astype(np.int64)
    scaled = np.zeros((len(states), SCALED))
    _learner_columns(scaled, trail, states, snapshot)
    _forecast_columns(scaled, forecast, mastery, ability, seen, last_slot)
    _session_columns(scaled, snapshot)
    _window_columns(scaled, trail, states)
    context = np.ascontiguousarray(q[:, context_slots])
    return RawRows(content, context, scaled, mastery, ability, seen, last_slot)


def _learner_columns(scaled: Float64Array, trail: Trail, states: IntArray, snapshot: dict[str, Float64Array]) -> None:
    events = (trail.before + states).astype(np.float64)
    _set(
        scaled,
        score_mean_fast=snapshot["score_mean_fast"],
        score_mean_slow=snapshot["score_mean_slow"],
        history_length=np.log1p(events) / 6.0,
        streak=snapshot["streak"] / 5.0,
        attempts_mean=np.log1p(snapshot["attempts_mean"]) / 2.0,
        response_time_mean=np.log1p(snapshot["response_mean"]) / 12.0,
        response_time_known=snapshot["response_known"],
        distinct_item_share=snapshot["distinct_items"] / events,
        largest_category_share=snapshot["largest_count"] / events,
        ability=snapshot["ability"],
    )
    counts, scores = trail.subject_counts[states], trail.subject_scores[states]
    start = INDEX["subject_share_0"]
    scaled[:, start : start + SUBJECT_SLOTS] = counts / events[:, None]
    start = INDEX["subject_accuracy_0"]
    scaled[:, start : start + SUBJECT_SLOTS] = np.where(counts > 0, scores / np.maximum(counts, 1.0), trail.mean)


def _forecast_columns(
    scaled: Float64Array,
    forecast: Forecast,
    mastery: Float32Array,
    ability: Float32Array,
    seen: npt.NDArray[np.bool_],
    last_slot: IntArray,
) -> None:
    q = forecast.q
    seen_count = np.add.reduce(seen, axis=1, dtype=np.int64)
    safe = np.maximum(q, np.float32(1e-12))
    _set(
        scaled,
        share_of_slots_seen=seen_count / SLOTS,
        mean_mastery_seen=np.add.reduce(np.where(seen, mastery, np.float32(0.0)), axis=1) / seen_count,
        forecast_entropy=-np.add.reduce(q * np.log(safe), axis=1) / 4.0,
        forecast_of_last_category=q[np.arange(len(q)), last_slot],
        expected_mastery=np.add.reduce(q * mastery, axis=1),
        expected_seen=np.add.reduce(np.where(seen, q, np.float32(0.0)), axis=1),
        expected_category_ability=np.add.reduce(q * ability, axis=1),
        expected_item_mean=forecast.expected_mean,
        self_transition=forecast.self_transition,
    )


def _session_columns(scaled: Float64Array, snapshot: dict[str, Float64Array]) -> None:
    _set(
        scaled,
        session_length=np.log1p(snapshot["session_events"]) / 4.0,
        session_accuracy=snapshot["session_score"] / snapshot["session_events"],
        session_index=np.log1p(snapshot["session_index"]) / 4.0,
        category_run=snapshot["run"] / 10.0,
        category_run_log=np.log1p(snapshot["run"]) / 3.0,
        seconds_between_last_two=np.log1p(snapshot["gap"]) / 12.0,
        seconds_between_known=snapshot["gap_known"],
        last_item_mean=snapshot["item_mean"],
        last_category_mastery=snapshot["mastery"],
        last_category_count=np.log1p(snapshot["count"]) / 4.0,
        last_attempts=snapshot["attempts"] / 5.0,
        time_known=snapshot["time_known"],
        surprise=snapshot["score"] - snapshot["item_mean"],
    )


def _window_columns(scaled: Float64Array, trail: Trail, states: IntArray) -> None:
    """Latest values; what lies before the first event counts as the mean score, the middle decile, another category."""
    events = trail.before + states
    total = np.zeros(len(states))
    for offset in range(RECENT_SCORES):
        total += trail.scores[states + offset]
    scaled[:, INDEX["score_mean_last_20"]] = total / np.minimum(events, RECENT_SCORES)
    last = trail.slots[states + RECENT_SLOTS - 1]
    for lag in range(1, 6):
        exists = events >= lag
        score = trail.scores[states + RECENT_SCORES - lag]
        decile = trail.deciles[states + RECENT_DECILES - lag]
        scaled[:, INDEX[f"score_{lag}_back"]] = np.where(exists, score, trail.mean)
        scaled[:, INDEX[f"decile_{lag}_back"]] = np.where(exists, decile / 9.0, 0.5)
        scaled[:, INDEX[f"same_category_{lag}_before_last"]] = trail.slots[states + RECENT_SLOTS - 1 - lag] == last


def _set(scaled: Float64Array, **columns: npt.NDArray[np.generic]) -> None:
    for name, values in columns.items():
        scaled[:, INDEX[name]] = values


@dataclass(frozen=True)
class KnownCategory:
    """What the second pass knows about the category of the next event: (n,) each.

    Attributes:
        slot: int64. is_last: whether it is the last event's. mastery, ability: float32, the learner's. seen: bool.
        mean: float64, the curriculum's mean score of the category.
    """

    slot: IntArray
    is_last: npt.NDArray[np.bool_]
    mastery: Float32Array
    ability: Float32Array
    seen: npt.NDArray[np.bool_]
    mean: Float64Array


def second_pass(first: Float32Array, known: KnownCategory, context_slots: IntArray, scaler: Scaler) -> Float32Array:
    """The same rows with the forecast replaced by certainty: (n, 256) -> (n, 256), a copy."""
    second = first.copy()
    second[:, SLOTS : SLOTS + CONTEXT_SLOTS] = known.slot[:, None] == context_slots[None, :]
    raw = np.empty((len(first), len(SECOND_PASS_COLUMNS)))
    raw[:, 0] = 0.0
    raw[:, 1] = known.is_last
    raw[:, 2] = known.mastery
    raw[:, 3] = known.seen
    raw[:, 4] = known.ability
    raw[:, 5] = known.mean
    second[:, SCALED_START + _SECOND_PASS] = scaler.apply(raw, _SECOND_PASS)
    return second
