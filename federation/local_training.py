"""Training of learners' own copies, many in a row, each stored or left as it was.

A learner whose run dies half way has no new row, and the next run trains it with the same seed: the same tail, bit for bit.
Learners who were stored are left out then, because there is nothing new to train them on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from django.db.models import QuerySet
from django.utils.translation import gettext as _

from aivo_core.network import NetworkSpec
from aivo_site.jobs.models import Job
from federation import engines, shared_training
from federation.contributions import ContributionOutcome, produce_contributions
from federation.errors import LocalTrainingError, NothingToTrain
from federation.learner_preparation import learners_to_train
from federation.manager import FederatedLearningManager
from federation.policies import PolicyError, RoundPolicy, default_policy
from federation.training_report import TrainingReport
from federation.training_run import Progress
from models_store.versions import active_version

__all__ = [
    "ContributionOutcome",
    "FederatedLearningManager",
    "TrainingReport",
    "learners_to_train",
    "produce_contributions",
    "train_learner",
    "train_learners",
    "training_policy",
]

OVERRIDES = ("engine", "local_epochs", "batch_size", "learning_rate", "adaptation")
"""Fields of the policy that one run may set for itself."""


def training_policy(overrides: Mapping[str, Any] | None = None) -> RoundPolicy:
    """The installation's policy with some fields of local training set for one run, checked; the engine too.

    Raises:
        PolicyError: a field that cannot be set for one run (``unknown_override``), or a policy that cannot be run.
        EngineUnavailable: no such engine here.
    """
    given = dict(overrides or {})
    unknown = sorted(set(given) - set(OVERRIDES))
    if unknown:
        text = _("overrides may set %(allowed)s, not %(given)s")
        raise PolicyError(text % {"allowed": ", ".join(OVERRIDES), "given": ", ".join(unknown)}, code="unknown_override")
    policy = RoundPolicy.from_row(default_policy(), **given)
    engines.check_engine(policy.engine)
    policy.validate()
    return policy


def train_learners(
    *,
    learners: QuerySet[Any],
    policy: RoundPolicy | None = None,
    force: bool = False,
    actor: str,
    job: Job | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainingReport:
    """Train the own copy of each learner on the earlier 70 % of what they did, decide what serves them, and store both.

    Reason codes of who is left out: ``withdrawn``, ``no_consent_training``, ``wrong_pool``, ``no_model``,
    ``other_backend``, ``not_active``, ``too_few_samples``, ``nothing_new``, ``erased``. Of who failed: ``conflict``
    (another process changed the model meanwhile; nothing was stored), a code of ``StoreError`` (the tail's file is
    damaged: the model goes to ERROR), ``EncodingError``, ``EngineError`` or ``EvaluationError``. Nobody stops the others.

    Args:
        learners: a queryset without limits; its order does not matter.
        policy: how to train; None takes the installation's.
        force: also learners whose tail is the result of training on exactly these samples in this way.
        actor: user name, or the command or schedule that acts.
        job: the running ``train_learner_models`` job that this is; its workers share many learners, with the same report.
        progress: called after each learner with (done, all, message). should_stop: asked after each learner.

    Raises:
        PolicyError, EngineUnavailable: the policy cannot be run.
        NoMainModel: there is no active version.
        StoreError: a main version is damaged. ShardFailed: as what it was raised for in another worker.
    """
    started = time.monotonic()
    policy = policy or training_policy()
    policy.validate()
    spec = NetworkSpec.from_json(active_version().architecture)
    engines.check_memory(policy.engine, spec=spec, config=policy.personal_config())
    if job is not None and shared_training.is_shared(job, learners):
        report = shared_training.train_shared(
            job=job, learners=learners, policy=policy, force=force, actor=actor, progress=progress, should_stop=should_stop
        )
    else:
        keys = shared_training.ordered_keys(learners)
        report = shared_training.train_here(
            keys, policy=policy, force=force, actor=actor, progress=progress, should_stop=should_stop
        )
    report.seconds = time.monotonic() - started
    return report


def train_learner(*, learner_id: str, actor: str) -> dict[str, Any]:
    """Train one learner's own copy, as after a session; again without new interactions changes nothing.

    Args:
        learner_id: the learner's id or primary key. actor: who asks.

    Returns:
        ``learner_id``, ``serving_choice``, ``engine``, ``backend``, ``evaluation`` (null without later interactions) and
        ``seconds``.

    Raises:
        NothingToTrain: left out; the code is the reason's, ``nothing_new`` for instance.
        LocalTrainingError: training failed; the code says how.
        Else as ``train_learners``, and as ``learners_to_train``.
    """
    report = train_learners(learners=learners_to_train(learner_ids=[learner_id]), actor=actor)
    message = report.notes[0].message if report.notes else ""
    for code in report.failed:
        raise LocalTrainingError(message, code=code)
    if not report.trained:
        code = next(iter(report.skipped))
        raise NothingToTrain(
            message or _("Learner %(id)s was not trained: %(why)s.") % {"id": learner_id, "why": code}, code=code
        )
    return {
        "learner_id": learner_id,
        "serving_choice": next(iter(report.choices)),
        "engine": report.engine,
        "backend": report.backend,
        "evaluation": report.evaluations[0].to_json() if report.evaluations else None,
        "seconds": round(report.seconds, 4),
    }
