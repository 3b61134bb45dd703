"""What training made of one learner: measured, decided on, and stored in one transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self
from uuid import uuid4

from django.db import IntegrityError, transaction
from django.utils import timezone
from django.utils.translation import gettext as _

from aivo_core.engine.contract import LearnerResult
from aivo_core.inference import blend
from aivo_core.network import FloatArray
from aivo_core.privacy import global_norm
from federation.learner_preparation import Prepared, why_not
from federation.models import Adaptation, ModelTrainingSession, SessionPurpose
from federation.policies import RoundPolicy
from federation.serving_decision import (
    BlendChoice,
    LaterPart,
    ServedEvaluation,
    choose_blend,
    evaluate_served,
    split_for_choice,
)
from learners.models import Learner
from models_store import store
from models_store.errors import StoreError
from models_store.models import PersonalizedModel, PersonalizedModelStatus
from models_store.store import StoredFile

CONFLICT = "conflict"
FAILURES = (CONFLICT,)
"""What ``store`` answers where the learner failed; its other answers leave the learner out."""


@dataclass(frozen=True)
class TrainedLearner:
    """One learner's new tail, what serves the learner from now on, and the figures that say why.

    Attributes:
        tail, tail_pass_delta: (tail_size,) float32, see ``LearnerResult``.
        served: (tail_size,) float32, main and tail blended.
        evaluation: on the later samples; None where there are none.
        seconds: of both trainings.
    """

    prepared: Prepared
    result: LearnerResult
    tail: FloatArray
    tail_pass_delta: FloatArray
    served: FloatArray
    choice: BlendChoice
    later: LaterPart
    evaluation: ServedEvaluation | None
    seconds: float

    @classmethod
    def of(cls, prepared: Prepared, result: LearnerResult, choice_result: LearnerResult | None) -> Self:
        """Decide and measure.

        Args:
            result: of training on all training samples. choice_result: on the earlier four fifths, None where there were
                too few.

        Raises:
            EvaluationError: a loss is not finite.
        """
        if result.tail is None or result.tail_pass_delta is None:
            raise AssertionError("a result without an error code has a tail")
        base, key = prepared.base, prepared.key
        _fit, held_out = split_for_choice(prepared.training)
        choice = choose_blend(base, key=key, tail=choice_result.tail if choice_result else None, held_out=held_out)
        served = blend(base.tail, result.tail, choice.blend)
        later = LaterPart.of(base, key, prepared.later)
        return cls(
            prepared=prepared,
            result=result,
            tail=result.tail,
            tail_pass_delta=result.tail_pass_delta,
            served=served,
            choice=choice,
            later=later,
            evaluation=evaluate_served(later, tail=result.tail, served=served),
            seconds=result.seconds + (choice_result.seconds if choice_result else 0.0),
        )

    def store(self, *, policy: RoundPolicy, engine: str) -> str:
        """Write tail and delta, then the session and the model's next version in one transaction.

        The model's row moves only from the version that training started from. Where nothing is stored, the files stay
        behind without a row, for garbage collection.

        Returns:
            Empty when stored; ``conflict`` when the model was changed meanwhile; a code of ``why_not`` when the learner's
            consent was.

        Raises:
            StoreError: a file cannot be written.
        """
        model = self.prepared.model
        session = self._session(policy, engine)
        tail_file = store.write_tail(
            learner_id=model.learner.learner_id, number=model.version + 1, spec=self.prepared.base.spec, tail=self.tail
        )
        session.metadata["tail_sha256"] = tail_file.sha256
        self._write_delta(session, policy)
        try:
            with transaction.atomic():
                code = why_not(Learner.objects.select_for_update().filter(pk=model.learner_id).first())
                if code:
                    return code
                if not self._move_model(tail_file):
                    return CONFLICT
                session.save(force_insert=True)
        except IntegrityError:
            return CONFLICT  # another process wrote the session of this number, or the model is gone
        return ""

    def _move_model(self, tail_file: StoredFile) -> bool:
        model, now = self.prepared.model, timezone.now()
        rows = PersonalizedModel.objects.filter(
            pk=model.pk,
            version=model.version,
            weights_sha256=model.weights_sha256,
            source_version_id=model.source_version_id,
            status=PersonalizedModelStatus.ACTIVE,
        )
        changed = rows.update(
            version=model.version + 1,
            weights_path=tail_file.path,
            weights_sha256=tail_file.sha256,
            performance_metrics=self._performance(),
            serving_choice=self.choice.serving_choice,
            blend=self.choice.blend,
            serving_evidence=self._evidence(now.isoformat()),
            status_reason="",
            last_trained_at=now,
            updated_at=now,
        )
        return changed == 1

    def _performance(self) -> dict[str, float | None]:
        """Of what is served, on the learner's later interactions."""
        if self.evaluation is None:
            return {"accuracy": None, "loss": None, "improvement": None}
        served = self.evaluation.served
        return {"accuracy": served.content_top1, "loss": served.total, "improvement": self.evaluation.improvement}

    def _evidence(self, now: str) -> dict[str, Any]:
        return {
            **self.choice.to_json(),
            "session": self.prepared.sequence,
            "base_version": self.prepared.base.version,
            "decided_at": now,
            "evaluation": None if self.evaluation is None else self.evaluation.to_json(),
        }

    def _session(self, policy: RoundPolicy, engine: str) -> ModelTrainingSession:
        model, own = self.prepared.model, self.choice.own
        return ModelTrainingSession(
            id=uuid4(),
            personalized_model=model,
            base_version=model.source_version,
            sequence=self.prepared.sequence,
            purpose=SessionPurpose.PERSONAL,
            epochs=policy.local_epochs,
            batch_size=policy.batch_size,
            samples=len(self.prepared.training),
            final_loss=None if own is None else own.total,
            final_accuracy=None if own is None else own.content_top1,
            head_metrics=self._head_metrics(),
            engine=engine,
            backend=self.result.backend,
            proximal_mu=policy.personal_tail_mu if policy.adaptation != Adaptation.DIFFICULTY_BIAS else 0.0,
            metadata={
                "adaptation": str(policy.adaptation),
                "learning_rate": policy.learning_rate,
                "bias_epochs": policy.bias_epochs,
                "bias_learning_rate": policy.bias_learning_rate,
                "epoch_losses": list(self.result.losses),
                "steps": self.result.steps,
                "seed": str(self.prepared.seed),
                "inputs_sha256": self.prepared.inputs_sha256,
                "start_tail_sha256": model.weights_sha256,
                "blends": self.choice.to_json(),
            },
            duration=self.seconds,
        )

    def _head_metrics(self) -> dict[str, Any]:
        """On the session's own held-out samples: the learner's tail and the base version."""
        named = {"own": self.choice.own, "main": self.choice.main}
        return {name: _figures(asdict(losses)) for name, losses in named.items() if losses is not None}

    def _write_delta(self, session: ModelTrainingSession, policy: RoundPolicy) -> None:
        if policy.adaptation == Adaptation.DIFFICULTY_BIAS:
            return  # no tail pass, nothing that a round could use
        delta_file = store.write_delta(
            learner_id=self.prepared.model.learner.learner_id,
            session_id=session.id,
            spec=self.prepared.base.spec,
            delta=self.tail_pass_delta,
        )
        session.delta_path, session.delta_sha256 = delta_file.path, delta_file.sha256
        session.delta_norm = global_norm(self.tail_pass_delta)


def mark_damaged(model: PersonalizedModel, error: StoreError) -> None:
    """Put the model into ERROR with the reason, unless it has changed meanwhile."""
    rows = PersonalizedModel.objects.filter(
        pk=model.pk, version=model.version, weights_sha256=model.weights_sha256, status=PersonalizedModelStatus.ACTIVE
    )
    reason = _("The file of the learner's tail cannot be used: %(error)s") % {"error": error}
    rows.update(status=PersonalizedModelStatus.ERROR, status_reason=reason, updated_at=timezone.now())


def _figures(losses: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in losses.items() if name != "key"}
