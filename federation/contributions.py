"""Contributions of a round: what each learner's samples would change in the base version, trained afresh from it.

The learner's own copy is neither read nor changed: personal drift stays personal. Nothing here evaluates or blends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from uuid import UUID, uuid4

from django.db import IntegrityError, transaction
from django.utils.translation import gettext as _

from aivo_core.encoding.errors import EncodingError
from aivo_core.encoding.events import Event
from aivo_core.engine.contract import LearnerResult, LearnerTask, LocalTrainingEngine
from aivo_core.privacy import global_norm
from aivo_core.samples import Samples
from federation import engines
from federation.learner_preparation import history_parts, inputs_digest, next_sequence, training_seed, why_not
from federation.models import AggregationRound, ModelTrainingSession, SessionPurpose
from federation.policies import RoundPolicy
from federation.serving_decision import LaterPart
from learners.histories import iter_histories
from learners.models import Learner
from models_store import store
from models_store.evaluation import EvaluationError
from models_store.models import PersonalizedModel
from models_store.version_files import LoadedVersion

BLOCK = 64
"""Learners whose samples are held together."""

SEQUENCE_TRIES = 5


@dataclass(frozen=True)
class ContributionOutcome:
    """What came of one learner: the session, or why there is none."""

    model: PersonalizedModel
    session: ModelTrainingSession | None
    reason_code: str = ""
    reason: str = ""


@dataclass(frozen=True)
class _Ready:
    model: PersonalizedModel
    training: Samples
    later: Samples
    seed: int


def produce_contributions(
    *,
    round: AggregationRound,
    base: LoadedVersion,
    models: Iterable[PersonalizedModel],
    policy: RoundPolicy,
    progress: Callable[[int, int, str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[ContributionOutcome]:
    """Train a CONTRIBUTION session per learner from the base's main tail, and store its delta; in the order of ``models``.

    A learner who has a session in this round is given back from its row and not trained again. The seed depends on learner
    and round, so that a round that goes on after a crash has the deltas it would have had.

    Reason codes of who is not trained: those of ``why_not``, ``too_few_samples``, codes of ``EncodingError``,
    ``EngineError`` and ``EvaluationError``, ``conflict``.

    Args:
        base: the round's base version. models: with their learners.
        should_stop: asked after each learner; the rest is then not given back.

    Raises:
        EngineUnavailable: the policy's engine is not here.
        StoreError: a delta cannot be written.
    """
    engine = engines.get_engine(policy.engine)
    everyone = list(models)
    done = 0
    for block in _blocks(everyone):
        for outcome in _block_outcomes(block, round, base, policy, engine):
            done += 1
            if progress is not None:
                progress(done, len(everyone), _("training contributions"))
            yield outcome
            if should_stop is not None and should_stop():
                return


def _blocks(models: Sequence[PersonalizedModel]) -> Iterator[list[PersonalizedModel]]:
    rest = iter(models)
    while block := list(islice(rest, BLOCK)):
        yield block


def _block_outcomes(
    block: Sequence[PersonalizedModel],
    round_: AggregationRound,
    base: LoadedVersion,
    policy: RoundPolicy,
    engine: LocalTrainingEngine,
) -> Iterator[ContributionOutcome]:
    known = {
        session.personalized_model_id: session
        for session in ModelTrainingSession.objects.filter(
            round=round_, purpose=SessionPurpose.CONTRIBUTION, personalized_model__in=block
        )
    }
    learners = Learner.objects.filter(pk__in=[model.learner_id for model in block if model.pk not in known])
    histories: dict[UUID, tuple[Learner | None, list[Event]]] = {
        learner.pk: (learner, events) for learner, events in iter_histories(learners, learners_per_query=BLOCK)
    }
    prepared: list[_Ready | ContributionOutcome] = []
    for model in block:
        if model.pk in known:
            prepared.append(ContributionOutcome(model, known[model.pk]))
        else:
            learner, events = histories.pop(model.learner_id, (None, []))
            prepared.append(_prepare(model, learner, events, round_, base, policy))
    tasks = [
        LearnerTask(str(ready.model.learner.subject_key), ready.training, base.tail, base.tail, ready.seed)
        for ready in prepared
        if isinstance(ready, _Ready)
    ]
    results = engine.train(spec=base.spec, weights=base.weights, config=policy.contribution_config(), tasks=iter(tasks))
    for entry in prepared:
        if isinstance(entry, _Ready):
            yield _finish(entry, next(results), round_, base, policy, engine)
        else:
            yield entry


def _prepare(
    model: PersonalizedModel,
    learner: Learner | None,
    events: Sequence[Event],
    round_: AggregationRound,
    base: LoadedVersion,
    policy: RoundPolicy,
) -> _Ready | ContributionOutcome:
    code = why_not(learner)
    if code or learner is None:
        return ContributionOutcome(model, None, code, _("the learner may not be trained any more"))
    try:
        training, later = history_parts(events, base, policy.max_samples)
    except EncodingError as error:
        return ContributionOutcome(model, None, error.code, str(error))
    if len(training) < policy.min_samples:
        reason = _("%(n)d training samples; at least %(least)d are needed") % {"n": len(training), "least": policy.min_samples}
        return ContributionOutcome(model, None, "too_few_samples", reason)
    seed = training_seed(learner.subject_key, SessionPurpose.CONTRIBUTION, round_.sequence)
    return _Ready(model, training, later, seed)


def _finish(
    ready: _Ready,
    result: LearnerResult,
    round_: AggregationRound,
    base: LoadedVersion,
    policy: RoundPolicy,
    engine: LocalTrainingEngine,
) -> ContributionOutcome:
    if result.error_code:
        return ContributionOutcome(ready.model, None, result.error_code, result.error_message)
    if result.tail is None or result.tail_pass_delta is None:
        raise AssertionError("a result without an error code has a tail")
    config = policy.contribution_config()
    session = ModelTrainingSession(
        id=uuid4(),
        personalized_model=ready.model,
        base_version_id=round_.base_version_id,
        round=round_,
        purpose=SessionPurpose.CONTRIBUTION,
        epochs=config.epochs,
        batch_size=config.batch_size,
        samples=len(ready.training),
        engine=engine.name,
        backend=result.backend,
        proximal_mu=config.proximal_mu,
        delta_norm=global_norm(result.tail_pass_delta),
        metadata={
            "adaptation": config.adaptation,
            "learning_rate": config.learning_rate,
            "epoch_losses": list(result.losses),
            "steps": result.steps,
            "seed": str(ready.seed),
            "inputs_sha256": inputs_digest(base=base, config=config, training=ready.training),
        },
        duration=result.seconds,
    )
    if len(ready.later):
        try:
            held_out = LaterPart.of(base, str(ready.model.learner.subject_key), ready.later).losses(result.tail)
        except EvaluationError as error:
            return ContributionOutcome(ready.model, None, error.code, str(error))
        session.final_loss, session.final_accuracy = held_out.total, held_out.content_top1
        session.head_metrics = {"own": {name: v for name, v in vars(held_out).items() if name != "key"}}
    delta = store.write_delta(
        learner_id=ready.model.learner.learner_id, session_id=session.id, spec=base.spec, delta=result.tail_pass_delta
    )
    session.delta_path, session.delta_sha256 = delta.path, delta.sha256
    return _insert(session, round_)


def _insert(session: ModelTrainingSession, round_: AggregationRound) -> ContributionOutcome:
    """Insert the session; where another process trained the learner for this round first, its session counts."""
    model = session.personalized_model
    for _attempt in range(SEQUENCE_TRIES):
        session.sequence = next_sequence(model)
        try:
            with transaction.atomic():
                learner = Learner.objects.select_for_update().filter(pk=model.learner_id).first()
                if code := why_not(learner):
                    return ContributionOutcome(model, None, code, _("the learner may not be trained any more"))
                session.save(force_insert=True)
        except IntegrityError:
            earlier = ModelTrainingSession.objects.filter(
                round=round_, personalized_model=model, purpose=SessionPurpose.CONTRIBUTION
            ).first()
            if earlier is not None:
                return ContributionOutcome(model, earlier)
        else:
            return ContributionOutcome(model, session)
    return ContributionOutcome(model, None, "conflict", _("other sessions of this learner were written at the same moment"))
