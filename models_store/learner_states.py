"""Where an encoder stands in a learner's history: kept between requests, so that only new events are encoded.

A stored state carries the stamp that the learner's history had before it was read; while the learner still has it, the state
is current and nothing is counted or read. Otherwise it is used as far as it still stands for exactly the events that come
first in the learner's order. Whoever stores an event that sorts before the last encoded one drops the state, and it is
checked here once more, because a state can also be written by a request that had read the history just before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from django.db import IntegrityError, transaction
from django.db.models import Count, Q
from django.utils import timezone

from aivo_core.encoding.encoder import Encoder
from aivo_core.encoding.errors import EncodingError
from aivo_core.encoding.state import EncoderState
from learners.histories import History, read_history
from learners.models import EncoderState as EncoderStateRow
from learners.models import Interaction

_LEARNERS_PER_QUERY = 400


def current_state(learner: UUID, history_stamp: UUID, encoder: Encoder) -> EncoderState:
    """The encoder's state after all of the learner's events; stored for the next time.

    Args:
        learner: primary key. history_stamp: the learner's, read before this call.

    Raises:
        EncodingError: ``bad_event``: an interaction that cannot be encoded.
    """
    row = EncoderStateRow.objects.filter(learner=learner, encoder_sha256=encoder.sha256).first()
    return _current(learner, history_stamp, encoder, row)


def current_states(stamps: Mapping[UUID, UUID], encoder: Encoder) -> dict[UUID, EncoderState | EncodingError]:
    """As ``current_state``, of many learners: stored states are read together, an error stands in its learner's place.

    Args:
        stamps: history stamp by primary key.
    """
    rows = _rows(stamps, encoder)
    found: dict[UUID, EncoderState | EncodingError] = {}
    for learner, stamp in stamps.items():
        try:
            found[learner] = _current(learner, stamp, encoder, rows.get(learner))
        except EncodingError as error:
            found[learner] = error
    return found


def _rows(learners: Iterable[UUID], encoder: Encoder) -> dict[UUID, EncoderStateRow]:
    keys = list(learners)
    rows: dict[UUID, EncoderStateRow] = {}
    for start in range(0, len(keys), _LEARNERS_PER_QUERY):
        part = keys[start : start + _LEARNERS_PER_QUERY]
        for row in EncoderStateRow.objects.filter(learner__in=part, encoder_sha256=encoder.sha256):
            rows[row.learner_id] = row
    return rows


def _current(learner: UUID, history_stamp: UUID, encoder: Encoder, row: EncoderStateRow | None) -> EncoderState:
    known = _read(row, encoder) if row is not None else None
    if row is None or known is None or (row.history_stamp != history_stamp and not _stands_for_the_first_events(row)):
        history = read_history(learner)
        known = encoder.new_state()
    elif row.history_stamp == history_stamp:
        return known
    elif row.last_seq is not None:
        history = read_history(learner, after_seq=row.last_seq)
    else:
        history = read_history(learner, after_time=row.last_occurred_at)
    state = encoder.encode(history.events, known)[1]
    if state.events:
        _store(learner, history_stamp, row, state, _last(row, history, known))
    return state


def _read(row: EncoderStateRow, encoder: Encoder) -> EncoderState | None:
    """The stored state; None where it is of another format or encoder and must be replayed."""
    try:
        state = EncoderState.from_json(row.state)
    except EncodingError:
        return None
    return state if state.encoder == encoder.sha256 and state.events == row.events else None


def _stands_for_the_first_events(row: EncoderStateRow) -> bool:
    """Whether as many interactions as were encoded come up to and with the last encoded one, in an order that is the same."""
    by_seq = row.last_seq is not None
    last = Q(seq__lte=row.last_seq) if by_seq else Q(occurred_at__lte=row.last_occurred_at)
    counts = Interaction.objects.filter(learner=row.learner_id).aggregate(
        covered=Count("pk", filter=last), without_seq=Count("pk", filter=Q(seq=None))
    )
    return counts["covered"] == row.events and not (by_seq and counts["without_seq"])


def _last(row: EncoderStateRow | None, history: History, known: EncoderState) -> dict[str, Any]:
    """Where the last encoded event stands, for the row: of the history just read, else of the row as it was."""
    if row is None or not known.events:
        return {"last_seq": history.last_seq, "last_occurred_at": history.last_occurred_at}
    return {
        "last_seq": row.last_seq if history.last_seq is None else history.last_seq,
        "last_occurred_at": history.last_occurred_at or row.last_occurred_at,
    }


def _store(learner: UUID, history_stamp: UUID, row: EncoderStateRow | None, state: EncoderState, last: Mapping[str, Any]) -> None:
    """Keep the state, unless another request was faster. One that a new interaction has overtaken meanwhile does no harm: its
    stamp is no longer the learner's.
    """
    values = {"encoder_sha256": state.encoder, "state": state.to_json(), "events": state.events, "history_stamp": history_stamp}
    values.update(last)
    if row is not None:
        unchanged = EncoderStateRow.objects.filter(pk=row.pk, events=row.events, history_stamp=row.history_stamp)
        unchanged.update(**values, updated_at=timezone.now())
        return
    try:
        with transaction.atomic():
            EncoderStateRow.objects.create(learner_id=learner, **values)
    except IntegrityError:
        return  # another request stored it, or the learner was erased
