"""What the network is given for a learner's next step, kept in memory while the learner's history is the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from uuid import UUID

import numpy as np

from aivo_core.encoding.encoder import Encoder, Prediction
from aivo_core.encoding.errors import EncodingError
from aivo_core.encoding.state import EncoderState
from aivo_core.network import FloatArray
from models_store.cache import RecentlyUsed
from models_store.explanation import with_groups_left_out
from models_store.learner_states import current_state, current_states
from models_store.serving_stamps import ServingStamp

CACHED_INPUTS = 4096
"""Learners kept per process, some 8 KB each."""


@dataclass(frozen=True)
class LearnerInputs:
    """A learner's first-pass rows and what the second pass needs.

    Attributes:
        events: of the learner; 0 for one who has none, and then nothing else.
        rows: (1 + groups, 256) float32: the prediction's row, then without each feature group.
    """

    events: int
    prediction: Prediction | None
    rows: FloatArray


def inputs_of(stamp: ServingStamp, encoder: Encoder) -> LearnerInputs:
    """The learner's inputs by the encoder; a warm one needs no query.

    Raises:
        EncodingError: ``bad_event``: an interaction that cannot be encoded.
    """
    key = (stamp.learner, stamp.history_stamp, encoder.sha256)
    return _inputs.get_or_make(key, lambda: _made(encoder, current_state(stamp.learner, stamp.history_stamp, encoder)))


def inputs_of_many(stamps: Iterable[ServingStamp], encoder: Encoder) -> dict[UUID, LearnerInputs | EncodingError]:
    """As ``inputs_of``, by primary key; an error stands in its learner's place."""
    found: dict[UUID, LearnerInputs | EncodingError] = {}
    missing: dict[UUID, UUID] = {}
    for stamp in stamps:
        kept = _inputs.get((stamp.learner, stamp.history_stamp, encoder.sha256))
        if kept is None:
            missing[stamp.learner] = stamp.history_stamp
        else:
            found[stamp.learner] = kept
    for learner, state in current_states(missing, encoder).items():
        if isinstance(state, EncodingError):
            found[learner] = state
            continue
        found[learner] = made = _made(encoder, state)
        _inputs.keep((learner, missing[learner], encoder.sha256), made)
    return found


def clear_learner_inputs() -> None:
    """Forget the inputs kept in this process."""
    _inputs.clear()


_inputs: RecentlyUsed[tuple[UUID, UUID, str], LearnerInputs] = RecentlyUsed(CACHED_INPUTS)


def _made(encoder: Encoder, state: EncoderState) -> LearnerInputs:
    if not state.events:
        return LearnerInputs(0, None, np.empty((0, 0), dtype=np.float32))
    prediction = encoder.prediction(state)
    return LearnerInputs(state.events, prediction, with_groups_left_out(encoder, prediction.first[None])[0])
