"""Running a round from its first state to its last, from wherever it stands.

Each state has one step, which moves the round on in the transaction that completes its work. A run that dies in a step
leaves the round in that state, and the next run does the step again: what was done is found and not done twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from django.db import transaction
from django.utils import timezone
from django.utils.translation import gettext as _

from aivo_core.network import NetworkSpec
from aivo_site.errors import DomainError, Skipped
from aivo_site.jobs.models import Job
from federation import engines
from federation.models import AggregationRound, ContributionSource, PromotionMode, RoundState
from federation.policies import RoundPolicy
from federation.rounds import candidate, cohort, evidence, intake, lifecycle, private, promotion, sharing
from federation.rounds.aggregation import aggregate_of, aggregate_round, require_enough
from federation.rounds.eligibility import LearnerVerdict, Selection, select_learners
from federation.rounds.errors import RoundConflict, RoundFailed, RoundSkipped, RoundStopped
from federation.rounds.report import describe_round
from federation.rounds.sharing import Sharing
from federation.strategies import StrategyError
from models_store import store, versions
from models_store.models import MainModelVersion
from models_store.store import LoadedVersion

Progress = Callable[[int, int, str], None]
DEFAULT_ACTOR = "run_federated_aggregation"


def _no_progress(_done: int, _total: int, _message: str) -> None:
    return None


def _never() -> bool:
    return False


@dataclass
class RoundRun:
    """One run of a round: what its steps share."""

    round: AggregationRound
    policy: RoundPolicy
    actor: str
    progress: Progress = _no_progress
    should_stop: Callable[[], bool] = _never
    job: Job | None = None
    loaded: LoadedVersion | None = field(default=None)

    @property
    def sharing(self) -> Sharing:
        """How its long steps are shared with other workers."""
        return Sharing(self.job, self.interrupted, self.progress)

    @property
    def base(self) -> LoadedVersion:
        """The round's base version in memory."""
        if self.loaded is None:
            self.loaded = store.load_version(self.round.base_version)
        return self.loaded

    def past_deadline(self) -> bool:
        return timezone.now() >= self.round.deadline

    def interrupted(self) -> bool:
        """Whether a long step should end early."""
        return self.should_stop() or self.past_deadline()


def run_round(
    *,
    policy: RoundPolicy,
    job: Job | None = None,
    actor: str = DEFAULT_ACTOR,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Begin a round, or go on with the open one whose run died, and bring it to an end.

    A round that is gone on with keeps the policy it began with. Rounds end PROMOTED, REJECTED or, with a manual policy,
    AWAITING_DECISION when this returns.

    Args:
        policy: checked again here.
        job: the job that runs it, whose lease says that this run lives.

    Returns:
        ``describe_round`` of it, and ``resumed``.

    Raises:
        UsageError: the policy cannot be run, or (``memory_limit``) its engine may not use the memory that one learner takes.
        NoMainModel: there is no active version.
        RoundSkipped: ``round_running``, ``awaiting_decision``; or the round ended SKIPPED.
        RoundFailed: the round ended FAILED. Its ``code`` says why.
        RoundStopped: the run was asked to stop.
    """
    policy.validate()
    private.privacy_of(policy)
    base = versions.active_version()
    if policy.contribution_source == ContributionSource.ROUND:
        spec = NetworkSpec.from_json(base.architecture)
        engines.check_memory(policy.engine, spec=spec, config=policy.contribution_config())
    claim = lifecycle.claim_round(policy=policy, base=base, job=job, actor=actor)
    run = RoundRun(
        claim.round,
        RoundPolicy.from_json(claim.round.policy),
        actor,
        progress or _no_progress,
        should_stop or _never,
        job,
    )
    _drive(run, job)
    return {**_outcome(run.round), "resumed": claim.resumed}


def preview_round(*, policy: RoundPolicy) -> Selection:
    """Who would take part in a round now and who would not, and why; changes nothing.

    Raises:
        UsageError, NoMainModel: as ``run_round``.
    """
    policy.validate()
    privacy = private.privacy_of(policy)
    return _selection(policy, versions.active_version(), privacy)


def _drive(run: RoundRun, job: Job | None) -> None:
    """Do steps until the round is over or waits for a person."""
    try:
        while run.round.state in STEPS:
            _check_may_go_on(run, job)
            STEPS[RoundState(run.round.state)](run)
    except RoundConflict:
        # Somebody ended the round, or owns it now; what it says of itself is the outcome.
        run.round.refresh_from_db()
        if not run.round.is_terminal:
            raise
    except RoundStopped:
        raise
    except Skipped as error:
        lifecycle.finish(run.round, to=RoundState.SKIPPED, code=error.code, reason=str(error), actor=run.actor)
    except (DomainError, StrategyError) as error:
        run.round.refresh_from_db()
        if not run.round.is_terminal:
            lifecycle.finish(run.round, to=RoundState.FAILED, code=error.code, reason=str(error), actor=run.actor)


def _check_may_go_on(run: RoundRun, job: Job | None) -> None:
    if run.past_deadline():
        raise RoundFailed(_("The deadline passed in state %s.") % run.round.state, code="deadline_passed")
    if run.should_stop():
        if job is not None and Job.objects.filter(pk=job.pk, cancel_requested_at__isnull=False).exists():
            lifecycle.finish(
                run.round, to=RoundState.CANCELLED, code="cancelled", reason=_("The job was cancelled."), actor=run.actor
            )
        raise RoundStopped(_("Round %(n)d stopped in state %(state)s.") % {"n": run.round.sequence, "state": run.round.state})
    active = promotion.active_or_none()
    if active != run.round.base_version:
        name = active.version if active is not None else _("none")
        raise RoundFailed(_("Version %s became active while the round ran.") % name, code="base_moved")


def _select(run: RoundRun) -> None:
    privacy = private.privacy_of(run.policy)
    selection = _selection(run.policy, run.round.base_version, privacy)
    chosen: Sequence[LearnerVerdict] = selection.eligible
    fields: dict[str, Any] = {"eligible": len(chosen), "excluded": selection.excluded}
    try:
        require_enough(run.policy, len(chosen))
    except RoundSkipped as error:
        lifecycle.finish(run.round, to=RoundState.SKIPPED, code=error.code, reason=str(error), actor=run.actor, **fields)
        return
    if privacy is not None:
        privacy.check_may_begin()
        chosen = privacy.draw(chosen)
    fresh = run.policy.contribution_source == ContributionSource.ROUND
    with transaction.atomic():
        cohort.create_cohort(run.round, chosen, run.policy)
        lifecycle.advance(run.round, to=RoundState.TRAINING if fresh else RoundState.INTAKE, **fields)


def _selection(policy: RoundPolicy, base: MainModelVersion, privacy: private.RoundPrivacy | None) -> Selection:
    return select_learners(policy=policy, base=base, budget_spent=None if privacy is None else privacy.budget_spent())


def _train(run: RoundRun) -> None:
    done = run.sharing.do(
        sharing.phase(sharing.TRAIN, run.round),
        make=lambda: sharing.plans_to_train(run.round, cohort.untrained_rows(run.round)),
        handler=sharing.train_shard,
        message=_("training contributions"),
    )
    if done is None:
        _stopped(run)
        return
    lifecycle.advance(run.round, to=RoundState.INTAKE)


def _intake(run: RoundRun) -> None:
    done = run.sharing.do(
        sharing.phase(sharing.INTAKE, run.round),
        make=lambda: sharing.plans_to_read(run.round, cohort.pending_rows(run.round)),
        handler=sharing.intake_shard,
        message=_("checking contributions"),
    )
    if done is None:
        _stopped(run)
        return
    if not run.policy.differential_privacy:  # a private round goes on whoever came: rules that look at the cohort have no bound
        intake.quarantine_outliers(run.round, run.policy)
        require_enough(run.policy, cohort.accepted_rows(run.round).count())
    lifecycle.advance(run.round, to=RoundState.AGGREGATING)


def _aggregate(run: RoundRun) -> None:
    if aggregate_round(run.round, policy=run.policy, base=run.base, sharing=run.sharing) is None:
        _stopped(run)


def _stopped(run: RoundRun) -> None:
    """A step ended early: the check before the next step says why, unless the round was ended by somebody else.

    Raises:
        RoundConflict: it was.
    """
    lifecycle.check_unchanged(run.round)


def _evaluate(run: RoundRun) -> None:
    """Measure, keep what was measured, publish the version, decide; each part only if it is not there yet."""
    attempt = aggregate_of(run.round)
    aggregate = store.read_aggregate(path=attempt.aggregate_path, sha256=attempt.aggregate_sha256, spec=run.base.spec)
    tail = candidate.candidate_tail(run.base, aggregate, run.policy.server_learning_rate)
    if not run.round.gate:
        decision = evidence.run_gate(policy=run.policy, base=run.base, candidate=tail, progress=run.progress)
        lifecycle.advance(run.round, to=RoundState.EVALUATING, gate=decision.report, performance_improvement=decision.improvement)
    samples = sum(cohort.accepted_rows(run.round).values_list("samples", flat=True))
    candidate.publish_candidate(run.round, attempt=attempt, policy=run.policy, base=run.base, tail=tail, samples=samples)
    gate = run.round.gate
    if not gate["passed"]:
        promotion.reject_round(run.round, actor=run.actor, code=gate["reason_code"], reason=gate["reason"])
    elif run.policy.promotion == PromotionMode.MANUAL:
        lifecycle.advance(run.round, to=RoundState.AWAITING_DECISION, deadline=lifecycle.deadline_for_decision())
    else:
        promotion.promote_round(run.round, actor=run.actor, reason=_("round %d passed the gate") % run.round.sequence)


def _outcome(round_: AggregationRound) -> dict[str, Any]:
    """What the round became; a skipped or failed one raises with the same object in ``result``."""
    result = describe_round(round_)
    if round_.state == RoundState.SKIPPED:
        raise RoundSkipped(round_.reason, code=round_.reason_code, result=result)
    if round_.state == RoundState.CANCELLED:
        raise RoundStopped(
            _("Round %(n)d was cancelled: %(why)s") % {"n": round_.sequence, "why": round_.reason}, code="cancelled"
        )
    if round_.state == RoundState.FAILED:
        raise RoundFailed(round_.reason, code=round_.reason_code, result=result)
    return result


STEPS: dict[RoundState, Callable[[RoundRun], None]] = {
    RoundState.SELECTING: _select,
    RoundState.TRAINING: _train,
    RoundState.INTAKE: _intake,
    RoundState.AGGREGATING: _aggregate,
    RoundState.EVALUATING: _evaluate,
}
