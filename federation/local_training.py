"""Training of learners' own copies, many in a row, each stored or left as it was.

A learner whose run dies half way has no new row, and the next run trains it with the same seed: the same tail, bit for bit.
Learners who were stored are left out then, because there is nothing new to train them on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from uuid import UUID

from django.db.models import QuerySet
from django.utils.translation import gettext as _

from aivo_core.encoding.errors import EncodingError
from aivo_core.engine.contract import LearnerResult, LearnerTask, LocalTrainingEngine
from aivo_core.network import FloatArray
from aivo_site.audit.services import record
from federation import engines
from federation.contributions import ContributionOutcome, produce_contributions
from federation.learner_preparation import (
    Prepared,
    inputs_digest,
    is_nothing_new,
    learner_parts,
    learners_to_train,
    next_sequence,
    training_seed,
    why_not,
    why_not_model,
)
from federation.manager import FederatedLearningManager
from federation.models import SessionPurpose
from federation.policies import PolicyError, RoundPolicy, default_policy
from federation.serving_decision import (
    LaterPart,
    ServedEvaluation,
    kept_evaluation,
    split_for_choice,
)
from federation.trained_learner import FAILURES, TrainedLearner, mark_damaged
from federation.training_report import Control, TrainingReport
from learners.models import Learner
from models_store import store
from models_store.clones import base_of
from models_store.errors import StoreError
from models_store.evaluation import EvaluationError
from models_store.models import PersonalizedModel
from models_store.version_files import LoadedVersion
from models_store.versions import active_version

__all__ = [
    "ContributionOutcome",
    "FederatedLearningManager",
    "TrainingReport",
    "learners_to_train",
    "produce_contributions",
    "train_learners",
    "training_policy",
]

Progress = Callable[[int, int, str], None]

OVERRIDES = ("engine", "local_epochs", "batch_size", "learning_rate", "adaptation")
"""Fields of the policy that one run may set for itself."""

BLOCK = 64
"""Learners whose samples are held, and whose tails are written, together."""

BLOCK_SAMPLES = 50_000
"""A block ends before it holds more samples than this: some 130 MB."""


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
        progress: called after each learner with (done, all, message). should_stop: asked after each learner.

    Raises:
        PolicyError, EngineUnavailable: the policy cannot be run.
        NoMainModel: there is no active version.
        StoreError: a main version is damaged.
    """
    started = time.monotonic()
    policy = policy or training_policy()
    policy.validate()
    active_version()
    run = _Run(engines.get_engine(policy.engine), policy, force=force)
    run.train(learners, progress, should_stop)
    run.report.seconds = time.monotonic() - started
    if run.report.trained:
        _audit(run.report, actor)
    return run.report


class _Run:
    """One call of ``train_learners``."""

    def __init__(self, engine: LocalTrainingEngine, policy: RoundPolicy, *, force: bool) -> None:
        self.report = TrainingReport(engine=engine.name)
        self._engine = engine
        self._policy = policy
        self._config = policy.personal_config()
        self._force = force
        self._control = _ControlChain(self.report)

    def train(self, learners: QuerySet[Any], progress: Progress | None, should_stop: Callable[[], bool] | None) -> None:
        keys = _ordered_keys(learners)
        steps = self._steps(keys)
        for done, _step in enumerate(steps, start=1):
            if progress is not None:
                progress(done, len(keys), _("%(n)d trained") % {"n": self.report.trained})
            if should_stop is not None and done < len(keys) and should_stop():
                self.report.stopped = True
                break
        self._control.close()
        self.report.backend = self.report.backend or self._engine.backend

    def _steps(self, keys: Sequence[UUID]) -> Iterator[None]:
        """One step for each learner, as soon as it is trained or left out."""
        for entry in self._blocks(keys):
            if entry is None:
                yield None
            else:
                yield from self._train_block(entry)

    def _blocks(self, keys: Sequence[UUID]) -> Iterator[list[Prepared] | None]:
        """Learners to train, in blocks of one base each; None for each learner who is left out."""
        block: list[Prepared] = []
        held = 0
        for key in keys:
            prepared = self._prepare(key)
            if prepared is None:
                yield None
                continue
            samples = len(prepared.training) + len(prepared.later)
            if block and (len(block) == BLOCK or held + samples > BLOCK_SAMPLES or not _same_base(block[0].base, prepared.base)):
                yield block
                block, held = [], 0
            block.append(prepared)
            held += samples
        if block:
            yield block

    def _prepare(self, key: UUID) -> Prepared | None:
        learner = Learner.objects.filter(pk=key).first()
        model = PersonalizedModel.objects.select_related("learner", "source_version").filter(learner=key).first()
        code = why_not(learner) or why_not_model(model)
        if code or model is None:
            self.report.leave_out("", code)
            return None
        name = model.learner.learner_id
        base = base_of(model)
        try:
            training, later = learner_parts(model.learner, base, self._policy.max_samples)
        except EncodingError as error:
            self.report.fail(name, error.code, str(error))
            return None
        if len(training) < self._policy.min_samples:
            text = _("%(n)d training samples; at least %(least)d are needed")
            counts = {"n": len(training), "least": self._policy.min_samples}
            self.report.leave_out(name, "too_few_samples", text % counts)
            return None
        digest = inputs_digest(base=base, config=self._config, training=training)
        if not self._force and is_nothing_new(model, digest):
            self._count_as_it_is(model)
            return None
        try:
            tail = store.read_tail(model=model, spec=base.spec)
        except StoreError as error:
            mark_damaged(model, error)
            self.report.fail(name, error.code, str(error))
            return None
        sequence = next_sequence(model)
        return Prepared(
            model=model,
            base=base,
            training=training,
            later=later,
            start_tail=tail,
            sequence=sequence,
            seed=training_seed(model.learner.subject_key, SessionPurpose.PERSONAL, sequence),
            inputs_sha256=digest,
        )

    def _count_as_it_is(self, model: PersonalizedModel) -> None:
        try:
            kept = kept_evaluation(str(model.learner.subject_key), model.serving_evidence)
        except EvaluationError as error:
            self.report.fail(model.learner.learner_id, error.code, str(error))
            return
        self.report.leave_out(model.learner.learner_id, "nothing_new")
        self.report.choices[model.serving_choice] += 1
        if kept is not None:
            self.report.evaluations.append(kept)

    def _train_block(self, block: Sequence[Prepared]) -> Iterator[None]:
        """Train a block and store it learner by learner, one step each."""
        base = block[0].base
        tasks = [task for prepared in block for task in _tasks(prepared)]
        results = self._engine.train(spec=base.spec, weights=base.weights, config=self._config, tasks=iter(tasks))
        for prepared in block:
            result = next(results)
            choice_result = next(results) if prepared.can_choose else None
            self.report.computed_by(result.backend)
            self.report.training_seconds += result.seconds + (choice_result.seconds if choice_result else 0.0)
            self._finish(prepared, result, choice_result)
            yield None

    def _finish(self, prepared: Prepared, result: LearnerResult, choice_result: LearnerResult | None) -> None:
        name = prepared.model.learner.learner_id
        for one in (result, choice_result):
            if one is not None and one.error_code:
                self.report.fail(name, one.error_code, one.error_message)
                return
        try:
            trained = TrainedLearner.of(prepared, result, choice_result)
        except EvaluationError as error:
            self.report.fail(name, error.code, str(error))
            return
        code = trained.store(policy=self._policy, engine=self.report.engine)
        if code in FAILURES:
            self.report.fail(name, code, _("the model was changed by another process; nothing was stored"))
        elif code:
            self.report.leave_out(name, code)
        else:
            self._count(trained)

    def _count(self, trained: TrainedLearner) -> None:
        self.report.trained += 1
        self.report.choices[trained.choice.serving_choice] += 1
        if trained.evaluation is not None:
            self.report.evaluations.append(trained.evaluation)
            self._control.add(trained.later, trained.served, trained.evaluation)


class _ControlChain:
    """Measures each learner's later interactions under the model of the learner before, and the first under the last's.

    What a clone is worth that is not the learner's own: only what the own clone gains beyond it is personal. Holds one
    tail and one learner's activations per base.
    """

    def __init__(self, report: TrainingReport) -> None:
        self._report = report
        self._first: tuple[LaterPart, ServedEvaluation] | None = None
        self._last: FloatArray | None = None
        self._pairs = 0

    def add(self, later: LaterPart, served: FloatArray, evaluation: ServedEvaluation) -> None:
        """The next learner, with what serves them."""
        if self._first is not None and not _same_base(self._first[0].base, later.base):
            self.close()
        if self._first is None:
            self._first = (later, evaluation)
        elif self._last is not None:
            self._measure(later, evaluation)
        self._last = served

    def close(self) -> None:
        """Close the ring; a single learner has no other."""
        if self._first is not None and self._last is not None and self._pairs:
            self._measure(*self._first)
        self._first, self._last, self._pairs = None, None, 0

    def _measure(self, later: LaterPart, evaluation: ServedEvaluation) -> None:
        if self._last is None:
            raise AssertionError("there is no other learner's model to measure")
        self._report.controls.append(Control(evaluation.main, later.losses(self._last)))
        self._pairs += 1


def _same_base(one: LoadedVersion, other: LoadedVersion) -> bool:
    return (one.version, one.spec) == (other.version, other.spec)


def _ordered_keys(learners: QuerySet[Any]) -> list[UUID]:
    """Primary keys, learners of one base together, then by subject key."""
    ordered = learners.order_by("personalized_model__source_version__sequence", "subject_key")
    return list(ordered.values_list("pk", flat=True))


def _tasks(prepared: Prepared) -> Iterator[LearnerTask]:
    """On all training samples from the learner's own tail; and where there are enough, the one that chooses the blend.

    The second starts at the base's tail: the learner's own may have seen the samples that choose.
    """
    base = prepared.base
    yield LearnerTask(prepared.key, prepared.training, prepared.start_tail, base.tail, prepared.seed)
    if prepared.can_choose:
        fit, _held_out = split_for_choice(prepared.training)
        yield LearnerTask(prepared.key, fit, base.tail, base.tail, prepared.seed)


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
