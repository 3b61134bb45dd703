"""Intake: a verdict with its reason for every contribution, before anything of it can touch the result.

Each rule is one small function from a contribution to a reason code. A rejected contribution is never read again by the
round, so that it leaves no trace in the result.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from django.db.models import Count, QuerySet, TextChoices
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from aivo_core.privacy import PrivacyError, global_norm
from aivo_core.tensors import TensorFileError
from federation.models import AggregationRound, Contribution, ContributionSource, ModelTrainingSession, SessionPurpose, Verdict
from federation.policies import RoundPolicy
from federation.rounds import cohort
from federation.rounds.eligibility import Exclusion, consent_refusal
from federation.rounds.lineage import lineage_of
from learners.models import Interaction, Learner
from models_store.errors import StoreError
from models_store.store import DeltaReader, LoadedVersion


class Refusal(TextChoices):
    """Why a contribution is not part of the result, beside the reason codes of ``eligibility`` and of the store."""

    ERASED = "erased", gettext_lazy("the learner or what they trained was erased")
    NOT_TRAINED = "not_trained", gettext_lazy("nothing was trained")
    FOREIGN_SESSION = "foreign_session", gettext_lazy("the session is another learner's, or of another round")
    WRONG_LINEAGE = "wrong_lineage", gettext_lazy("trained on a version that is no ancestor of the round's base")
    ALREADY_CONTRIBUTED = "already_contributed", gettext_lazy("a session is already part of a version")
    IMPLAUSIBLE_SAMPLES = "implausible_samples", gettext_lazy("more samples than the learner has interactions, or none")
    NOT_FINITE = "not_finite", gettext_lazy("a number is not finite")
    NORM_TOO_LARGE = "norm_too_large", gettext_lazy("the norm is above the policy's limit")
    NORM_OUTLIER = "norm_outlier", gettext_lazy("the norm is far above the cohort's")


@dataclass(frozen=True)
class Finding:
    """What intake found of one contribution; ``code`` is empty when it is sound."""

    code: str
    reason: str = ""
    norm: float | None = None


@dataclass(frozen=True)
class IntakeContext:
    """What the rules look at, read once per block.

    Attributes:
        learners: by subject key; a missing one was erased.
        interactions: how many each learner has, by subject key.
        behind: versions of the base's lineage, with how far behind each is.
        reader: reads the deltas, one at a time.
    """

    round: AggregationRound
    policy: RoundPolicy
    reader: DeltaReader
    behind: Mapping[UUID, int]
    learners: Mapping[UUID, Learner]
    interactions: Mapping[UUID, int]

    def discounts(self, sessions: Sequence[ModelTrainingSession]) -> list[float]:
        """Of each session; the round's own sessions start at its base and have none."""
        return [
            cohort.staleness_discount(self.behind[session.base_version_id], self.policy.staleness_exponent)
            for session in sessions
        ]


Rule = Callable[[Contribution, IntakeContext], str]


def give_verdicts(
    rows: QuerySet[Contribution], *, round_: AggregationRound, policy: RoundPolicy, base: LoadedVersion
) -> Iterator[Contribution]:
    """Give contributions the verdicts that need no cohort, one after the other; each is given back when it has its own.

    One that has a verdict by the time it is written keeps it, so that this can run again and at several places.
    """
    behind = lineage_of(round_.base_version)
    reader = DeltaReader(base.spec)
    for block in cohort.blocks(rows):
        context = intake_context(round_, policy, reader, behind, block)
        for contribution in block:
            _record(contribution, inspect(contribution, context))
            yield contribution


def inspect(contribution: Contribution, context: IntakeContext) -> Finding:
    """Apply the rules that need no cohort; the first that refuses decides."""
    for rule in RULES:
        code = rule(contribution, context)
        if code:
            return Finding(code, _label(code))
    return _inspect_delta(contribution, context)


def recheck_consent(round_: AggregationRound) -> int:
    """Reject accepted contributions of learners who withdrew since, or were erased; returns how many."""
    rejected = 0
    for block in cohort.blocks(cohort.accepted_rows(round_)):
        learners = _learners(block)
        for contribution in block:
            code = _erased_or_refused(contribution, learners)
            if code:
                reject(contribution, code)
                rejected += 1
    return rejected


def consent_lost(round_: AggregationRound) -> list[UUID]:
    """Subject keys of accepted contributions whose learner withdrew or was erased since."""
    return [
        contribution.subject_key
        for block in cohort.blocks(cohort.accepted_rows(round_))
        for learners in (_learners(block),)
        for contribution in block
        if _erased_or_refused(contribution, learners)
    ]


def reject(contribution: Contribution | UUID, code: str, reason: str = "") -> None:
    """Take a contribution, or the one of this id, out of the round."""
    pk = contribution.pk if isinstance(contribution, Contribution) else contribution
    Contribution.objects.filter(pk=pk).update(
        verdict=Verdict.REJECTED, reason_code=code, reason=reason or _label(code), weight=0.0
    )


def reject_untrained(contribution: Contribution, code: str, reason: str = "") -> None:
    """As ``reject``, of a contribution that nothing was trained for; one that has a verdict by now keeps it."""
    Contribution.objects.filter(pk=contribution.pk, verdict=Verdict.PENDING).update(
        verdict=Verdict.REJECTED, reason_code=code, reason=reason or _label(code), weight=0.0
    )


def quarantine_outliers(round_: AggregationRound, policy: RoundPolicy) -> None:
    """Quarantine norms above ``norm_outlier_factor`` times the cohort's median; running again changes nothing."""
    sound = Contribution.objects.filter(round=round_).exclude(norm=None)
    norms = [
        norm
        for norm in (
            sound.filter(verdict=Verdict.ACCEPTED) | sound.filter(verdict=Verdict.QUARANTINED, reason_code=Refusal.NORM_OUTLIER)
        ).values_list("norm", flat=True)
        if norm is not None
    ]
    median = statistics.median(norms) if norms else 0.0
    if median > 0.0:
        limit = policy.norm_outlier_factor * median
        Contribution.objects.filter(round=round_, verdict=Verdict.ACCEPTED, norm__gt=limit).update(
            verdict=Verdict.QUARANTINED,
            reason_code=Refusal.NORM_OUTLIER,
            reason=_("The norm is above %(limit).3g, %(factor)g times the cohort's median.")
            % {"limit": limit, "factor": policy.norm_outlier_factor},
        )


def intake_context(
    round_: AggregationRound,
    policy: RoundPolicy,
    reader: DeltaReader,
    behind: Mapping[UUID, int],
    block: Sequence[Contribution],
) -> IntakeContext:
    """What the rules need to know about the learners of one block."""
    learners = _learners(block)
    counts = (
        Interaction.objects.filter(learner__in=[learner.pk for learner in learners.values()])
        .values_list("learner__subject_key")
        .annotate(n=Count("pk"))
    )
    return IntakeContext(round_, policy, reader, behind, learners, {key: int(n) for key, n in counts})


# --- The rules, in the order in which they are asked ----------------------------------------------------------------------


def _consent(contribution: Contribution, context: IntakeContext) -> str:
    return _erased_or_refused(contribution, context.learners)


def _has_sessions(contribution: Contribution, _context: IntakeContext) -> str:
    return "" if cohort.sessions_of(contribution) else Refusal.NOT_TRAINED


def _own_sessions(contribution: Contribution, context: IntakeContext) -> str:
    """Sessions belong to the learner; those that the round trained, to the round."""
    for session in cohort.sessions_of(contribution):
        if session.personalized_model.learner.subject_key != contribution.subject_key:
            return Refusal.FOREIGN_SESSION
        if context.policy.contribution_source == ContributionSource.ROUND:
            own = session.purpose == SessionPurpose.CONTRIBUTION and session.round_id == context.round.pk
        else:
            own = session.purpose == SessionPurpose.PERSONAL
        if not own:
            return Refusal.FOREIGN_SESSION
    return ""


def _lineage(contribution: Contribution, context: IntakeContext) -> str:
    """The round's own sessions start at its base; a learner's earlier ones at most so many versions before it."""
    fresh = context.policy.contribution_source == ContributionSource.ROUND
    limit = 0 if fresh else context.policy.max_versions_behind
    behind = (context.behind.get(session.base_version_id) for session in cohort.sessions_of(contribution))
    return Refusal.WRONG_LINEAGE if any(number is None or number > limit for number in behind) else ""


def _not_contributed(contribution: Contribution, _context: IntakeContext) -> str:
    used = any(session.contributed_to_federation for session in cohort.sessions_of(contribution))
    return Refusal.ALREADY_CONTRIBUTED if used else ""


def _plausible_samples(contribution: Contribution, context: IntakeContext) -> str:
    """A sample is one interaction after the first: nobody trained on more than they have."""
    known = context.interactions.get(contribution.subject_key, 0)
    counts = [contribution.samples, *(session.samples for session in cohort.sessions_of(contribution))]
    return "" if all(1 <= count < max(known, 1) for count in counts) else Refusal.IMPLAUSIBLE_SAMPLES


RULES: tuple[Rule, ...] = (_consent, _has_sessions, _own_sessions, _lineage, _not_contributed, _plausible_samples)


def _inspect_delta(contribution: Contribution, context: IntakeContext) -> Finding:
    """Read the whole delta, once: shape, names, dtype, checksum and finiteness by the store; then its norm."""
    discounts = context.discounts(cohort.sessions_of(contribution))
    try:
        delta = cohort.read_contribution(contribution, reader=context.reader, discounts=discounts)
    except StoreError as error:
        cause = error.__cause__
        return Finding(cause.code if isinstance(cause, TensorFileError) else error.code, str(error))
    try:
        norm = global_norm(delta)
    except PrivacyError:  # the sum of sessions that are finite each may not be
        return Finding(Refusal.NOT_FINITE, _label(Refusal.NOT_FINITE))
    if norm > context.policy.max_delta_norm:
        return Finding(Refusal.NORM_TOO_LARGE, _label(Refusal.NORM_TOO_LARGE), norm)
    return Finding("", "", norm)


def _record(contribution: Contribution, finding: Finding) -> None:
    Contribution.objects.filter(pk=contribution.pk, verdict=Verdict.PENDING).update(
        verdict=Verdict.REJECTED if finding.code else Verdict.ACCEPTED,
        reason_code=finding.code,
        reason=finding.reason,
        norm=finding.norm,
    )


def _learners(block: Sequence[Contribution]) -> dict[UUID, Learner]:
    found: Iterator[Learner] = iter(Learner.objects.filter(subject_key__in=[row.subject_key for row in block]))
    return {learner.subject_key: learner for learner in found}


def _erased_or_refused(contribution: Contribution, learners: Mapping[UUID, Learner]) -> str:
    learner = learners.get(contribution.subject_key)
    return str(Refusal.ERASED) if learner is None else consent_refusal(learner)


def _label(code: str) -> str:
    """The code in words; codes of engines and encoders are words of their own."""
    for known in (Refusal, Exclusion):
        if code in known.values:
            return str(known(code).label)
    return code
