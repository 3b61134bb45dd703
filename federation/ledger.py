"""The privacy ledger: every release is charged before it happens, and no charge is ever taken back.

A row without a subject key charges the whole declared population, whoever was drawn. Epsilons are compositions of all
charges of a period, never sums. A row's content is hashed into the audit log in the transaction that writes it, so that a row
which is altered later, however consistently, no longer matches (``federation.ledger_check``).
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

from django.db import transaction
from django.db.models import Q, QuerySet
from django.utils import timezone
from django.utils.translation import gettext as _

from aivo_site.audit import services as audit
from federation.errors import BudgetSpent, LedgerError
from federation.models import AggregationRound, PrivacyLedgerEntry, PrivacyPeriod, PrivacyUnit
from federation.privacy.accountant import Accountant
from federation.privacy.composition import ComposedResult, compose
from federation.privacy.release import Release
from learners.models import Learner, Pool

ACTION = "privacy.charged"
ACTOR = "privacy_ledger"

FIELDS = (
    "sequence", "subject_key", "mechanism", "unit", "adjacency", "sampling", "q_num", "q_den", "noise_multiplier", "clip_norm",
    "steps", "epsilon", "epsilon_total", "delta", "accountant", "accountant_version", "conversion", "override_reason",
)  # fmt: skip
"""What a row's digest covers, beside its time, period and round."""

_UNITS = {"learner": PrivacyUnit.LEARNER, "training_sample": PrivacyUnit.SAMPLE}


def charge(
    *,
    period: PrivacyPeriod,
    release: Release,
    clip_norm: float,
    mechanism: str,
    round: AggregationRound | None = None,
    subject_key: UUID | None = None,
    cap: float | None = None,
    override_reason: str = "",
) -> PrivacyLedgerEntry:
    """Write one charge, or refuse the release. Release nothing before the transaction around this call has committed.

    Charges are written one after the other: each waits for the transaction of the one before.

    Args:
        release: what will be released, with all that its ε depends on.
        subject_key: whom it concerns; None for the whole population of the period.
        cap: largest ε of the composition, beside the period's own cap of the same scope.

    Raises:
        BudgetSpent: the composition with this release would exceed a cap.
        LedgerError: ``no_privacy_period``, ``clock_set_back``, ``other_meaning``.
        AccountantError: a composition that no accountant covers.
    """
    if release.costs_nothing:
        raise LedgerError(_("a release of nothing is not charged"), code="other_meaning")
    with transaction.atomic():
        open_period = PrivacyPeriod.objects.select_for_update().filter(pk=period.pk, ended_at__isnull=True).first()
        if open_period is None:
            raise LedgerError(
                _("Privacy period %d is over: nothing more is released in it.") % period.number, code="no_privacy_period"
            )
        _check_clock()
        past = releases_of(charges(open_period, subject_key=subject_key, like=release))
        alone = compose([release], open_period.delta)
        total = compose([*past, release], open_period.delta)
        _check_cap(total.epsilon, lowest(cap, _own_cap(open_period, subject_key)), open_period.delta)
        last = PrivacyLedgerEntry.objects.order_by("-sequence").values_list("sequence", flat=True).first() or 0
        entry = PrivacyLedgerEntry.objects.create(
            sequence=last + 1,
            period=open_period,
            round=round,
            subject_key=subject_key,
            mechanism=mechanism,
            unit=_UNITS[release.unit],
            adjacency=release.adjacency,
            sampling=release.sampling,
            q_num=release.q_num,
            q_den=release.q_den,
            noise_multiplier=release.z,
            clip_norm=float(clip_norm),
            steps=release.steps,
            epsilon=alone.epsilon,
            epsilon_total=total.epsilon,
            delta=open_period.delta,
            accountant=total.accountant,
            accountant_version=total.accountant_version,
            conversion=total.conversion,
            override_reason=override_reason.strip(),
        )
        audit.record(
            action=ACTION,
            actor=ACTOR,
            object_type="PrivacyLedgerEntry",
            object_id=str(entry.pk),
            data={"sequence": entry.sequence, "sha256": digest_of(entry), "override_reason": entry.override_reason},
        )
    return entry


def check_affordable(period: PrivacyPeriod, release: Release, cap: float | None) -> None:
    """Refuse early, before anything is trained, what ``charge`` would refuse now for the whole population.

    Raises:
        BudgetSpent
    """
    past = releases_of(charges(period, like=release))
    _check_cap(compose([*past, release], period.delta).epsilon, lowest(cap, period.epsilon_cap), period.delta)


def release_of(entry: PrivacyLedgerEntry) -> Release:
    """What a row was charged for.

    Raises:
        AccountantError: the row holds values that no release has.
    """
    units = {str(stored): unit for unit, stored in _UNITS.items()}
    return Release.from_json(
        {
            "z": entry.noise_multiplier,
            "q_num": entry.q_num,
            "q_den": entry.q_den,
            "steps": entry.steps,
            "adjacency": str(entry.adjacency),
            "sampling": str(entry.sampling),
            "unit": units.get(str(entry.unit), str(entry.unit)),
        }
    )


def releases_of(entries: Iterable[PrivacyLedgerEntry]) -> list[Release]:
    """What the rows were charged for, equal ones added up, so that composing many costs the time of few."""
    counted: Counter[Release] = Counter()
    for entry in entries:
        release = release_of(entry)
        counted[replace(release, steps=1)] += release.steps
    return [replace(release, steps=steps) for release, steps in counted.items()]


def charges(
    period: PrivacyPeriod | None, *, subject_key: UUID | None = None, like: Release | None = None
) -> QuerySet[PrivacyLedgerEntry]:
    """The rows that concern a learner, or with None the whole population, in order.

    Args:
        period: None for all periods. like: only rows of its unit and adjacency, which compose with it.
    """
    who = Q(subject_key__isnull=True)
    if subject_key is not None:
        who |= Q(subject_key=subject_key)
    rows = PrivacyLedgerEntry.objects.filter(who)
    if period is not None:
        rows = rows.filter(period=period)
    if like is not None:
        rows = rows.filter(unit=_UNITS[like.unit], adjacency=like.adjacency)
    ordered: QuerySet[PrivacyLedgerEntry] = rows.order_by("sequence")
    return ordered


CENTRAL = Release(z=1.0)
"""Any release of the meaning that rounds have: unit learner, add or remove one."""


def federation_epsilon(
    period: PrivacyPeriod | None, *, delta: float, accountant: Accountant = "rdp", seeing_cohort: bool = False
) -> ComposedResult:
    """ε of the composition of all charges to the whole population.

    Args:
        period: None for the lifetime of the installation.
        seeing_cohort: against those who know who took part: being left out by chance protects no more, q = 1.
    """
    past = releases_of(charges(period, like=CENTRAL))
    if seeing_cohort:
        past = [release.to_those_who_see_the_cohort() for release in past]
    return compose(past, delta, accountant)


def learner_epsilons(period: PrivacyPeriod) -> Iterator[tuple[UUID, float]]:
    """Each federated learner's ε in the period: charges to the population since the learner joined, and their own.

    A learner who joined after a release was not in it. Who was left out of a round stays charged, which can only overstate.
    """
    account = LearnerAccount(period)
    learners = Learner.objects.filter(pool=Pool.FEDERATED).order_by("subject_key")
    for subject_key, created_at in learners.values_list("subject_key", "created_at").iterator(chunk_size=2000):
        yield subject_key, account.epsilon(subject_key, created_at)


class LearnerAccount:
    """Learners' charges of one period, read once.

    Args:
        following: what is to be released next, added to everybody's charges.
    """

    def __init__(self, period: PrivacyPeriod, following: Release | None = None) -> None:
        self._delta = period.delta
        rows = PrivacyLedgerEntry.objects.filter(period=period, unit=PrivacyUnit.LEARNER, adjacency=CENTRAL.adjacency)
        self._shared: list[PrivacyLedgerEntry] = []
        self._own: dict[UUID, list[PrivacyLedgerEntry]] = {}
        for row in rows.order_by("sequence"):
            if row.subject_key is None:
                self._shared.append(row)
            else:
                self._own.setdefault(row.subject_key, []).append(row)
        self._following = [] if following is None else [following]
        self._known: dict[int, float] = {}

    def epsilon(self, subject_key: UUID, joined: datetime) -> float:
        """ε of one learner; learners of one time without charges of their own are computed once."""
        first = bisect_left(self._shared, joined, key=lambda row: row.created_at)
        own = self._own.get(subject_key)
        if own:
            return self._composed([*self._shared[first:], *own])
        if first not in self._known:
            self._known[first] = self._composed(self._shared[first:])
        return self._known[first]

    def epsilon_of_population(self) -> float:
        """ε of who was there from the beginning."""
        return self._composed(self._shared)

    def _composed(self, rows: list[PrivacyLedgerEntry]) -> float:
        return compose([*releases_of(rows), *self._following], self._delta).epsilon


def digest_of(entry: PrivacyLedgerEntry) -> str:
    """sha256 over the row's content, in the canonical form that the audit log keeps."""
    content = {name: getattr(entry, name) for name in FIELDS}
    content |= {"period": entry.period_id, "round": entry.round_id}
    content["created_at"] = entry.created_at.astimezone(UTC).isoformat(timespec="microseconds")
    plain = {
        name: value.hex() if isinstance(value, float) else value if value is None or isinstance(value, int) else str(value)
        for name, value in content.items()
    }
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _own_cap(period: PrivacyPeriod, subject_key: UUID | None) -> float | None:
    return period.epsilon_cap if subject_key is None else period.epsilon_cap_learner


def lowest(*caps: float | None) -> float | None:
    """The smallest of the caps that are there."""
    return min((cap for cap in caps if cap is not None), default=None)


def _check_cap(epsilon: float, cap: float | None, delta: float) -> None:
    if cap is not None and epsilon > cap:
        text = _("With this release ε would be %(epsilon).4g at δ = %(delta).3g, above the cap %(cap)g: nothing is released.")
        raise BudgetSpent(text % {"epsilon": epsilon, "delta": delta, "cap": cap})


def _check_clock() -> None:
    """Who was there at a release is told by time: a clock that was set back could leave a learner uncharged."""
    now = timezone.now()
    last = PrivacyLedgerEntry.objects.order_by("-sequence").values_list("created_at", flat=True).first()
    if (last is not None and last > now) or Learner.objects.filter(created_at__gt=now).exists():
        text = _("The clock says %s, but a charge or a learner is from later: set it right before anything is released.")
        raise LedgerError(text % now.isoformat(timespec="seconds"), code="clock_set_back")
