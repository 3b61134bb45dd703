"""Reading what learners did, in their order, as the encoder sees it.

A learner is ordered by ``seq`` if all its rows have one, else by ``occurred_at`` and then by arrival.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from django.db.models import QuerySet

from aivo_core.encoding.events import Event
from learners.models import Interaction, Learner

LEARNERS_PER_QUERY = 50
"""Learners read at once: memory holds the interactions of so many."""

_FIELDS = (
    "learner_id", "seq", "occurred_at", "arrival", "category", "item_id", "subject", "score", "response_ms", "attempts",
)  # fmt: skip
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_Row = tuple[Any, ...]


@dataclass(frozen=True)
class History:
    """Events of one learner in its order, and where the last one stands.

    Attributes:
        last_seq: None where the learner is ordered by time, or where there is no event. last_occurred_at: the latest time of
            the events, if any has one.
    """

    events: list[Event]
    last_seq: int | None
    last_occurred_at: datetime | None


def read_history(learner: UUID, *, after_seq: int | None = None, after_time: datetime | None = None) -> History:
    """Events of the learner with this primary key; all of them, or only those after a place of its order.

    Args:
        after_seq: of a learner who is ordered by ``seq``: only events with a greater one.
        after_time: of a learner who is ordered by time: only later events.
    """
    found = Interaction.objects.filter(learner=learner)
    if after_seq is not None:
        found = found.filter(seq__gt=after_seq)
    elif after_time is not None:
        found = found.filter(occurred_at__gt=after_time)
    rows = list(found.order_by().values_list(*_FIELDS))
    by_seq = after_time is None and all(row[1] is not None for row in rows)
    return History(
        events=_events(rows),
        last_seq=max((row[1] for row in rows), default=None) if by_seq else None,
        last_occurred_at=max((row[2] for row in rows if row[2] is not None), default=None),
    )


def iter_histories(
    learners: QuerySet[Learner], *, learners_per_query: int = LEARNERS_PER_QUERY
) -> Iterator[tuple[Learner, list[Event]]]:
    """Each learner with all its events in its order; those without events come too.

    Learners come in the queryset's order, by ``learner_id`` where it has none.

    The learners are fixed at the first step: one query for their keys, then two per ``learners_per_query`` of them. A learner
    who is erased meanwhile is left out.

    Raises:
        ValueError: ``learners_per_query`` is below 1.
    """
    if learners_per_query < 1:
        raise ValueError(f"learners_per_query must be at least 1, not {learners_per_query}")
    ordered = learners if learners.ordered else learners.order_by("learner_id")
    keys = list(ordered.values_list("pk", flat=True))
    for start in range(0, len(keys), learners_per_query):
        portion = keys[start : start + learners_per_query]
        found: dict[Any, Learner] = Learner.objects.in_bulk(portion)
        rows: dict[Any, list[_Row]] = {key: [] for key in portion}
        for row in Interaction.objects.filter(learner__in=portion).order_by().values_list(*_FIELDS).iterator(chunk_size=5_000):
            rows[row[0]].append(row)
        for key in portion:
            if key in found:
                yield found[key], _events(rows.pop(key))


def _events(rows: Sequence[_Row]) -> list[Event]:
    by_seq = all(row[1] is not None for row in rows)
    # Where a row has no seq every row has a time: the intake takes care of that.
    ordered = sorted(rows, key=(lambda row: row[1]) if by_seq else (lambda row: (row[2], row[3])))
    return [
        Event(
            category=category,
            item=item_id,
            subject=subject,
            score=score,
            seconds=None if occurred_at is None else (occurred_at - _EPOCH).total_seconds(),
            response_ms=response_ms,
            attempts=attempts,
        )
        for _, _, occurred_at, _, category, item_id, subject, score, response_ms, attempts in ordered
    ]
