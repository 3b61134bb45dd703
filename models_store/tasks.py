"""The job kinds of the models app: thin doors over its services."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from aivo_site.errors import Skipped
from aivo_site.jobs.registry import JobKind, register

if TYPE_CHECKING:
    from aivo_site.jobs.context import JobContext

PREPARE_CURRICULUM_DATA = "prepare_curriculum_data"
TRAIN_MAIN_MODEL = "train_main_model"
CLONE_LEARNER_MODELS = "clone_learner_models"
COLLECT_GARBAGE = "collect_garbage"


def register_kinds() -> None:
    """Called when the app starts."""
    register(JobKind(PREPARE_CURRICULUM_DATA, gettext_lazy("prepare the curriculum"), _prepare, queue="training"))
    register(JobKind(TRAIN_MAIN_MODEL, gettext_lazy("train the main model"), _train_main, queue="training", child_process=True))
    register(JobKind(CLONE_LEARNER_MODELS, gettext_lazy("clone the main model for learners"), _clone))
    register(JobKind(COLLECT_GARBAGE, gettext_lazy("remove files that no row points to"), _collect_garbage))


def _prepare(context: JobContext) -> Mapping[str, Any]:
    from models_store.preparing import prepare_curriculum

    return prepare_curriculum(actor=context.actor, progress=context.progress).to_json()


def _train_main(context: JobContext) -> Mapping[str, Any]:
    """``params``: any of ``epochs``, ``seed``, ``batch_size``, ``learning_rate``, ``hidden_layers``."""
    from models_store.errors import TrainingInterrupted
    from models_store.main_training import train_main

    try:
        report = train_main(**context.params, actor=context.actor, progress=context.progress, should_stop=context.should_stop)
    except TrainingInterrupted:
        context.check_cancelled()
        raise
    for note in report.notes:
        context.log(note, "WARNING")
    return report.to_json()


def _clone(context: JobContext) -> Mapping[str, Any]:
    """``params``: ``learner_ids``, ``organisation``, ``pool``, ``limit`` choose; ``freeze_layers``, ``version`` say how."""
    from models_store.cloning import clone_learners, learners_to_clone
    from models_store.provisioning.decision import check_cloning_allowed
    from models_store.versions import resolve_version

    check_cloning_allowed()
    params = dict(context.params)
    freeze_layers, version = params.pop("freeze_layers", None), params.pop("version", "")
    learners = learners_to_clone(**params)
    if not learners.exists():
        raise Skipped(_("No learner matches."), code="no_learners")
    report = clone_learners(
        learners=learners,
        version=resolve_version(version) if version else None,
        freeze_layers=freeze_layers,
        actor=context.actor,
        progress=context.progress,
        should_stop=context.should_stop,
    )
    context.check_cancelled()
    return report.to_json()


def _collect_garbage(context: JobContext) -> Mapping[str, Any]:
    """``params``: ``older_than_hours``."""
    from models_store.garbage import GRACE, collect_garbage

    hours = context.params.get("older_than_hours")
    return collect_garbage(older_than=GRACE if hours is None else timedelta(hours=hours)).to_json()
