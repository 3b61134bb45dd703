"""What the gate looks at: losses of current and candidate on the evaluation learners' later interactions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from django.db.models import QuerySet
from django.utils.translation import gettext as _

from aivo_core.encoding.errors import EncodingError
from aivo_core.network import FloatArray
from aivo_core.samples import TRAIN_SHARE
from federation.policies import RoundPolicy
from federation.rounds.gate import GateDecision, GateRules, decide, no_evidence
from learners.models import Learner, Pool
from models_store.evaluation import EvaluationError, LearnerLosses, learner_losses
from models_store.forecasting import forecast_tail, trunk_activations
from models_store.learning_data import learner_samples
from models_store.store import LoadedVersion


def gate_learners() -> QuerySet[Any]:
    """Learners who judge versions: of the evaluation pool, with consent to contribution, not withdrawn."""
    return Learner.objects.filter(pool=Pool.EVALUATION, consent_contribution=True, withdrawn_at__isnull=True).order_by(
        "subject_key"
    )


def run_gate(
    *, policy: RoundPolicy, base: LoadedVersion, candidate: FloatArray, progress: Callable[[int, int, str], None]
) -> GateDecision:
    """Measure both tails on each gate learner's later 30 % and decide; one learner's samples are held at a time.

    Args:
        candidate: (tail_size,) float32 on the base's trunk.
    """
    rules = GateRules(
        tolerances=policy.guarded_metrics,
        minimum_learners=policy.gate_minimum_learners,
        minimum_gain=policy.gate_minimum_gain,
        draws=policy.gate_draws,
    )
    current_losses: list[LearnerLosses] = []
    candidate_losses: list[LearnerLosses] = []
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    learners = gate_learners()
    total = learners.count()
    try:
        for done, (learner, samples) in enumerate(learner_samples(learners=learners, loaded=base), start=1):
            _earlier, later = samples.split_at(TRAIN_SHARE)
            progress(done, total, _("comparing candidate and current"))
            if not len(later):
                continue
            key = str(learner.subject_key)
            activations = trunk_activations(base, later)
            for tail, losses in ((base.tail, current_losses), (candidate, candidate_losses)):
                losses.append(learner_losses(key, forecast_tail(base, tail, activations), later, base.content_mix))
            for kind, names in groups_of(learner).items():
                for name in names:
                    groups[kind][name].append(key)
    except (EvaluationError, EncodingError) as error:
        return no_evidence(str(error), error.code)
    return decide(current_losses, candidate_losses, rules=rules, groups=groups)


def groups_of(learner: Any) -> Mapping[str, Sequence[str]]:
    """Groups that a learner belongs to: grade band, needs and language, as the learner's row and profile name them."""
    needs = learner.profile.get("needs", [])
    language = learner.profile.get("language")
    return {
        "grade_band": [learner.grade_band] if learner.grade_band else [],
        "need": [needs] if isinstance(needs, str) else [str(need) for need in needs] if isinstance(needs, list) else [],
        "language": [str(language)] if language else [],
    }
