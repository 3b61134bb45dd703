"""Where an encoder stands in a learner's history: kept between requests, so that only new events are encoded.

A stored state is used only while it stands for exactly the events that come first in the learner's order; whoever stores an
event that sorts before the last encoded one drops it, and it is checked here once more, because a state can also be written
by a request that had read the history just before.
"""

from __future__ import annotations

from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import Count, Max, Q
from django.utils import timezone

from aivo_core.encoding.encoder import Encoder
from aivo_core.encoding.errors import EncodingError
from aivo_core.encoding.state import EncoderState
from learners.histories import read_history
from learners.models import EncoderState as EncoderStateRow
from learners.models import Interaction, Learner


def current_state(learner: Learner, encoder: Encoder) -> EncoderState:
    """The encoder's state after all of the learner's events; stored for the next time.

    Raises:
        EncodingError: ``bad_event``: an interaction that cannot be encoded.
    """
    row = EncoderStateRow.objects.filter(learner=learner, encoder_sha256=encoder.sha256).first()
    total, covered = _counts(learner, row)
    state = _read(row, encoder) if row is not None and covered == row.events else None
    if state is not None and row is not None and total == row.events:
        return state
    events = read_history(learner)
    if not events:
        return encoder.new_state()
    known = state.events if state is not None else 0
    state = encoder.encode(events[known:], state)[1]
    _store(learner, encoder, row, state)
    return state


def _counts(learner: Learner, row: EncoderStateRow | None) -> tuple[int, int]:
    """Events of the learner in all, and up to and with the last encoded one (-1 where the order is another one now)."""
    if row is None:
        return 0, 0
    by_seq = row.last_seq is not None
    last = Q(seq__lte=row.last_seq) if by_seq else Q(occurred_at__lte=row.last_occurred_at)
    counts = Interaction.objects.filter(learner=learner).aggregate(
        total=Count("pk"), covered=Count("pk", filter=last), without_seq=Count("pk", filter=Q(seq=None))
    )
    if by_seq and counts["without_seq"]:
        return int(counts["total"]), -1
    return int(counts["total"]), int(counts["covered"])


def _read(row: EncoderStateRow, encoder: Encoder) -> EncoderState | None:
    """The stored state; None where it is of another format or encoder and must be replayed."""
    try:
        state = EncoderState.from_json(row.state)
    except EncodingError:
        return None
    return state if state.encoder == encoder.sha256 and state.events == row.events else None


def _store(learner: Learner, encoder: Encoder, row: EncoderStateRow | None, state: EncoderState) -> None:
    """Keep the state, unless the history has changed since it was read or another request was faster."""
    last = Interaction.objects.filter(learner=learner).aggregate(
        without_seq=Count("pk", filter=Q(seq=None)), seq=Max("seq"), time=Max("occurred_at"), n=Count("pk")
    )
    if last["n"] != state.events:
        return
    by_seq = not last["without_seq"]
    values: dict[str, Any] = {
        "state": state.to_json(),
        "events": state.events,
        "last_seq": last["seq"] if by_seq else None,
        "last_occurred_at": last["time"],
        "updated_at": timezone.now(),
    }
    if row is not None:
        EncoderStateRow.objects.filter(pk=row.pk, events=row.events).update(**values)
        return
    values.pop("updated_at")
    try:
        with transaction.atomic():
            EncoderStateRow.objects.create(learner=learner, encoder_sha256=encoder.sha256, **values)
    except IntegrityError:
        return  # another request stored it, or the learner was erased
