"""What the encoder remembers of one learner between events."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from aivo_core.encoding.columns import SLOTS, SUBJECT_SLOTS
from aivo_core.encoding.errors import EncodingError

RECENT_SCORES = 20
RECENT_DECILES = 5
RECENT_SLOTS = 6

SNAPSHOT = (
    "slot",
    "item",
    "item_mean",
    "decile",
    "subject",
    "mastery",
    "category_ability",
    "ability",
    "score_mean_fast",
    "score_mean_slow",
    "streak",
    "attempts_mean",
    "response_mean",
    "response_known",
    "distinct_items",
    "largest_count",
    "count",
    "session_events",
    "session_score",
    "session_index",
    "run",
    "gap",
    "gap_known",
    "time_known",
    "attempts",
    "score",
)
"""The learner right after an event, as far as rows read it: one float64 each."""

SNAPSHOT_INDEX = {name: index for index, name in enumerate(SNAPSHOT)}
STATE_FORMAT = 1


@dataclass
class EncoderState:
    """State of one learner after ``events`` events; belongs to the encoder whose hash it carries.

    Per category slot: ``mastery`` (m_c), ``ability`` (theta_c), ``counts``, ``last_seen`` (position of the last event, -1
    where none). ``recent_*`` are the latest values, oldest first. ``snapshot`` is empty before the first event.
    """

    encoder: str
    mean: float
    events: int = 0
    mastery: list[float] = field(default_factory=list)
    ability: list[float] = field(default_factory=lambda: [0.0] * SLOTS)
    counts: list[int] = field(default_factory=lambda: [0] * SLOTS)
    last_seen: list[int] = field(default_factory=lambda: [-1] * SLOTS)
    largest_count: int = 0
    overall_ability: float = 0.0
    score_mean_fast: float = 0.0
    score_mean_slow: float = 0.0
    streak: int = 0
    attempts_mean: float | None = None
    response_mean: float | None = None
    items: dict[str, None] = field(default_factory=dict)
    last_item_decile: int = 0
    last_slot: int = -1
    last_subject: str = ""
    last_seconds: float | None = None
    run: int = 0
    session_events: int = 0
    session_score: float = 0.0
    session_index: int = 0
    recent_scores: list[float] = field(default_factory=lambda: [0.0] * RECENT_SCORES)
    recent_deciles: list[float] = field(default_factory=lambda: [0.0] * RECENT_DECILES)
    recent_slots: list[int] = field(default_factory=lambda: [-1] * RECENT_SLOTS)
    subject_counts: list[float] = field(default_factory=lambda: [0.0] * SUBJECT_SLOTS)
    subject_scores: list[float] = field(default_factory=lambda: [0.0] * SUBJECT_SLOTS)
    snapshot: tuple[float, ...] = ()

    @classmethod
    def new(cls, *, encoder: str, mean: float) -> EncoderState:
        """A learner with no event; ``mean`` is the curriculum's mean score, where every running mean starts."""
        return cls(encoder=encoder, mean=mean, mastery=[mean] * SLOTS, score_mean_fast=mean, score_mean_slow=mean)

    def copy(self) -> EncoderState:
        """An independent copy."""
        twin = copy.copy(self)
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, list | dict):
                setattr(twin, f.name, value.copy())
        return twin

    def to_json(self) -> dict[str, Any]:
        """JSON form; floats survive bit for bit. Slots that were never seen are left out."""
        data: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        data["format"] = STATE_FORMAT
        data["categories"] = {
            str(slot): [count, self.last_seen[slot], self.mastery[slot], self.ability[slot]]
            for slot, count in enumerate(self.counts)
            if count
        }
        for name in ("mastery", "ability", "counts", "last_seen"):
            del data[name]
        data["items"] = list(self.items)
        data["snapshot"] = list(self.snapshot)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EncoderState:
        """Inverse of ``to_json``.

        Raises:
            EncodingError: ``bad_state``: fields missing or unknown, or values of a wrong type, length or range.
        """
        expected = ({f.name for f in fields(cls)} | {"format", "categories"}) - {"mastery", "ability", "counts", "last_seen"}
        if not isinstance(data, Mapping) or set(data) != expected:
            raise EncodingError(f"encoder state needs exactly the fields {sorted(expected)}", code="bad_state")
        if data["format"] != STATE_FORMAT:
            raise EncodingError(f"format of the encoder state must be {STATE_FORMAT}, not {data['format']!r}", code="bad_state")
        try:
            state = cls._read(data)
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise EncodingError(f"encoder state cannot be read: {error}", code="bad_state") from error
        state._check()
        return state

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> EncoderState:
        state = cls.new(encoder=str(data["encoder"]), mean=float(data["mean"]))
        for name in ("events", "largest_count", "streak", "last_item_decile", "last_slot", "run"):
            setattr(state, name, int(data[name]))
        for name in ("session_events", "session_index"):
            setattr(state, name, int(data[name]))
        for name in ("overall_ability", "score_mean_fast", "score_mean_slow", "session_score"):
            setattr(state, name, float(data[name]))
        for name in ("attempts_mean", "response_mean", "last_seconds"):
            setattr(state, name, None if data[name] is None else float(data[name]))
        for name in ("recent_scores", "recent_deciles", "subject_counts", "subject_scores"):
            setattr(state, name, [float(value) for value in data[name]])
        state.recent_slots = [int(value) for value in data["recent_slots"]]
        state.items = dict.fromkeys(str(item) for item in data["items"])
        state.last_subject = str(data["last_subject"])
        state.snapshot = tuple(float(value) for value in data["snapshot"])
        for key, (count, last_seen, mastery, ability) in data["categories"].items():
            slot = int(key)
            if not 0 <= slot < SLOTS:
                raise ValueError(f"categories names slot {slot}, allowed are 0..{SLOTS - 1}")
            state.counts[slot], state.last_seen[slot] = int(count), int(last_seen)
            state.mastery[slot], state.ability[slot] = float(mastery), float(ability)
        return state

    def _check(self) -> None:
        lengths = {
            "recent_scores": RECENT_SCORES,
            "recent_deciles": RECENT_DECILES,
            "recent_slots": RECENT_SLOTS,
            "subject_counts": SUBJECT_SLOTS,
            "subject_scores": SUBJECT_SLOTS,
            "snapshot": len(SNAPSHOT) if self.events else 0,
        }
        for name, length in lengths.items():
            values = getattr(self, name)
            if len(values) != length or not all(math.isfinite(value) for value in values):
                raise EncodingError(f"{name} of the encoder state needs {length} finite numbers", code="bad_state")
        numbers = (self.mean, self.overall_ability, self.score_mean_fast, self.score_mean_slow, self.session_score)
        if not all(math.isfinite(value) for value in (*numbers, *self.mastery, *self.ability)):
            raise EncodingError("encoder state holds a number that is not finite", code="bad_state")
        if self.events < 0 or sum(self.counts) != self.events:
            raise EncodingError("events of the encoder state must equal the sum of its category counts", code="bad_state")
        if self.events and not 0 <= self.last_slot < SLOTS:
            raise EncodingError(f"last_slot of the encoder state must be 0..{SLOTS - 1}", code="bad_state")
        if any(last >= self.events for last in self.last_seen):
            raise EncodingError("last_seen of the encoder state lies after its last event", code="bad_state")
