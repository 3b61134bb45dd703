"""Taking batches of interactions into the database: a verdict on each event, then the new ones in one short transaction.

An event is known by its learner and event id. Known and the same: a duplicate. Known with other content, or at a ``seq``
that another event has: refused. A learner's order must stay decidable: all its events have ``seq``, or all have a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn
from uuid import UUID

from django.db import IntegrityError, transaction
from django.utils.translation import gettext as _

from learners.bulk_insert import NewInteraction, insert_interactions
from learners.consents import ConsentGiven, give_consents
from learners.encoder_states import drop_overtaken_states
from learners.import_scratch import ImportScratch
from learners.models import Interaction, Learner, Organisation
from learners.standings import IncomingEvent, Standing, Standings

BATCH_ROWS = 5_000
"""Events in one transaction: other writers wait a fraction of a second at most."""

_TRIES = 3
_VALUES_PER_QUERY = 400

Content = tuple[str, str, float]
"""Category, item id and score: what two events with one id must share."""


class Outcome(Enum):
    IMPORTED = "imported"
    DUPLICATE = "duplicate"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one event; ``reason`` and ``message`` only where it was refused."""

    outcome: Outcome
    reason: str = ""
    message: str = ""


IMPORTED = Verdict(Outcome.IMPORTED)
DUPLICATE = Verdict(Outcome.DUPLICATE)


class _Refused(Exception):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.verdict = Verdict(Outcome.REFUSED, reason, message)


class InteractionIntake:
    """Takes batches into one pool; unknown learners are created with their first accepted event.

    Args:
        pool: pools are disjoint: events of a learner of another pool are refused.
        organisation: of new learners; with ``strict_organisation`` events of a learner of another one are refused.
        consent: given to every learner with an accepted or known event, except where it was withdrawn.
        scratch: counts learners over all batches; in a dry run it stands in for the database.
        dry_run: give verdicts, write nothing.
    """

    def __init__(
        self,
        *,
        pool: str,
        organisation: Organisation,
        strict_organisation: bool,
        consent: ConsentGiven | None,
        scratch: ImportScratch,
        dry_run: bool = False,
    ) -> None:
        self._pool = pool
        self._organisation = organisation
        self._strict_organisation = strict_organisation
        self._consent = consent
        self._scratch = scratch
        self._dry_run = dry_run
        self._standings = Standings(limit=None if dry_run else 20_000)
        self.learners_created = 0
        self.consent_events = 0

    def take(self, batch: Sequence[IncomingEvent]) -> list[Verdict]:
        """One verdict per event, in order. Either all accepted events of the batch are stored, or an error is raised.

        Raises:
            django.db.IntegrityError: other writers changed the same learners again and again meanwhile.
        """
        for attempt in range(1, _TRIES + 1):
            try:
                return self._take_once(batch, doubt_all=attempt > 1)
            except IntegrityError:
                self._standings.clear()
                if attempt == _TRIES:
                    raise
            except BaseException:
                self._standings.clear()
                raise
        raise AssertionError("the last try returns or raises")

    def _take_once(self, batch: Sequence[IncomingEvent], *, doubt_all: bool) -> list[Verdict]:
        if self._dry_run:
            work = self._judge(batch, doubt_all=doubt_all)
            self._scratch.remember_events(work.for_scratch())
            self._scratch.note_learners((key, False) for key in work.touched)
            return work.verdicts
        with transaction.atomic():
            work = self._judge(batch, doubt_all=doubt_all)
            created = self._create_learners(work)
            insert_interactions(work.accepted)
            drop_overtaken_states(work.accepted, before=work.before)
            consents, holders = self._give_consents(work.touched)
        for standing in work.touched.values():
            standing.new = False
        self.learners_created += created
        self.consent_events += consents
        self._scratch.note_learners((key, key in holders) for key in work.touched)
        return work.verdicts

    # --- Verdicts -----------------------------------------------------------------------------------------------------

    def _judge(self, batch: Sequence[IncomingEvent], *, doubt_all: bool) -> _Work:
        self._standings.load(event.learner_id for event in batch)
        known = _KnownEvents(batch, self._standings, self._scratch if self._dry_run else None, doubt_all=doubt_all)
        work = _Work()
        for event in batch:
            try:
                standing = self._standing(event)
                work.verdicts.append(self._judge_event(event, standing, known, work))
            except _Refused as refused:
                work.verdicts.append(refused.verdict)
        return work

    def _standing(self, event: IncomingEvent) -> Standing:
        standing = self._standings.get(event.learner_id)
        if standing is None:
            standing = Standing(learner_id=event.learner_id, pool=self._pool, organisation=self._organisation.pk)
            self._standings.add(standing)
        elif standing.learner_id != event.learner_id:
            _refuse("learner_id_case_twin", _("learner_id differs from that of an earlier learner only in upper and lower case."))
        elif standing.pool != self._pool:
            message = _("The learner belongs to the pool %(pool)s; pools are disjoint.") % {"pool": standing.pool}
            _refuse("learner_in_other_pool", message)
        elif self._strict_organisation and standing.organisation != self._organisation.pk:
            _refuse("learner_in_other_organisation", _("The learner belongs to another organisation."))
        return standing

    def _judge_event(self, event: IncomingEvent, standing: Standing, known: _KnownEvents, work: _Work) -> Verdict:
        content = known.content(standing.key, event.event_id)
        if content is not None:
            if content != (event.category, event.item_id, event.score):
                _refuse("event_id_taken", _("The event id is stored already with another category, item_id or score."))
            work.touched[standing.key] = standing
            return DUPLICATE
        if event.seq is not None and known.has_place(standing.key, event.seq):
            _refuse("seq_taken", _("Another event of the learner has this seq."))
        if event.seq is None and standing.some_without_time:
            _refuse("seq_required", _("Earlier events of the learner have no time, so each needs a seq."))
        if event.occurred_at is None and standing.some_without_seq:
            _refuse("time_required", _("Earlier events of the learner have no seq, so each needs occurred_at."))
        work.accept(event, standing)
        known.add(standing.key, event)
        return IMPORTED

    # --- Writing ------------------------------------------------------------------------------------------------------

    def _create_learners(self, work: _Work) -> int:
        new = [standing for standing in work.touched.values() if standing.new]
        Learner.objects.bulk_create(
            Learner(
                pk=standing.key, learner_id=standing.learner_id, pool=standing.pool, organisation_id=standing.organisation
            )
            for standing in new
        )  # fmt: skip
        return len(new)

    def _give_consents(self, touched: dict[UUID, Standing]) -> tuple[int, frozenset[UUID]]:
        """Events written, and the learners who hold what was asked for (without a request: any consent at all)."""
        learners = list(Learner.objects.filter(pk__in=list(touched)))
        if self._consent is None:
            holders = (one.pk for one in learners if one.consent_training or one.consent_contribution)
            return 0, frozenset(holders)
        given = give_consents(learners=learners, consent=self._consent)
        return given.events, given.holders


class _Work:
    """A batch under judgement: verdicts, accepted events, and the learners that have any."""

    def __init__(self) -> None:
        self.verdicts: list[Verdict] = []
        self.accepted: list[NewInteraction] = []
        self.touched: dict[UUID, Standing] = {}
        self.before: dict[UUID, bool] = {}
        """For learners who had events before: whether some of those had no seq."""

    def accept(self, event: IncomingEvent, standing: Standing) -> None:
        self.touched[standing.key] = standing
        if not standing.new and standing.events:
            self.before.setdefault(standing.key, standing.some_without_seq)
        self.accepted.append(NewInteraction(standing.key, standing.accept(event), event))

    def for_scratch(self) -> Iterable[tuple[UUID, str, int | None, str, str, float]]:
        for new in self.accepted:
            event = new.event
            yield new.learner, event.event_id, event.seq, event.category, event.item_id, event.score


class _KnownEvents:
    """Events of the batch's learners that the batch may meet again: stored ones, and those accepted from it so far."""

    def __init__(
        self, batch: Sequence[IncomingEvent], standings: Standings, scratch: ImportScratch | None, *, doubt_all: bool
    ) -> None:
        self._contents: dict[tuple[UUID, str], Content] = {}
        self._places: set[tuple[UUID, int]] = set()
        doubtful: dict[UUID, list[IncomingEvent]] = defaultdict(list)
        for event in batch:
            standing = standings.get(event.learner_id)
            if standing is not None and (doubt_all or not standing.must_be_new(event)):
                doubtful[standing.key].append(event)
        look_up = self._from_database if scratch is None else self._from_both(scratch)
        for key, events in doubtful.items():
            look_up(key, events)

    def content(self, learner: UUID, event_id: str) -> Content | None:
        return self._contents.get((learner, event_id))

    def has_place(self, learner: UUID, seq: int) -> bool:
        return (learner, seq) in self._places

    def add(self, learner: UUID, event: IncomingEvent) -> None:
        self._contents[learner, event.event_id] = (event.category, event.item_id, event.score)
        if event.seq is not None:
            self._places.add((learner, event.seq))

    def _from_database(self, learner: UUID, events: Sequence[IncomingEvent]) -> None:
        stored = Interaction.objects.filter(learner=learner).order_by()
        for start in range(0, len(events), _VALUES_PER_QUERY):
            portion = events[start : start + _VALUES_PER_QUERY]
            same_id = stored.filter(event_id__in=[event.event_id for event in portion])
            for event_id, *content in same_id.values_list("event_id", "category", "item_id", "score"):
                self._contents[learner, event_id] = (content[0], content[1], content[2])
            places = [event.seq for event in portion if event.seq is not None]
            for seq in stored.filter(seq__in=places).values_list("seq", flat=True):
                self._places.add((learner, seq))

    def _from_both(self, scratch: ImportScratch) -> Callable[[UUID, Sequence[IncomingEvent]], None]:
        def look_up(learner: UUID, events: Sequence[IncomingEvent]) -> None:
            self._from_database(learner, events)
            for event in events:
                content = scratch.remembered_event(learner, event.event_id)
                if content is not None:
                    self._contents[learner, event.event_id] = content
                if event.seq is not None and scratch.remembers_place(learner, event.seq):
                    self._places.add((learner, event.seq))

        return look_up


def _refuse(reason: str, message: str) -> NoReturn:
    raise _Refused(reason, message)
