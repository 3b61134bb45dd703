"""One run of training learners' own copies, each stored or left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from uuid import UUID

from django.utils.translation import gettext as _

from aivo_core.encoding.errors import EncodingError
from aivo_core.engine.contract import LearnerResult, LearnerTask, LocalTrainingEngine
from federation.control_ring import ControlRing, same_base
from federation.learner_preparation import (
    Prepared,
    inputs_digest,
    is_nothing_new,
    learner_parts,
    next_sequence,
    training_seed,
    why_not,
    why_not_model,
)
from federation.models import SessionPurpose
from federation.policies import RoundPolicy
from federation.serving_decision import kept_evaluation, split_for_choice
from federation.trained_learner import FAILURES, TrainedLearner, mark_damaged
from federation.training_report import TrainingReport
from learners.models import Learner
from models_store import store
from models_store.clones import base_of
from models_store.errors import StoreError
from models_store.evaluation import EvaluationError
from models_store.models import PersonalizedModel

Progress = Callable[[int, int, str], None]

BLOCK = 64
"""Learners whose samples are held together, and who form one ring of the control."""

BLOCK_SAMPLES = 50_000
"""No more samples than this are held at a time: some 130 MB."""


class TrainingRun:
    """Training of learners in fixed blocks, and the report of it.

    Args:
        force: also learners whose tail is the result of training on exactly these samples in this way.
    """

    def __init__(self, engine: LocalTrainingEngine, policy: RoundPolicy, *, force: bool) -> None:
        self.report = TrainingReport(engine=engine.name)
        self._engine = engine
        self._policy = policy
        self._config = policy.personal_config()
        self._force = force
        self._control = ControlRing(self.report)

    def train(self, keys: Sequence[UUID], progress: Progress | None, should_stop: Callable[[], bool] | None) -> None:
        """Train the learners with these primary keys: those of one base together, whole blocks of ``BLOCK`` of all there are."""
        for done, _step in enumerate(self._steps(keys), start=1):
            if progress is not None:
                progress(done, len(keys), _("%(n)d trained") % {"n": self.report.trained})
            if should_stop is not None and done < len(keys) and should_stop():
                self.report.stopped = True
                break
        self._control.close()
        self.report.backend = self.report.backend or self._engine.backend

    def _steps(self, keys: Sequence[UUID]) -> Iterator[None]:
        """One step for each learner, as soon as it is trained or left out."""
        for begin in range(0, len(keys), BLOCK):
            for entry in self._blocks(keys[begin : begin + BLOCK]):
                if entry is None:
                    yield None
                else:
                    yield from self._train_block(entry)
            self._control.close()

    def _blocks(self, keys: Sequence[UUID]) -> Iterator[list[Prepared] | None]:
        """Learners to train, those of one base together; None for each learner who is left out."""
        block: list[Prepared] = []
        held = 0
        for key in keys:
            prepared = self._prepare(key)
            if prepared is None:
                yield None
                continue
            samples = len(prepared.training) + len(prepared.later)
            if block and (held + samples > BLOCK_SAMPLES or not same_base(block[0].base, prepared.base)):
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


def _tasks(prepared: Prepared) -> Iterator[LearnerTask]:
    """On all training samples from the learner's own tail; and where there are enough, the one that chooses the blend.

    The second starts at the base's tail: the learner's own may have seen the samples that choose.
    """
    base = prepared.base
    yield LearnerTask(prepared.key, prepared.training, prepared.start_tail, base.tail, prepared.seed)
    if prepared.can_choose:
        fit, _held_out = split_for_choice(prepared.training)
        yield LearnerTask(prepared.key, fit, base.tail, base.tail, prepared.seed)
