"""Job kinds of this app: thin doors over its services."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from django.utils.translation import gettext_lazy as _

from aivo_site.errors import UsageError
from aivo_site.jobs.context import JobContext
from aivo_site.jobs.registry import JobKind, register
from aivo_site.jobs.shard_context import ShardContext, ShardHandler
from aivo_site.jobs.shards import MAX_STARTS

TRAIN_LEARNER_MODELS = "train_learner_models"
TRAIN_LEARNER_MODEL = "train_learner_model"
"""One learner's own copy, as after a session."""


def _lazily(module: str, name: str) -> ShardHandler:
    """A shard handler whose module is imported when it is first needed."""

    def handle(context: ShardContext) -> Mapping[str, Any]:
        found: Mapping[str, Any] = getattr(import_module(module), name)(context)
        return found

    return handle


_TRAINING_SHARDS = {"learners": _lazily("federation.shared_training", "train_shard")}
_ROUND_SHARDS = {
    "train": _lazily("federation.rounds.sharing", "train_shard"),
    "intake": _lazily("federation.rounds.sharing", "intake_shard"),
    "quality": _lazily("federation.rounds.sharing", "quality_shard"),
    "aggregate": _lazily("federation.rounds.partial_sums", "aggregate_shard"),
}


def _run_federated_aggregation(context: JobContext) -> Mapping[str, Any]:
    from federation.rounds import service

    params = _params(context, allowed=("overrides", "dry_run", "rebase"))
    return _stoppable(
        context,
        lambda: service.aggregate(
            overrides=params.get("overrides") or {},
            dry_run=bool(params.get("dry_run", False)),
            with_rebase=bool(params.get("rebase", True)),
            job=context.job,
            actor=context.actor,
            progress=context.progress,
            should_stop=context.should_stop,
        ),
    )


def _promote_main_model(context: JobContext) -> Mapping[str, Any]:
    from federation.rounds import service

    params = _params(context, allowed=("version", "reason", "rebase"))
    return _stoppable(
        context,
        lambda: service.promote(
            version=str(params.get("version") or ""),
            reason=str(params.get("reason") or ""),
            actor=context.actor,
            with_rebase=bool(params.get("rebase", True)),
            again=context.job.starts > 1,
            progress=context.progress,
            should_stop=context.should_stop,
        ),
    )


def _rollback_main_model(context: JobContext) -> Mapping[str, Any]:
    from federation.rounds import service

    params = _params(context, allowed=("version", "reason", "rebase"))
    return _stoppable(
        context,
        lambda: service.roll_back(
            version=str(params["version"]) if params.get("version") else None,
            reason=str(params.get("reason") or ""),
            actor=context.actor,
            with_rebase=bool(params.get("rebase", True)),
            again=context.job.starts > 1,
            progress=context.progress,
            should_stop=context.should_stop,
        ),
    )


def _train_learner_models(context: JobContext) -> Mapping[str, Any]:
    from federation import local_training

    params = _params(context, allowed=("learner_ids", "organisation", "limit", "overrides", "force"))
    report = local_training.train_learners(
        learners=local_training.learners_to_train(
            learner_ids=params.get("learner_ids") or (),
            organisation=params.get("organisation") or "",
            limit=params.get("limit"),
        ),
        policy=local_training.training_policy(params.get("overrides")),
        force=bool(params.get("force", False)),
        actor=context.actor,
        job=context.job,
        progress=context.progress,
        should_stop=context.should_stop,
    )
    for note in report.notes:
        context.log(f"{note.learner_id}: {note.code}: {note.message}", "WARNING")
    if report.stopped:
        context.check_cancelled()
    report.require_work()
    return report.to_json()


def _train_learner_model(context: JobContext) -> Mapping[str, Any]:
    from federation import local_training

    params = _params(context, allowed=("learner_id",))
    return local_training.train_learner(learner_id=str(params.get("learner_id") or ""), actor=context.actor)


def _training_needs_child(params: Mapping[str, Any]) -> bool:
    from federation import engines
    from federation.policies import default_policy

    overrides = params.get("overrides") or {}
    return engines.needs_own_process(str(overrides.get("engine") or default_policy().engine))


def _round_needs_child(params: Mapping[str, Any]) -> bool:
    """A round that is gone on with trains with the engine that it began with."""
    from federation import engines
    from federation.rounds import lifecycle

    current = lifecycle.open_round()
    begun = current is not None and engines.needs_own_process(str(current.policy.get("engine", "")))
    return begun or _training_needs_child(params)


def _decide_round(context: JobContext) -> Mapping[str, Any]:
    from federation.models import AggregationRound
    from federation.rounds import promotion
    from federation.rounds.report import describe_round

    params = _params(context, allowed=("round", "decision", "reason"))
    row = AggregationRound.objects.get(pk=params["round"])
    if not (context.job.starts > 1 and row.is_terminal):
        promotion.decide_round(
            round_=row, decision=str(params["decision"]), reason=str(params.get("reason") or ""), actor=context.actor
        )
        row.refresh_from_db()
    return describe_round(row)


def _rebase(context: JobContext) -> Mapping[str, Any]:
    from federation.rounds import rebase
    from models_store import versions

    params = _params(context, allowed=("version",))
    target = versions.resolve_version(str(params["version"])) if params.get("version") else versions.active_version()
    return _stoppable(
        context,
        lambda: rebase.rebase_models(target=target, progress=context.progress, should_stop=context.should_stop).to_json(),
    )


def register_kinds() -> None:
    """Make this app's job kinds known."""
    register(
        JobKind(
            name="run_federated_aggregation",
            label=_("Federated aggregation"),
            run=_run_federated_aggregation,
            queue="training",
            child_process=_round_needs_child,
            max_starts=MAX_STARTS + 2,
            shard_handlers=_ROUND_SHARDS,
        )
    )
    register(
        JobKind(
            name=TRAIN_LEARNER_MODELS,
            label=_("Train learners' own models"),
            run=_train_learner_models,
            queue="training",
            child_process=_training_needs_child,
            max_starts=MAX_STARTS + 2,
            shard_handlers=_TRAINING_SHARDS,
        )
    )
    register(
        JobKind(
            name=TRAIN_LEARNER_MODEL,
            label=_("Train one learner's own model"),
            run=_train_learner_model,
            child_process=_training_needs_child,
        )
    )
    register(JobKind(name="promote_main_model", label=_("Promote a main model version"), run=_promote_main_model))
    register(JobKind(name="rollback_main_model", label=_("Roll back to a main model version"), run=_rollback_main_model))
    register(JobKind(name="decide_round", label=_("Decide on a waiting round"), run=_decide_round))
    register(JobKind(name="rebase", label=_("Move learners' models to the active version"), run=_rebase))


def _stoppable(context: JobContext, work: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Run ``work``; where it ended because the job was cancelled, the job ends so too."""
    from federation.rounds.errors import RoundStopped

    try:
        return work()
    except RoundStopped:
        context.check_cancelled()
        raise


def _params(context: JobContext, *, allowed: tuple[str, ...]) -> Mapping[str, Any]:
    unknown = sorted(set(context.params) - set(allowed))
    if unknown:
        raise UsageError(f"params may be {', '.join(allowed)}, not {', '.join(unknown)}", code="bad_params")
    return context.params
