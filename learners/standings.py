"""Where each learner stands before a batch of interactions: who it is, and which events it has.

Reading this from the database row by row would cost more than the import itself. A learner's standing is read once, kept
up to date while rows are accepted, and tells for most rows (those after everything known) that they must be new.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol
from uuid import UUID, uuid4

from django.db.models import Count, Max
from django.db.models.functions import Lower

from learners.models import Interaction, Learner

_IDS_PER_QUERY = 500


class IncomingEvent(Protocol):
    """What the intake needs to know of an event; ``csv_rows.ParsedRow`` is one."""

    @property
    def learner_id(self) -> str: ...
    @property
    def event_id(self) -> str: ...
    @property
    def own_event_id(self) -> bool: ...
    @property
    def seq(self) -> int | None: ...
    @property
    def occurred_at(self) -> datetime | None: ...
    @property
    def subject(self) -> str: ...
    @property
    def category(self) -> str: ...
    @property
    def item_id(self) -> str: ...
    @property
    def difficulty(self) -> float | None: ...
    @property
    def action(self) -> str: ...
    @property
    def score(self) -> float: ...
    @property
    def response_ms(self) -> int | None: ...
    @property
    def hints(self) -> int | None: ...
    @property
    def attempts(self) -> int | None: ...
    @property
    def session_id(self) -> str: ...


@dataclass(slots=True)
class Standing:
    """One learner as known so far; ``key`` is the primary key, decided before the row exists where ``new``."""

    learner_id: str
    pool: str
    organisation: UUID
    key: UUID = field(default_factory=uuid4)
    new: bool = True
    events: int = 0
    highest_seq: int | None = None
    latest_time: datetime | None = None
    last_arrival: int = 0
    some_without_seq: bool = False
    some_without_time: bool = False

    def must_be_new(self, event: IncomingEvent) -> bool:
        """Whether no stored event can be the same one or have the same place: it lies after all of them.

        A computed event id contains the place; an id of the source's own may come again anywhere.
        """
        if self.events == 0:
            return True
        if event.own_event_id:
            return False
        if event.seq is not None:
            return self.highest_seq is None or event.seq > self.highest_seq
        return self.latest_time is None or (event.occurred_at is not None and event.occurred_at > self.latest_time)

    def accept(self, event: IncomingEvent) -> int:
        """Take note of an accepted event and return its order of arrival."""
        self.events += 1
        self.last_arrival += 1
        if event.seq is None:
            self.some_without_seq = True
        elif self.highest_seq is None or event.seq > self.highest_seq:
            self.highest_seq = event.seq
        if event.occurred_at is None:
            self.some_without_time = True
        elif self.latest_time is None or event.occurred_at > self.latest_time:
            self.latest_time = event.occurred_at
        return self.last_arrival


class Standings:
    """Standings by learner id without regard to case; the ``limit`` used latest are kept (None: all)."""

    def __init__(self, *, limit: int | None = 20_000) -> None:
        self._limit = limit
        self._known: OrderedDict[str, Standing] = OrderedDict()

    def get(self, learner_id: str) -> Standing | None:
        return self._known.get(learner_id.lower())

    def add(self, standing: Standing) -> None:
        self._known[standing.learner_id.lower()] = standing

    def clear(self) -> None:
        """Forget everything: after a batch that was rolled back, memory and database differ."""
        self._known.clear()

    def load(self, learner_ids: Iterable[str]) -> None:
        """Make sure that every stored learner of these ids is known here, and drop those unused for longest."""
        wanted = dict.fromkeys(learner_id.lower() for learner_id in learner_ids)
        for lower in wanted:
            if lower in self._known:
                self._known.move_to_end(lower)
        for ids in _portions([lower for lower in wanted if lower not in self._known]):
            self._load_portion(ids)
        while self._limit is not None and len(self._known) > max(self._limit, len(wanted)):
            self._known.popitem(last=False)

    def _load_portion(self, lower_ids: Sequence[str]) -> None:
        learners = Learner.objects.annotate(lower_id=Lower("learner_id")).filter(lower_id__in=lower_ids).order_by()
        found = {
            key: Standing(learner_id=learner_id, pool=pool, organisation=organisation, key=key, new=False)
            for key, learner_id, pool, organisation in learners.values_list("pk", "learner_id", "pool", "organisation_id")
        }
        counts = Interaction.objects.filter(learner__in=list(found)).order_by().values("learner")
        for row in counts.annotate(
            events=Count("pk"),
            with_seq=Count("seq"),
            with_time=Count("occurred_at"),
            highest_seq=Max("seq"),
            latest_time=Max("occurred_at"),
            last_arrival=Max("arrival"),
        ):
            standing = found[row["learner"]]
            standing.events = row["events"]
            standing.highest_seq = row["highest_seq"]
            standing.latest_time = row["latest_time"]
            standing.last_arrival = row["last_arrival"]
            standing.some_without_seq = row["with_seq"] < row["events"]
            standing.some_without_time = row["with_time"] < row["events"]
        for standing in found.values():
            self.add(standing)


def _portions(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), _IDS_PER_QUERY):
        yield values[start : start + _IDS_PER_QUERY]
