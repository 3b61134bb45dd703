"""Dropping encoder states that new interactions have overtaken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from uuid import UUID

from learners.bulk_insert import NewInteraction
from learners.models import EncoderState


def drop_overtaken_states(rows: Sequence[NewInteraction], *, before: Mapping[UUID, bool]) -> int:
    """Drop the states of learners with a new interaction that sorts before the last encoded one; they are replayed later.

    A learner is ordered by ``seq`` if all rows have one, else by time; a first row without ``seq`` changes the order of all,
    so it drops the state as well.

    Args:
        rows: interactions just stored.
        before: learners who had interactions before, with whether some of those had no ``seq``.

    Returns:
        Number of states dropped.
    """
    lowest: dict[UUID, _Lowest] = {}
    for row in rows:
        if row.learner in before:
            lowest.setdefault(row.learner, _Lowest()).add(row)
    overtaken = []
    states = EncoderState.objects.filter(learner__in=list(lowest)).values_list("pk", "learner", "last_seq", "last_occurred_at")
    for key, learner, last_seq, last_time in states:
        found = lowest[learner]
        if before[learner]:
            stays = found.time is not None and last_time is not None and found.time >= last_time
        else:
            stays = not found.without_seq and found.seq is not None and last_seq is not None and found.seq > last_seq
        if not stays:
            overtaken.append(key)
    EncoderState.objects.filter(pk__in=overtaken).delete()
    return len(overtaken)


class _Lowest:
    """The earliest place among some new interactions of one learner."""

    def __init__(self) -> None:
        self.seq: int | None = None
        self.time: datetime | None = None
        self.without_seq = False

    def add(self, row: NewInteraction) -> None:
        seq, time = row.event.seq, row.event.occurred_at
        if seq is None:
            self.without_seq = True
        elif self.seq is None or seq < self.seq:
            self.seq = seq
        if time is not None and (self.time is None or time < self.time):
            self.time = time
