"""Making a version active: by a round, by a person, and back again.

A promotion is one transaction: the ACTIVE status moves, the contributions' sessions are marked, the federated update is
written, the round ends, the audit event is recorded; or nothing of it happens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.db import transaction
from django.utils import timezone
from django.utils.translation import gettext as _

from aivo_site.audit import services as audit
from aivo_site.jobs import services as jobs
from federation.models import AggregationRound, Contribution, FederatedUpdate, ModelTrainingSession, RoundState, Verdict
from federation.policies import RoundPolicy
from federation.rounds import intake, lifecycle, private
from federation.rounds.cohort import accepted_rows
from federation.rounds.errors import BadDecision, NotPromotable, RoundConflict, RoundFailed
from models_store import versions
from models_store.errors import NoMainModel, VersionConflict
from models_store.models import MainModelVersion, VersionStatus

DECISIONS = ("promote", "reject")


def promote_round(round_: AggregationRound, *, actor: str, reason: str) -> FederatedUpdate:
    """Make the round's candidate active and the round PROMOTED.

    Raises:
        RoundFailed: ``base_moved``: another version became active meanwhile; ``consent_withdrawn``: a contributor
            withdrew after the aggregate was made. The round is FAILED then and main is as it was.
        RoundConflict: the round was changed by another run.
    """
    candidate = _candidate_of(round_)
    lost = intake.consent_lost(round_)
    if lost:
        text = _("%d learners whose contributions are in the candidate withdrew before it was promoted.") % len(lost)
        raise _fail(round_, "consent_withdrawn", text, actor)
    try:
        with transaction.atomic():
            versions.activate(row=candidate, actor=actor, reason=reason, expected_active=round_.base_version)
            update = _record_update(round_, candidate, {"reason": reason})
            lifecycle.finish(round_, to=RoundState.PROMOTED, code="", reason=reason, actor=actor)
    except VersionConflict as error:
        moved = active_or_none() != round_.base_version
        raise _fail(round_, "base_moved" if moved else error.code, str(error), actor) from error
    return update


def reject_round(round_: AggregationRound, *, actor: str, code: str, reason: str) -> None:
    """End the round REJECTED, its candidate with it; what was contributed may be used again."""
    lifecycle.finish(round_, to=RoundState.REJECTED, code=code, reason=reason, actor=actor)


def decide_round(*, round_: AggregationRound, decision: str, reason: str, actor: str) -> AggregationRound:
    """An operator's decision on a round that waits for one; a promotion also enqueues the rebase of the learners' models.

    Args:
        decision: ``promote`` or ``reject``.

    Raises:
        BadDecision: another decision, or no reason.
        RoundConflict: the round does not wait for a decision.
        RoundFailed: as ``promote_round``; ``deadline_passed``: nobody decided in time, the candidate stays a candidate.
    """
    if decision not in DECISIONS:
        raise BadDecision(
            _("decision must be one of %(allowed)s, not %(given)s") % {"allowed": ", ".join(DECISIONS), "given": decision}
        )
    if not reason.strip():
        raise BadDecision(_("reason must not be empty"))
    current = AggregationRound.objects.select_related("base_version", "candidate_version").get(pk=round_.pk)
    if current.state != RoundState.AWAITING_DECISION:
        raise RoundConflict(
            _("Round %(n)d waits for no decision: it is %(state)s.") % {"n": current.sequence, "state": current.state}
        )
    if current.deadline <= timezone.now():
        lifecycle.fail_past_deadline(current, actor=actor)
        raise RoundFailed(current.reason, code="deadline_passed")
    if decision == "reject":
        reject_round(current, actor=actor, code="rejected_by_operator", reason=reason)
        return current
    promote_round(current, actor=actor, reason=reason)
    jobs.enqueue(kind="rebase", params={"version": _candidate_of(current).version})
    return current


def promote_version(*, version: MainModelVersion, reason: str, actor: str) -> MainModelVersion:
    """Make a CANDIDATE or REJECTED version active for a written reason.

    The candidate of a round that waits for a decision is decided with it. The round of a rejected candidate stays
    REJECTED; what went into the version is part of main now, so its sessions are marked as contributed.

    Raises:
        NotPromotable: ``no_reason``, ``not_promotable`` (naming the versions that can be promoted), ``no_files``,
            ``round_running``, ``consent_withdrawn``.
        VersionConflict: another change came first.
    """
    _check_reason(reason)
    row = MainModelVersion.objects.get(pk=version.pk)
    if row.status not in (VersionStatus.CANDIDATE, VersionStatus.REJECTED):
        raise NotPromotable(_not_allowed(row, _("promoted"), (VersionStatus.CANDIDATE, VersionStatus.REJECTED)))
    if not row.model_path:
        raise NotPromotable(
            _("Version %s has no files: its round ended before they were written.") % row.version, code="no_files"
        )
    round_ = AggregationRound.objects.select_related("base_version", "candidate_version").filter(candidate_version=row).first()
    if round_ is not None and round_.state == RoundState.AWAITING_DECISION:
        promote_round(round_, actor=actor, reason=reason)
    elif round_ is not None and not round_.is_terminal:
        raise NotPromotable(_("Round %d has not decided on this version yet.") % round_.sequence, code="round_running")
    else:
        _promote_by_hand(row, round_, reason, actor)
    row.refresh_from_db()
    return row


def rollback(*, to: MainModelVersion | None, reason: str, actor: str) -> MainModelVersion:
    """Make an ARCHIVED version active again; without ``to``, the parent of the active one.

    The version that was active becomes ARCHIVED, so that a person can go forward again; no later round builds on it, since
    rounds start from the active version. What was contributed to it stays used.

    Raises:
        NotPromotable: ``no_reason``, ``not_archived`` (naming the versions that can be rolled back to).
        NoMainModel: no version is active.
        VersionConflict: another change came first.
    """
    _check_reason(reason)
    active = versions.active_version()
    target = to if to is not None else active.parent
    if target is None:
        raise NotPromotable(
            _("The active version %(version)s has no parent; name the version: %(allowed)s.")
            % {"version": active.version, "allowed": _names((VersionStatus.ARCHIVED,))},
            code="not_archived",
        )
    row = MainModelVersion.objects.get(pk=target.pk)
    if row.status != VersionStatus.ARCHIVED:
        raise NotPromotable(_not_allowed(row, _("rolled back to"), (VersionStatus.ARCHIVED,)), code="not_archived")
    with transaction.atomic():
        versions.activate(row=row, actor=actor, reason=reason, expected_active=active)
        left = MainModelVersion.objects.get(pk=active.pk)
        entry = {"at": timezone.now().isoformat(), "to": row.version, "reason": reason, "by": actor}
        left.metadata = {**left.metadata, "rolled_back": [*left.metadata.get("rolled_back", []), entry]}
        left.save(update_fields=["metadata", "updated_at"])
        audit.record(
            action="main_model.rolled_back",
            actor=actor,
            object_type="MainModelVersion",
            object_id=str(row.pk),
            data={"from": active.version, "to": row.version, "reason": reason},
        )
    row.refresh_from_db()
    return row


def active_or_none() -> MainModelVersion | None:
    """The active version, None where there is none."""
    try:
        return versions.active_version()
    except NoMainModel:
        return None


def _promote_by_hand(row: MainModelVersion, round_: AggregationRound | None, reason: str, actor: str) -> None:
    was = row.status
    if round_ is not None and intake.consent_lost(round_):
        text = _("Learners whose contributions are in version %s withdrew since.") % row.version
        raise NotPromotable(text, code="consent_withdrawn")
    with transaction.atomic():
        versions.activate(row=row, actor=actor, reason=reason)
        if round_ is not None and not FederatedUpdate.objects.filter(main_model_version=row).exists():
            _record_update(round_, row, {"promoted_by_hand": True, "reason": reason, "round_state": str(round_.state)})
        audit.record(
            action="main_model.promoted_by_hand",
            actor=actor,
            object_type="MainModelVersion",
            object_id=str(row.pk),
            data={"version": row.version, "was": str(was), "reason": reason},
        )


def _record_update(round_: AggregationRound, candidate: MainModelVersion, metadata: dict[str, Any]) -> FederatedUpdate:
    """Write what the version changed and mark the sessions in it; sessions marked before stay with their update."""
    policy = RoundPolicy.from_json(round_.policy)
    contributors = [str(key) for key in accepted_rows(round_).values_list("subject_key", flat=True)]
    update = FederatedUpdate.objects.create(
        main_model_version=candidate,
        base_version=round_.base_version,
        round=round_,
        aggregation_strategy=policy.strategy,
        contributing_learners=contributors,
        performance_improvement=round_.performance_improvement or 0.0,
        privacy_budget=private.epsilon_of(round_),
        metadata={**metadata, "measured": round_.performance_improvement is not None},
    )
    accepted = Contribution.objects.filter(round=round_, verdict=Verdict.ACCEPTED)
    sessions = ModelTrainingSession.objects.filter(contributions__in=accepted, contributed_to_federation=False)
    ids = list(sessions.values_list("pk", flat=True).distinct())
    for start in range(0, len(ids), 500):
        ModelTrainingSession.objects.filter(pk__in=ids[start : start + 500]).update(
            contributed_to_federation=True, federated_update=update, updated_at=timezone.now()
        )
    return update


def _fail(round_: AggregationRound, code: str, reason: str, actor: str) -> RoundFailed:
    lifecycle.finish(round_, to=RoundState.FAILED, code=code, reason=reason, actor=actor)
    return RoundFailed(reason, code=code)


def _candidate_of(round_: AggregationRound) -> MainModelVersion:
    if round_.candidate_version is None:
        raise RoundConflict(_("Round %d has no candidate.") % round_.sequence)
    return round_.candidate_version


def _check_reason(reason: str) -> None:
    if not reason.strip():
        raise NotPromotable(_("reason must not be empty"), code="no_reason")


def _not_allowed(row: MainModelVersion, what: str, allowed: Iterable[str]) -> str:
    statuses = tuple(allowed)
    return _("Version %(version)s is %(status)s and cannot be %(what)s; these can: %(names)s.") % {
        "version": row.version,
        "status": row.status,
        "what": what,
        "names": _names(statuses),
    }


def _names(statuses: Iterable[str]) -> str:
    rows = MainModelVersion.objects.filter(status__in=list(statuses)).exclude(model_path="")
    return ", ".join(rows.values_list("version", flat=True)[:20]) or _("none")
