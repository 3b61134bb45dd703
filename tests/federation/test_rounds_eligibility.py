"""Who may contribute, and the reason of everyone who may not."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from django.utils import timezone

from federation.models import AggregationRound, FederationPolicy, ModelTrainingSession
from federation.policies import RoundPolicy, default_policy
from federation.registry import ModelRegistry
from federation.rounds import service
from federation.rounds.eligibility import LearnerVerdict, select_learners
from federation.rounds.errors import RoundSkipped
from learners.models import Learner, Organisation, Pool
from models_store.models import PersonalizedModel
from models_store.versions import active_version
from tests.federation.rounds_world import World, make_world, set_policy, train_personally, with_events
from tests.models_store.factories import make_learner, make_version

pytestmark = pytest.mark.django_db


def verdicts(**overrides: object) -> dict[str, LearnerVerdict]:
    policy = RoundPolicy.from_row(default_policy(), **overrides)
    return {verdict.learner_id: verdict for verdict in select_learners(policy=policy, base=active_version()).verdicts}


def reason(learner: Learner, **overrides: object) -> str:
    return verdicts(**overrides)[learner.learner_id].reason_code


def change(learner: Learner, **values: object) -> None:
    Learner.objects.filter(pk=learner.pk).update(**values)


def change_model(learner: Learner, **values: object) -> None:
    PersonalizedModel.objects.filter(learner=learner).update(**values)


def test_a_trained_learner_with_both_consents_is_eligible() -> None:
    world = make_world(learners=2)
    assert [verdict.eligible for verdict in verdicts().values()] == [True, True]
    assert reason(world.learners[0]) == ""


CASES: dict[str, Callable[[Learner], object]] = {
    "withdrawn": lambda learner: change(learner, withdrawn_at=timezone.now()),
    "no_consent_training": lambda learner: change(learner, consent_training=False),
    "no_consent_contribution": lambda learner: change(learner, consent_contribution=False),
    "no_model": lambda learner: PersonalizedModel.objects.filter(learner=learner).delete(),
    "not_active": lambda learner: change_model(learner, status="TRAINING"),
    "other_backend": lambda learner: change_model(learner, backend="OPENAI_FINE_TUNING"),
    "never_trained": lambda learner: ModelTrainingSession.objects.filter(personalized_model__learner=learner).delete(),
    "stale": lambda learner: ModelTrainingSession.objects.filter(personalized_model__learner=learner).update(
        created_at=timezone.now() - timedelta(days=8)
    ),
    "too_few_samples": lambda learner: ModelTrainingSession.objects.filter(personalized_model__learner=learner).update(samples=4),
}


@pytest.mark.parametrize("source", ["round", "sessions"])
@pytest.mark.parametrize("code", CASES)
def test_each_reason_to_leave_a_learner_out_has_its_code_in_both_sources(code: str, source: str) -> None:
    world = make_world(learners=2)

    CASES[code](world.learners[0])

    found = verdicts(contribution_source=source)
    assert found["fed-0"].reason_code == code and found["fed-0"].reason
    assert found["fed-1"].eligible


def test_an_organisation_that_does_not_take_part_leaves_its_learners_out() -> None:
    world = make_world(learners=2)
    other = Organisation.objects.create(slug="other", name="Other")
    FederationPolicy.objects.create(organisation=other, name="other", participates=False)
    change(world.learners[0], organisation=other)

    assert reason(world.learners[0]) == "organisation_left_out"


def test_a_model_of_another_lineage_is_left_out() -> None:
    world = make_world(learners=2)
    newer = make_version(seed=5, parent=world.version)  # trained anew: another trunk
    change_model(world.learners[1], source_version=newer)

    assert reason(world.learners[0]) == "base_not_on_lineage"
    assert reason(world.learners[1]) == ""


def test_only_the_federated_pool_gets_verdicts() -> None:
    make_world(learners=1, evaluators=2)
    with_events(make_learner("cur-1", pool=Pool.CURRICULUM), 1)
    assert set(verdicts()) == {"fed-0"}


def test_max_stale_days_is_the_policys() -> None:
    world = make_world(learners=1)
    ModelTrainingSession.objects.update(created_at=timezone.now() - timedelta(days=20))
    assert reason(world.learners[0], max_stale_days=19) == "stale"
    assert reason(world.learners[0], max_stale_days=21) == ""


def test_a_contribution_session_is_no_training_of_the_learner() -> None:
    world = make_world(learners=1)
    ModelTrainingSession.objects.update(created_at=timezone.now() - timedelta(days=20))
    session = train_personally(world.model(0))
    ModelTrainingSession.objects.filter(pk=session.pk).update(purpose="CONTRIBUTION")
    assert reason(world.learners[0]) == "stale"


def test_without_a_session_since_the_last_contribution_there_is_nothing_to_contribute() -> None:
    world = make_world(learners=2)
    ModelTrainingSession.objects.filter(personalized_model__learner=world.learners[0]).update(contributed_to_federation=True)

    assert reason(world.learners[0], contribution_source="sessions") == "nothing_to_contribute"
    assert reason(world.learners[0], contribution_source="round") == ""
    assert reason(world.learners[1], contribution_source="sessions") == ""


def test_the_registry_gives_the_same_learners_as_a_round() -> None:
    world = make_world(learners=3)
    change(world.learners[1], consent_contribution=False)
    ModelTrainingSession.objects.filter(personalized_model__learner=world.learners[2]).update(
        created_at=timezone.now() - timedelta(days=5)
    )
    registry = ModelRegistry().initialize()

    assert {learner.learner_id for learner in registry.get_eligible_for_aggregation(7)} == {"fed-0", "fed-2"}
    assert {learner.learner_id for learner in registry.get_eligible_for_aggregation(3)} == {"fed-0"}


def test_the_verdicts_are_kept_with_the_round_and_shown_by_a_dry_run() -> None:
    world: World = make_world(learners=4)
    change(world.learners[0], consent_contribution=False)
    change(world.learners[1], withdrawn_at=timezone.now())
    set_policy(minimum_learners=5)

    preview = service.aggregate(dry_run=True)
    assert preview["eligible"] == 2
    assert preview["excluded"] == {"no_consent_contribution": 1, "withdrawn": 1}
    assert AggregationRound.objects.count() == 0

    with pytest.raises(RoundSkipped) as skipped:
        service.aggregate()
    assert skipped.value.code == "too_few_learners"
    assert skipped.value.result["excluded"] == preview["excluded"]
    assert AggregationRound.objects.get().excluded == preview["excluded"]
