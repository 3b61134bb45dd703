"""Personal training in shards that workers share: the same report as from one process.

A shard is some whole blocks of the learners in their fixed order. Where a run dies, learners that were stored are left out
the next time, because there is nothing new to train them on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from django.db.models import QuerySet
from django.utils.translation import gettext as _

from aivo_site.audit.services import record
from aivo_site.jobs import shards
from aivo_site.jobs.errors import ShardStopped
from aivo_site.jobs.models import Job
from aivo_site.jobs.shard_context import ShardContext, ShardPlan
from aivo_site.jobs.shard_helpers import do_in_shards
from federation import engines, report_parts
from federation.policies import RoundPolicy
from federation.training_report import TrainingReport
from federation.training_run import BLOCK, Progress, TrainingRun

PHASE = "learners"

TRAINED_TOGETHER = BLOCK
"""Learners in a shard."""


def ordered_keys(learners: QuerySet[Any]) -> list[UUID]:
    """Primary keys, learners of one base together, then by subject key."""
    ordered = learners.order_by("personalized_model__source_version__sequence", "subject_key")
    return list(ordered.values_list("pk", flat=True))


def is_shared(job: Job, learners: QuerySet[Any]) -> bool:
    """Whether the job's learners are too many for one shard, or were when an earlier run of it planned."""
    return bool(shards.planned(parent=job, phase=PHASE)) or learners.count() > TRAINED_TOGETHER


def train_here(
    keys: Sequence[UUID],
    *,
    policy: RoundPolicy,
    force: bool,
    actor: str,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainingReport:
    """Train these learners in this process; see ``train_learners``. What was trained is in the audit log, stopped or not."""
    run = TrainingRun(engines.get_engine(policy.engine), policy, force=force)
    try:
        run.train(keys, progress, should_stop)
    finally:
        if run.report.trained:
            _audit(run.report, actor)
    return run.report


def train_shared(
    *,
    job: Job,
    learners: QuerySet[Any],
    policy: RoundPolicy,
    force: bool,
    actor: str,
    progress: Progress | None,
    should_stop: Callable[[], bool] | None,
) -> TrainingReport:
    """Train the learners in shards; where it was asked to stop, the report is of the shards that were done until then."""

    def make() -> list[ShardPlan]:
        keys = ordered_keys(learners)
        parts = [keys[begin : begin + TRAINED_TOGETHER] for begin in range(0, len(keys), TRAINED_TOGETHER)]
        shared = {"policy": policy.to_json(), "force": force, "actor": actor}
        return [ShardPlan({"learners": part, **shared}, size=len(part)) for part in parts]

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total, _("training learners' models"))

    results = do_in_shards(
        job=job, phase=PHASE, make=make, handler=train_shard, should_stop=should_stop or (lambda: False), progress=told
    )
    if results is None:
        report = report_parts.merged(shards.finished_results(parent=job, phase=PHASE), engine=policy.engine)
        report.stopped = True
        return report
    return report_parts.merged(results, engine=policy.engine)


def train_shard(context: ShardContext) -> dict[str, Any]:
    """Train the learners that the shard names and give the report of them."""
    params = context.params
    report = train_here(
        [UUID(key) for key in params["learners"]],
        policy=RoundPolicy.from_json(params["policy"]),
        force=params["force"],
        actor=params["actor"],
        progress=lambda done, _total, _message: context.progress(done),
        should_stop=context.should_stop,
    )
    if report.stopped:
        raise ShardStopped
    return report_parts.part_of(report)


def _audit(report: TrainingReport, actor: str) -> None:
    record(
        action="learners.trained",
        actor=actor,
        object_type="PersonalizedModel",
        data={
            "trained": report.trained,
            "skipped": dict(report.skipped),
            "failed": dict(report.failed),
            "engine": report.engine,
            "backend": report.backend,
        },
    )
