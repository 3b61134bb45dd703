"""Consents: an append-only record of who decided what, and the learner's flags that every step reads.

A withdrawal outlasts imports: loading a file again with its consents gives nothing back that was withdrawn since. Only
``record_consent`` for that learner does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from uuid import UUID

from django.db import transaction
from django.utils import timezone
from django.utils.translation import gettext as _

from aivo_site.audit import services as audit
from learners.errors import ConsentError
from learners.models import ConsentEvent, ConsentKind, Learner
from learners.signals import consent_withdrawn

FLAG_OF_KIND = {
    ConsentKind.TRAINING: "consent_training",
    ConsentKind.CONTRIBUTION: "consent_contribution",
    ConsentKind.EXTERNAL_TRANSFER: "consent_external_transfer",
}
"""The learner's field that holds each kind's present state."""

_TEXT_LIMITS = {"authority": 200, "recorded_by": 150}


@dataclass(frozen=True)
class ConsentGiven:
    """Consents given for a number of learners at once.

    Attributes:
        kinds: what is consented to.
        authority: who decided for the learners, and how they said so.
        recorded_by: user name, or the command that recorded it.

    Raises:
        ConsentError: ``no_kind``, ``unknown_kind``, ``authority_missing``, ``recorded_by_missing`` or a text too long.
    """

    kinds: tuple[ConsentKind, ...]
    authority: str
    recorded_by: str

    def __post_init__(self) -> None:
        if not self.kinds:
            allowed = ", ".join(ConsentKind.values)
            raise ConsentError(_("kinds must name at least one of: %(allowed)s.") % {"allowed": allowed}, code="no_kind")
        object.__setattr__(self, "kinds", tuple(dict.fromkeys(known_kind(kind) for kind in self.kinds)))
        _check_text("authority", self.authority)
        _check_text("recorded_by", self.recorded_by)


@dataclass(frozen=True)
class ConsentChange:
    """What recording a consent did; ``event`` is None where it already stood so."""

    learner: Learner
    kind: ConsentKind
    given: bool
    event: ConsentEvent | None

    @property
    def changed(self) -> bool:
        return self.event is not None


def record_consent(
    *, learner: Learner, kind: ConsentKind, given: bool, authority: str, recorded_by: str, note: str = ""
) -> ConsentChange:
    """Record one consent given or withdrawn, in one transaction with the learner's flag; ``learner`` is brought up to date.

    The same decision twice changes nothing. A withdrawal of what was never given is kept as a refusal. ``withdrawn_at`` is
    the moment since which no consent is left after one was withdrawn or refused; any consent given clears it.

    Raises:
        ConsentError: ``unknown_kind``, ``authority_missing``, ``recorded_by_missing``, ``text_too_long``,
            ``unknown_learner`` (the learner was erased meanwhile).
    """
    kind = known_kind(kind)
    _check_text("authority", authority)
    _check_text("recorded_by", recorded_by)
    with transaction.atomic():
        if not Learner.objects.select_for_update().filter(pk=learner.pk).exists():
            raise ConsentError(_("The learner does not exist any more."), code="unknown_learner")
        learner.refresh_from_db()
        refused = _refused_kinds([learner])[learner.pk]
        if getattr(learner, FLAG_OF_KIND[kind]) if given else kind in refused:
            return ConsentChange(learner, kind, given, None)
        event = ConsentEvent.objects.create(
            subject_key=learner.subject_key, kind=kind, given=given, authority=authority, recorded_by=recorded_by, note=note
        )
        _set_flags(learner, kind, given)
        if not given:
            consent_withdrawn.send(sender=Learner, learner=learner, kind=kind)
        audit.record(
            action="consent.given" if given else "consent.withdrawn",
            actor=recorded_by,
            object_type="learner",
            object_id=str(learner.subject_key),
            data={"kind": str(kind)},
        )
    return ConsentChange(learner, kind, given, event)


def withdraw(
    *, learner: Learner, authority: str, recorded_by: str, kinds: Iterable[ConsentKind] = tuple(ConsentKind), note: str = ""
) -> list[ConsentChange]:
    """Withdraw several kinds (by default all) in one transaction; see ``record_consent``."""
    with transaction.atomic():
        return [
            record_consent(
                learner=learner, kind=kind, given=False, authority=authority, recorded_by=recorded_by, note=note
            )
            for kind in kinds
        ]  # fmt: skip


@dataclass(frozen=True)
class BulkConsent:
    """What ``give_consents`` did: events written, and the learners who now hold every kind that was given."""

    events: int
    holders: frozenset[UUID]


def give_consents(*, learners: Collection[Learner], consent: ConsentGiven) -> BulkConsent:
    """Give ``consent`` to many learners, except where that kind was withdrawn or refused before.

    Runs in the caller's transaction if there is one. Learners who hold a kind already get no second event. ``holders`` has
    primary keys of learners.
    """
    events: list[ConsentEvent] = []
    holders = {learner.pk for learner in learners}
    with transaction.atomic():
        rows = list(Learner.objects.select_for_update().filter(pk__in=holders).order_by("pk"))
        refused = _refused_kinds(rows)
        for kind in consent.kinds:
            flag = FLAG_OF_KIND[kind]
            withdrawn = {row.pk for row in rows if kind in refused[row.pk]}
            receiving = [row for row in rows if not getattr(row, flag) and row.pk not in withdrawn]
            changes = {flag: True, "withdrawn_at": None, "updated_at": timezone.now()}
            Learner.objects.filter(pk__in=[row.pk for row in receiving]).update(**changes)
            events.extend(
                ConsentEvent(
                    subject_key=row.subject_key,
                    kind=kind,
                    given=True,
                    authority=consent.authority,
                    recorded_by=consent.recorded_by,
                )
                for row in receiving
            )
            holders -= withdrawn
        ConsentEvent.objects.bulk_create(events)
    return BulkConsent(len(events), frozenset(holders & {row.pk for row in rows}))


def _refused_kinds(learners: Collection[Learner]) -> dict[UUID, set[str]]:
    """For each learner's primary key, the kinds that stand withdrawn or refused.

    These are the kinds with a negative event whose flag is down: a later consent would have raised it. So nothing hangs on
    the order of clock times.
    """
    negative: dict[UUID, set[str]] = defaultdict(set)
    events = ConsentEvent.objects.filter(subject_key__in=[learner.subject_key for learner in learners], given=False)
    for subject_key, kind in events.values_list("subject_key", "kind"):
        negative[subject_key].add(kind)
    return {
        learner.pk: {kind for kind in negative[learner.subject_key] if not getattr(learner, FLAG_OF_KIND[ConsentKind(kind)])}
        for learner in learners
    }


def _set_flags(learner: Learner, kind: ConsentKind, given: bool) -> None:
    setattr(learner, FLAG_OF_KIND[kind], given)
    if any(getattr(learner, flag) for flag in FLAG_OF_KIND.values()):
        learner.withdrawn_at = None
    elif learner.withdrawn_at is None:
        learner.withdrawn_at = timezone.now()
    learner.save(update_fields=[FLAG_OF_KIND[kind], "withdrawn_at", "updated_at"])


def known_kind(kind: str) -> ConsentKind:
    """The kind of this name, in upper or lower case.

    Raises:
        ConsentError: ``unknown_kind``, with the kinds that exist.
    """
    try:
        return ConsentKind(str(kind).upper())
    except ValueError:
        allowed = ", ".join(ConsentKind.values)
        message = _("Consent kind %(kind)r is unknown; allowed: %(allowed)s.") % {"kind": str(kind)[:40], "allowed": allowed}
        raise ConsentError(message, code="unknown_kind") from None


def _check_text(name: str, value: str) -> None:
    if not value.strip():
        raise ConsentError(_("%(name)s must not be empty.") % {"name": name}, code=f"{name}_missing")
    if len(value) > _TEXT_LIMITS[name]:
        message = _("%(name)s may have at most %(limit)d characters.") % {"name": name, "limit": _TEXT_LIMITS[name]}
        raise ConsentError(message, code="text_too_long")
