"""The encoder: a learner's events in, samples and predictions out. Frozen, and part of its main model version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from aivo_core.encoding import artefact
from aivo_core.encoding.assemble import last_items, sample_states, samples
from aivo_core.encoding.columns import INDEX, INPUT_DIM, OVERFLOW_SLOT, SCALED_START, SLOTS
from aivo_core.encoding.errors import EncodingError
from aivo_core.encoding.events import Event
from aivo_core.encoding.rows import KnownCategory, Scaler, raw_rows, second_pass
from aivo_core.encoding.scan import Trail, scan
from aivo_core.encoding.state import EncoderState
from aivo_core.encoding.tables import Scale, Transitions, Vocabulary
from aivo_core.ordinal import LEVELS
from aivo_core.samples import Samples, concatenate

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

CHUNK = 4096
"""Events encoded at a time: bounds the memory of a very long history, changes no bit of the result."""


@dataclass(frozen=True)
class Prediction:
    """Inputs for a learner's next event.

    Attributes:
        first: (256,) float32, first-pass row.
        content_prior: (128,) float32, the encoder's own forecast of the next category slot.
        mastery, ability: (128,) float32, seen: (128,) bool, last_slot: what the second pass reads of the learner's state.
    """

    first: Float32Array
    content_prior: Float32Array
    mastery: Float32Array
    ability: Float32Array
    seen: npt.NDArray[np.bool_]
    last_slot: int


@dataclass(frozen=True, eq=False)
class Encoder:
    """Vocabularies, tables and scalers of one fit.

    ``context_slots``: (64,) int64, slots of the subject group. ``success_by_level``: (9,) float64, share of right answers
    of the curriculum at the levels 1..9, never rising: the answer for a learner without any event.
    """

    vocabulary: Vocabulary
    scale: Scale
    transitions: Transitions
    scaler: Scaler
    context_slots: IntArray
    success_by_level: Float64Array

    @cached_property
    def sha256(self) -> str:
        """Hash of the content: equal exactly when every table, name and number is equal."""
        return artefact.content_hash(*self.to_files())

    @property
    def base_rates(self) -> Float64Array:
        """(128,) float64, share of each category slot among the curriculum's events: for a learner without any event."""
        return self.transitions.base_rates

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the slots 0, 1, ...; slots from ``len(categories)`` on have no name, slot 127 takes all others."""
        return self.vocabulary.categories

    def to_files(self) -> tuple[bytes, dict[str, npt.NDArray[np.generic]]]:
        """Content of ``encoder.json`` and the tensors (float64, float32, int64) of ``encoder.safetensors``."""
        return artefact.write(
            artefact.Parts(
                vocabulary=self.vocabulary,
                scale=self.scale,
                transitions=self.transitions,
                scaler=self.scaler,
                context_slots=self.context_slots,
                success_by_level=self.success_by_level,
            )
        )

    @classmethod
    def from_files(cls, json_bytes: bytes, tensors: Mapping[str, npt.NDArray[np.generic]]) -> Encoder:
        """Inverse of ``to_files``.

        Raises:
            EncodingError: ``bad_encoder``: a field or tensor is missing, unknown, or of a wrong type, shape or range.
        """
        parts = artefact.read(json_bytes, tensors)
        return cls(
            vocabulary=parts.vocabulary,
            scale=parts.scale,
            transitions=parts.transitions,
            scaler=parts.scaler,
            context_slots=parts.context_slots,
            success_by_level=parts.success_by_level,
        )

    def slot(self, category: str) -> int:
        """Category slot 0..127; a category that is not among the 127 has slot 127."""
        return self.vocabulary.slot(category)

    def category(self, slot: int) -> str | None:
        """Name of a slot, None for slot 127 and for slots without a category."""
        return self.vocabulary.categories[slot] if 0 <= slot < len(self.vocabulary.categories) else None

    def level(self, item: str, category: str) -> float:
        """Continuous difficulty level .5 (easiest) .. 9.5 of an item; an unknown item stands at its category's mean."""
        return self.scale.place(self.vocabulary.item(item), self.slot(category)).level

    def expected_levels(self, first: Float32Array) -> Float64Array:
        """(n, 256) first-pass rows -> (n,) level that the item mean expected after the last item stands at."""
        column = SCALED_START + INDEX["expected_item_mean"]
        scaled = first[:, column].astype(np.float64)
        mean = scaled * self.scaler.deviation[INDEX["expected_item_mean"]] + self.scaler.mean[INDEX["expected_item_mean"]]
        return 0.5 + LEVELS * self.scale.hardness(mean)

    def new_state(self) -> EncoderState:
        """State of a learner without any event."""
        return EncoderState.new(encoder=self.sha256, mean=self.scale.mean)

    def encode(self, events: Sequence[Event], state: EncoderState | None = None) -> tuple[Samples, EncoderState]:
        """Samples of the given events, and the state after them.

        Args:
            events: in the learner's order, all after those that ``state`` has seen.
            state: where to go on (left unchanged); None begins a new learner, whose first event gives no sample.

        Raises:
            EncodingError: ``bad_event`` naming event and field; ``different_encoder`` for another encoder's state.
        """
        current = self.new_state() if state is None else self._own(state).copy()
        chunks = [events[start : start + CHUNK] for start in range(0, len(events), CHUNK)]
        parts = [self._samples(scan(self.vocabulary, self.scale, current, chunk)) for chunk in chunks or [()]]
        whole = parts[0] if len(parts) == 1 else concatenate(parts)
        return replace(whole, events=current.events), current

    def prediction(self, state: EncoderState) -> Prediction:
        """Inputs for the learner's next event.

        Raises:
            EncodingError: ``no_events`` where there is nothing to encode yet (use ``base_rates`` and
                ``success_by_level``); ``different_encoder``.
        """
        if not self._own(state).events:
            raise EncodingError("a learner without any event has no row; use base_rates and success_by_level", code="no_events")
        trail = scan(self.vocabulary, self.scale, state, ())
        states = np.zeros(1, dtype=np.int64)
        forecast = self.transitions.forecast(*last_items(trail, states))
        raw = raw_rows(trail, states, forecast, self.context_slots)
        return Prediction(
            first=raw.first_pass(self.scaler)[0],
            content_prior=forecast.q[0],
            mastery=raw.mastery[0],
            ability=raw.ability[0],
            seen=raw.seen[0],
            last_slot=int(raw.last_slot[0]),
        )

    def second_pass(self, prediction: Prediction | Float32Array, state: EncoderState, slot: int) -> Float32Array:
        """(256,) float32: the prediction's row once the category slot 0..127 of the next event is chosen.

        Raises:
            EncodingError: ``bad_event`` for a slot outside 0..127 or a row of a wrong shape; ``different_encoder``.
        """
        first = prediction.first if isinstance(prediction, Prediction) else prediction
        if first.shape != (INPUT_DIM,) or first.dtype != np.float32:
            raise EncodingError(
                f"first must be float32 of shape ({INPUT_DIM},), not {first.dtype} {first.shape}", code="bad_event"
            )
        if not 0 <= slot < SLOTS:
            raise EncodingError(f"slot must be 0..{OVERFLOW_SLOT}, not {slot}", code="bad_event")
        self._own(state)
        known = KnownCategory(
            slot=np.array([slot], dtype=np.int64),
            is_last=np.array([slot == state.last_slot]),
            mastery=np.array([state.mastery[slot]], dtype=np.float32),
            ability=np.array([state.ability[slot]], dtype=np.float32),
            seen=np.array([state.counts[slot] > 0]),
            mean=self.scale.category_mean[[slot]],
        )
        return np.asarray(second_pass(first[None, :], known, self.context_slots, self.scaler)[0])

    def second_passes(self, predictions: Sequence[Prediction], slots: IntArray) -> Float32Array:
        """(n, 256) float32: the rows of n learners' predictions once the slot of each one's next event is chosen.

        Args:
            predictions: of this encoder. slots: (n,) int64, 0..127.

        Raises:
            EncodingError: ``bad_event`` for a slot outside 0..127, or for another number of slots than predictions.
        """
        if slots.shape != (len(predictions),) or (len(slots) and not 0 <= slots.min() <= slots.max() < SLOTS):
            raise EncodingError(f"slots must be {len(predictions)} numbers 0..{OVERFLOW_SLOT}, not {slots}", code="bad_event")
        read = [
            (one.mastery[slot], one.ability[slot], one.seen[slot], slot == one.last_slot)
            for one, slot in zip(predictions, slots.tolist(), strict=True)
        ]
        mastery, ability, seen, is_last = np.array(read, dtype=np.float32).reshape(-1, 4).T
        known = KnownCategory(
            slot=slots,
            is_last=is_last > 0.0,
            mastery=mastery,
            ability=ability,
            seen=seen > 0.0,
            mean=self.scale.category_mean[slots],
        )
        first = np.array([one.first for one in predictions])
        return second_pass(first, known, self.context_slots, self.scaler)

    def _samples(self, trail: Trail) -> Samples:
        states = sample_states(trail)
        forecast = self.transitions.forecast(*last_items(trail, states))
        raw = raw_rows(trail, states, forecast, self.context_slots)
        return samples(
            trail,
            states,
            forecast=forecast,
            raw=raw,
            scale=self.scale,
            scaler=self.scaler,
            context_slots=self.context_slots,
        )

    def _own(self, state: EncoderState) -> EncoderState:
        if state.encoder != self.sha256:
            raise EncodingError(
                f"the state belongs to encoder {state.encoder[:12]}, not to {self.sha256[:12]}: replay the learner's events",
                code="different_encoder",
            )
        return state
