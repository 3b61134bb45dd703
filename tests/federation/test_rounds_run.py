"""A round from beginning to end, with both contribution sources."""

from __future__ import annotations

import pytest

from aivo_site.audit.models import AuditEvent
from federation.models import FederatedUpdate, ModelTrainingSession, RoundState
from federation.rounds import service
from models_store import versions
from tests.federation.rounds_world import ShrinkingEngine, make_world

pytestmark = pytest.mark.django_db


def test_a_round_trains_contributions_and_promotes_a_version_that_is_better(engine: ShrinkingEngine) -> None:
    world = make_world()

    result = service.aggregate()

    assert result["state"] == RoundState.PROMOTED
    assert result["accepted"] == 6 and result["rejected"] == {}
    assert result["metrics"]["candidate"]["total"] < result["metrics"]["current"]["total"]
    assert result["performance_improvement"] > 0
    assert versions.active_version().version == result["candidate_version"]
    update = FederatedUpdate.objects.get()
    assert update.base_version == world.version and update.aggregation_strategy == "fedprox"
    assert sorted(update.contributing_learners) == sorted(str(learner.subject_key) for learner in world.learners)
    used = ModelTrainingSession.objects.filter(contributed_to_federation=True, federated_update=update)
    assert used.count() == 6 and set(used.values_list("purpose", flat=True)) == {"CONTRIBUTION"}
    assert AuditEvent.objects.filter(action="round.promoted").count() == 1
