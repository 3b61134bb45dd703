"""A round's row: one open round at a time, one owner, state changes that happen once.

A run owns a round while its job runs and holds its lease. Every change is an UPDATE that names the state and the owner it
expects, so that a run that lost its round (its lease ran out, the round was cancelled) changes nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import Max, Q
from django.utils import timezone
from django.utils.translation import gettext as _

from aivo_site.audit import services as audit
from aivo_site.jobs.models import Job, JobState
from federation.models import OPEN_ROUND_STATES, TERMINAL_ROUND_STATES, AggregationRound, RoundState
from federation.policies import RoundPolicy
from federation.rounds.errors import RoundConflict, RoundSkipped
from models_store.models import MainModelVersion, VersionStatus

ORPHAN_AFTER = timedelta(minutes=10)
"""A round without a job that did not change for so long has no owner any more."""

DECISION_TIME = timedelta(days=6)
"""How long a round waits for an operator: less than a week, so that it never blocks the next weekly round."""

_BEGIN_TRIES = 5


@dataclass(frozen=True)
class Claim:
    """A round that this run owns, or one that its job already finished (``round.is_terminal``)."""

    round: AggregationRound
    resumed: bool


def open_round() -> AggregationRound | None:
    """The round that is open, if any."""
    return AggregationRound.objects.select_related("job", "base_version", "candidate_version").filter(open_slot=1).first()


def claim_round(*, policy: RoundPolicy, base: MainModelVersion, job: Job | None, actor: str) -> Claim:
    """Begin a round, or go on with the open one whose owner is dead.

    A round past its deadline is FAILED first. The same job never begins two rounds: run again after it finished one, it
    gets that one.

    Raises:
        RoundSkipped: ``round_running``: an owner lives; ``awaiting_decision``: an operator has to decide first.
    """
    key = f"job:{job.id}" if job is not None else None
    if key is not None:
        own = AggregationRound.objects.filter(idempotency_key=key).first()
        if own is not None and own.is_terminal:
            return Claim(own, resumed=True)
    current = open_round()
    if current is not None and current.deadline <= timezone.now():
        fail_past_deadline(current, actor=actor)
        current = None
    if current is None:
        return Claim(_begin(policy, base, job, key, actor), resumed=False)
    if current.state == RoundState.AWAITING_DECISION:
        message = _("Round %d waits for an operator's decision.") % current.sequence
        code = "awaiting_decision"
        raise RoundSkipped(message, code=code, result={"reason": message, "reason_code": code})
    own_round = job is not None and current.job_id == job.id
    if not own_round and owner_lives(current):
        raise _running(current)
    return Claim(_take_over(current, job), resumed=True)


def owner_lives(round_: AggregationRound) -> bool:
    """Whether the run that owns the round may still be working on it."""
    job = round_.job
    if job is None:
        return round_.updated_at > timezone.now() - ORPHAN_AFTER
    return job.state == JobState.RUNNING and job.lease_expires_at is not None and job.lease_expires_at > timezone.now()


def owner_is(round_: AggregationRound) -> Q:
    """The condition that the row's owner is still the one that this object has."""
    return Q(job__isnull=True) if round_.job_id is None else Q(job_id=round_.job_id)


def advance(round_: AggregationRound, *, to: RoundState, **fields: Any) -> None:
    """Move the round from the state that this object has to ``to``, with other fields in the same UPDATE.

    Raises:
        RoundConflict: the row has another state or owner by now; nothing changed.
    """
    now = timezone.now()
    values: dict[str, Any] = {"state": to, "updated_at": now, **fields}
    if to in TERMINAL_ROUND_STATES:
        values.update(open_slot=None, finished_at=now)
    rows = AggregationRound.objects.filter(owner_is(round_), pk=round_.pk, state=round_.state)
    if round_.state in TERMINAL_ROUND_STATES or rows.update(**values) != 1:
        raise RoundConflict(_("Round %d was changed by another run or an operator.") % round_.sequence)
    for name, value in values.items():
        setattr(round_, name, value)


def check_unchanged(round_: AggregationRound) -> None:
    """Raise ``RoundConflict`` where the row has another state or owner than this object."""
    if not AggregationRound.objects.filter(owner_is(round_), pk=round_.pk, state=round_.state).exists():
        raise RoundConflict(_("Round %d was changed by another run or an operator.") % round_.sequence)


def finish(round_: AggregationRound, *, to: RoundState, code: str, reason: str, actor: str, **fields: Any) -> None:
    """End the round in a terminal state, with its reason and an audit event; its candidate, if not active, is rejected.

    A candidate that only waits for a decision (the deadline passed, nobody decided) stays a candidate.

    Raises:
        RoundConflict: as ``advance``.
    """
    waited = round_.state == RoundState.AWAITING_DECISION and to == RoundState.FAILED
    with transaction.atomic():
        advance(round_, to=to, reason_code=code, reason=reason, **fields)
        if to != RoundState.PROMOTED and round_.candidate_version_id is not None and not waited:
            unused = (VersionStatus.TRAINING, VersionStatus.CANDIDATE)
            MainModelVersion.objects.filter(pk=round_.candidate_version_id, status__in=unused).update(
                status=VersionStatus.REJECTED, updated_at=timezone.now()
            )
        audit.record(
            action=f"round.{to.lower()}",
            actor=actor,
            object_type="AggregationRound",
            object_id=str(round_.id),
            data={"round": round_.sequence, "code": code},
        )


def fail_past_deadline(round_: AggregationRound, *, actor: str) -> None:
    """End a round that is past its deadline."""
    reason = _("The deadline passed in state %s.") % round_.state
    finish(round_, to=RoundState.FAILED, code="deadline_passed", reason=reason, actor=actor)


def cancel_round(*, round_: AggregationRound, actor: str, reason: str) -> None:
    """Cancel an open round in whatever state; the run that owns it stops at its next step.

    Raises:
        RoundConflict: the round is over.
    """
    current = AggregationRound.objects.get(pk=round_.pk)
    if current.is_terminal:
        raise RoundConflict(_("Round %(n)d is over: %(state)s.") % {"n": current.sequence, "state": current.state})
    finish(current, to=RoundState.CANCELLED, code="cancelled", reason=reason, actor=actor)


def deadline_for_decision() -> datetime:
    """Until when a round that starts waiting now waits for an operator."""
    return timezone.now() + DECISION_TIME


def _begin(policy: RoundPolicy, base: MainModelVersion, job: Job | None, key: str | None, actor: str) -> AggregationRound:
    for _attempt in range(_BEGIN_TRIES):
        try:
            with transaction.atomic():
                last = AggregationRound.objects.aggregate(last=Max("sequence"))["last"] or 0
                round_ = AggregationRound.objects.create(
                    sequence=last + 1,
                    policy=policy.to_json(),
                    base_version=base,
                    deadline=timezone.now() + timedelta(minutes=policy.deadline_minutes),
                    idempotency_key=key,
                    job=job,
                    requested_by=job.requested_by if job is not None else None,
                )
                audit.record(
                    action="round.begun",
                    actor=actor,
                    object_type="AggregationRound",
                    object_id=str(round_.id),
                    data={"round": round_.sequence, "base": base.version},
                )
                return round_
        except IntegrityError:
            # Either the open slot is taken, or the number was taken by a round that is over by now: then again.
            current = open_round()
            if current is not None:
                raise _running(current) from None
    raise RoundConflict(_("No round could begin: others begin and end at the same time."))


def _take_over(round_: AggregationRound, job: Job | None) -> AggregationRound:
    now = timezone.now()
    rows = AggregationRound.objects.filter(
        owner_is(round_), pk=round_.pk, state__in=OPEN_ROUND_STATES, updated_at=round_.updated_at
    )
    if rows.update(job=job, updated_at=now) != 1:
        raise _running(round_)
    round_.job, round_.updated_at = job, now
    return round_


def _running(round_: AggregationRound) -> RoundSkipped:
    message = _("Round %(n)d is running (%(state)s); one round runs at a time.") % {"n": round_.sequence, "state": round_.state}
    return RoundSkipped(message, code="round_running", result={"reason": message, "reason_code": "round_running"})
