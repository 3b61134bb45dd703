"""What the doors call: one job's worth of aggregation, promotion, rollback or rebase, and the original's service object."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any
from uuid import UUID

from django.utils.translation import gettext as _

from aivo_site.errors import DomainError, Skipped, UsageError
from aivo_site.jobs import services as jobs
from aivo_site.jobs.models import Job
from federation.models import AggregationRound
from federation.policies import RoundPolicy, default_policy
from federation.rounds import lifecycle, private, promotion, rebase
from federation.rounds.cohort import accepted_rows
from federation.rounds.report import describe_round
from federation.rounds.running import DEFAULT_ACTOR, Progress, preview_round, run_round
from federation.rounds.sharing import AGGREGATION_KIND
from models_store import versions
from models_store.models import MainModelVersion, VersionStatus

OVERRIDES = (
    "strategy",
    "minimum_learners",
    "max_stale_days",
    "server_learning_rate",
    "contribution_source",
    "promotion",
    "differential_privacy",
    "noise_multiplier",
    "clip_norm",
)
"""Fields of the policy that one run may set for itself."""

Stop = Callable[[], bool]


def policy_with(overrides: Mapping[str, Any]) -> RoundPolicy:
    """The installation's policy with some fields set for one round, checked.

    Raises:
        UsageError: a field that cannot be set for one round, or a policy that cannot be run.
    """
    unknown = sorted(set(overrides) - set(OVERRIDES))
    if unknown:
        text = _("overrides may set %(allowed)s, not %(given)s")
        raise UsageError(text % {"allowed": ", ".join(OVERRIDES), "given": ", ".join(unknown)}, code="unknown_override")
    policy = replace(RoundPolicy.from_row(default_policy()), **overrides)
    policy.validate()
    private.privacy_of(policy)
    return policy


def aggregate(
    *,
    overrides: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    with_rebase: bool = True,
    job: Job | None = None,
    actor: str = DEFAULT_ACTOR,
    progress: Progress | None = None,
    should_stop: Stop | None = None,
) -> dict[str, Any]:
    """One round from beginning to end, and after a promotion the rebase of the learners' models.

    Args:
        dry_run: only say who would take part and who would not.

    Returns:
        ``describe_round``, ``seconds``, and ``rebase`` (null where nothing was moved).

    Raises:
        as ``run_round`` and ``rebase_models``; a round's refusal carries the same object in ``result``.
    """
    started = time.monotonic()
    policy = policy_with(overrides or {})
    if dry_run:
        return {**_preview(policy), "seconds": time.monotonic() - started}
    try:
        result = run_round(policy=policy, job=job, actor=actor, progress=progress, should_stop=should_stop)
    except DomainError as error:
        partial = getattr(error, "result", None)
        if isinstance(partial, dict) and partial:
            partial["seconds"] = time.monotonic() - started
        raise
    result["rebase"] = None
    if result["state"] == "PROMOTED" and with_rebase:
        promoted = MainModelVersion.objects.get(version=result["candidate_version"])
        result["rebase"] = rebase_if_active(promoted, progress=progress, should_stop=should_stop)
    return {**result, "seconds": time.monotonic() - started}


def promote(
    *,
    version: str,
    reason: str,
    actor: str,
    with_rebase: bool = True,
    again: bool = False,
    progress: Progress | None = None,
    should_stop: Stop | None = None,
) -> dict[str, Any]:
    """Promote a version by hand, then move the learners' models to it.

    Args:
        again: a second try of the same job, whose first may have promoted the version already.

    Raises:
        as ``promote_version``, ``resolve_version``.
    """
    row = versions.resolve_version(version)
    previous = promotion.active_or_none()
    if not (again and row.status == VersionStatus.ACTIVE):
        row = promotion.promote_version(version=row, reason=reason, actor=actor)
    return _moved(row, previous, with_rebase, progress, should_stop)


def roll_back(
    *,
    version: str | None,
    reason: str,
    actor: str,
    with_rebase: bool = True,
    again: bool = False,
    progress: Progress | None = None,
    should_stop: Stop | None = None,
) -> dict[str, Any]:
    """Make an earlier version active, then move the learners' models to it.

    Args:
        version: None for the parent of the active version. again: as for ``promote``.

    Raises:
        as ``rollback``, ``resolve_version``.
    """
    target = versions.resolve_version(version) if version else None
    previous = promotion.active_or_none()
    if again and target is not None and target.status == VersionStatus.ACTIVE:
        row = target
    else:
        row = promotion.rollback(to=target, reason=reason, actor=actor)
    return _moved(row, previous, with_rebase, progress, should_stop)


def rebase_if_active(
    version: MainModelVersion, *, progress: Progress | None = None, should_stop: Stop | None = None
) -> dict[str, Any] | None:
    """Move the learners' models to ``version``; null where another version became active meanwhile."""
    try:
        return rebase.rebase_models(target=version, progress=progress, should_stop=should_stop).to_json()
    except Skipped as error:
        if error.code != "not_active":
            raise
        return None


def _moved(
    row: MainModelVersion,
    previous: MainModelVersion | None,
    with_rebase: bool,
    progress: Progress | None,
    should_stop: Stop | None,
) -> dict[str, Any]:
    moved = rebase_if_active(row, progress=progress, should_stop=should_stop) if with_rebase else None
    return {
        "active_version": row.version,
        "previous_version": None if previous is None or previous == row else previous.version,
        "rebase": moved,
    }


def _preview(policy: RoundPolicy) -> dict[str, Any]:
    selection = preview_round(policy=policy)
    return {
        "dry_run": True,
        "base_version": versions.active_version().version,
        "eligible": len(selection.eligible),
        "excluded": selection.excluded,
        "minimum_learners": policy.minimum_learners,
        "learners": [
            {"learner_id": verdict.learner_id, "eligible": verdict.eligible, "reason": verdict.reason_code or None}
            for verdict in selection.verdicts
        ],
    }


# --- The original's interface ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AggregationConfig:
    """How the service's rounds differ from the installation's policy; None leaves the policy's value.

    Attributes:
        main_model_path: a version's name or path; it must be the active version, from which rounds start.
        learning_rate: the server learning rate.
    """

    main_model_path: str | None = None
    aggregation_strategy: str | None = None
    minimum_learners: int | None = None
    max_stale_days: int | None = None
    learning_rate: float | None = None
    enable_differential_privacy: bool | None = None
    noise_multiplier: float | None = None
    clip_norm: float | None = None

    def overrides(self) -> dict[str, Any]:
        """As fields of the policy. Clipping norm and noise only count where privacy is asked for."""
        named = {
            "strategy": self.aggregation_strategy,
            "minimum_learners": self.minimum_learners,
            "max_stale_days": self.max_stale_days,
            "server_learning_rate": self.learning_rate,
            "differential_privacy": self.enable_differential_privacy,
        }
        if self.enable_differential_privacy:
            named.update(noise_multiplier=self.noise_multiplier, clip_norm=self.clip_norm)
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class AggregationResults:
    """What a finished aggregation measured; ``performance_improvement`` is a relative fall: positive is better."""

    performance_improvement: float | None
    strategy: str
    metrics: Mapping[str, Any]
    candidate_version: str | None


@dataclass(frozen=True)
class AggregationJobStatus:
    """How an aggregation job stands.

    Attributes:
        status: the job's state. round_state: the round's, empty before one began.
        contributing_learners: subject keys of the accepted contributions.
        aggregation_results: None before the candidate was measured.
    """

    id: str
    status: str
    round_state: str = ""
    reason: str = ""
    contributing_learners: list[str] = field(default_factory=list)
    aggregation_results: AggregationResults | None = None


class FederatedAggregationService:
    """Rounds as the original's service offers them.

    Args:
        config: an ``AggregationConfig`` or a mapping of its fields; the fields may be given as keywords too.

    Raises:
        UsageError: an unknown field.
    """

    def __init__(self, config: AggregationConfig | Mapping[str, Any] | None = None, **options: Any) -> None:
        given = (
            {f.name: getattr(config, f.name) for f in fields(config)}
            if isinstance(config, AggregationConfig)
            else dict(config or {})
        )
        given.update(options)
        known = {f.name for f in fields(AggregationConfig)}
        unknown = sorted(set(given) - known)
        if unknown:
            text = _("config may have the fields %(allowed)s, not %(given)s")
            raise UsageError(text % {"allowed": ", ".join(sorted(known)), "given": ", ".join(unknown)}, code="unknown_field")
        self.config = AggregationConfig(**given)

    def initialize(self) -> FederatedAggregationService:
        """Check configuration and main model; returns the service.

        Raises:
            UsageError: a policy that cannot be run, a path of no version, or of one that is not active.
            NoMainModel: no version is active.
        """
        policy_with(self.config.overrides())
        active = versions.active_version()
        if self.config.main_model_path and versions.resolve_version(self.config.main_model_path) != active:
            text = _("main_model_path must name the active version %s: rounds start from it")
            raise UsageError(text % active.version, code="not_active")
        return self

    def run_scheduled_aggregation(self, *, background: bool = False) -> str | None:
        """Run a round and give its job's id; None where nothing was begun: too few learners, or a round is open.

        Args:
            background: only enqueue the job for a worker.

        Raises:
            UsageError, NoMainModel: as ``initialize``.
        """
        overrides = self.config.overrides()
        policy = policy_with(overrides)
        if len(preview_round(policy=policy).eligible) < policy.minimum_learners:
            return None
        current = lifecycle.open_round()
        if current is not None and (current.state == "AWAITING_DECISION" or lifecycle.owner_lives(current)):
            return None
        params = {"overrides": overrides}
        if background:
            return str(jobs.enqueue(kind=AGGREGATION_KIND, params=params).pk)
        try:
            return str(jobs.run_inline(kind=AGGREGATION_KIND, params=params).pk)
        except DomainError as error:
            ended = getattr(error, "result", {}).get("round")
            job_id = AggregationRound.objects.filter(sequence=ended).values_list("job_id", flat=True).first() if ended else None
            if job_id is not None:
                return str(job_id)
            if isinstance(error, Skipped):
                return None
            raise

    def get_job_status(self, job_id: str | UUID) -> AggregationJobStatus | None:
        """How a job of this service stands; None for an id of no aggregation job."""
        try:
            key = UUID(str(job_id))
        except ValueError:
            return None
        job = Job.objects.filter(pk=key, kind=AGGREGATION_KIND).first()
        if job is None:
            return None
        round_ = AggregationRound.objects.filter(job=job).order_by("-sequence").first()
        if round_ is None:
            return AggregationJobStatus(id=str(key), status=str(job.state), reason=job.error_message)
        described = describe_round(round_)
        measured = bool(round_.gate)
        return AggregationJobStatus(
            id=str(key),
            status=str(job.state),
            round_state=str(round_.state),
            reason=round_.reason,
            contributing_learners=[str(subject) for subject in accepted_rows(round_).values_list("subject_key", flat=True)],
            aggregation_results=AggregationResults(
                performance_improvement=round_.performance_improvement,
                strategy=str(round_.policy["strategy"]),
                metrics=described["metrics"],
                candidate_version=described["candidate_version"],
            )
            if measured
            else None,
        )
