"""Contributions of a round: fresh from the base, once per learner and round, never touching the learner's own copy."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from django.utils import timezone

from federation.contributions import ContributionOutcome
from federation.learner_preparation import training_seed
from federation.local_training import produce_contributions
from federation.models import AggregationRound, ModelTrainingSession, SessionPurpose
from federation.policies import RoundPolicy
from learners.models import Learner
from models_store import store
from models_store.models import PersonalizedModel
from tests.federation.rounds_world import ShrinkingEngine, World, make_world
from tests.federation.test_local_training import Recording, use
from tests.models_store.factories import SMALL

pytestmark = pytest.mark.django_db
__all__ = ["use"]

POLICY = RoundPolicy(min_samples=5)


def world(learners: int = 3, **kwargs: Any) -> World:
    return make_world(learners=learners, evaluators=0, sessions=False, **kwargs)


def open_round(made: World, sequence: int = 1) -> AggregationRound:
    return AggregationRound.objects.create(
        sequence=sequence, policy=POLICY.to_json(), base_version=made.version, deadline=timezone.now() + timedelta(hours=1)
    )


def produce(made: World, round_: AggregationRound, policy: RoundPolicy = POLICY, **kwargs: Any) -> list[ContributionOutcome]:
    models = PersonalizedModel.objects.select_related("learner").order_by("learner__subject_key")
    return list(
        produce_contributions(round=round_, base=store.load_version(made.version), models=models, policy=policy, **kwargs)
    )


def test_each_learner_gives_a_session_of_the_round_with_its_delta(engine: ShrinkingEngine) -> None:
    made = world()
    round_ = open_round(made)
    outcomes = produce(made, round_)
    assert [outcome.model.learner.subject_key for outcome in outcomes] == sorted(x.subject_key for x in made.learners)
    for outcome in outcomes:
        session = outcome.session
        assert session is not None
        assert (session.purpose, session.round, session.base_version) == (SessionPurpose.CONTRIBUTION, round_, made.version)
        assert (session.samples, session.proximal_mu, session.metadata["adaptation"]) == (16, 1.0, "tail")
        delta = store.read_delta(path=session.delta_path, sha256=session.delta_sha256, spec=SMALL)
        assert session.delta_norm == pytest.approx(float(np.linalg.norm(delta.astype(np.float64))))
        assert session.head_metrics["own"]["samples"] == 7


def test_training_starts_at_the_base_and_leaves_the_learners_copy_alone(use: Any) -> None:
    engine = use(Recording())
    made = world(learners=1)
    base = store.load_version(made.version)
    own = store.write_tail(learner_id="fed-0", number=2, spec=SMALL, tail=base.tail * np.float32(3.0))
    PersonalizedModel.objects.update(version=2, weights_path=own.path, weights_sha256=own.sha256)
    produce(made, open_round(made))
    assert np.array_equal(engine.tasks[0].start_tail, base.tail)
    assert np.array_equal(engine.tasks[0].anchor_tail, base.tail)
    assert (made.model(0).version, made.model(0).weights_sha256) == (2, own.sha256)


@pytest.mark.parametrize(("strategy", "mu"), [("fedprox", 1.0), ("fedavg", 0.0)])
def test_the_strategy_decides_on_the_proximal_term(use: Any, strategy: str, mu: float) -> None:
    engine = use(Recording())
    made = world(learners=1)
    outcomes = produce(made, open_round(made), RoundPolicy(min_samples=5, strategy=strategy))
    assert engine.config.proximal_mu == mu
    assert outcomes[0].session is not None
    assert outcomes[0].session.proximal_mu == mu


def test_a_learner_who_has_contributed_to_the_round_is_not_trained_again(engine: ShrinkingEngine) -> None:
    made = world()
    round_ = open_round(made)
    first = produce(made, round_)
    trained = engine.trained
    second = produce(made, round_)
    assert engine.trained == trained
    assert [outcome.session for outcome in second] == [outcome.session for outcome in first]


def test_a_round_that_dies_goes_on_with_the_deltas_it_would_have_had(use: Any) -> None:
    made = world(learners=4)
    round_ = open_round(made)
    use(Recording())
    seen: list[int] = []
    stopped = produce(made, round_, progress=lambda done, total, message: seen.append(done), should_stop=lambda: len(seen) >= 2)
    assert len(stopped) == 2
    base = store.load_version(made.version)
    outcomes = produce(made, round_)
    assert len(outcomes) == 4
    for outcome in outcomes:
        assert outcome.session is not None
        seed = training_seed(outcome.model.learner.subject_key, SessionPurpose.CONTRIBUTION, round_.sequence)
        noise = np.random.default_rng(seed).normal(scale=0.01, size=SMALL.tail_size)
        expected = (-0.2 * base.tail + noise).astype(np.float32)
        session = outcome.session
        assert np.array_equal(store.read_delta(path=session.delta_path, sha256=session.delta_sha256, spec=SMALL), expected)


def test_learners_who_cannot_be_trained_are_given_back_with_their_reason(engine: ShrinkingEngine) -> None:
    made = world(learners=3)
    Learner.objects.filter(pk=made.learners[0].pk).update(consent_training=False)
    Learner.objects.filter(pk=made.learners[1].pk).update(withdrawn_at=timezone.now())
    outcomes = {outcome.model.learner.learner_id: outcome for outcome in produce(made, open_round(made))}
    assert {name: outcome.reason_code for name, outcome in outcomes.items()} == {
        "fed-0": "no_consent_training",
        "fed-1": "withdrawn",
        "fed-2": "",
    }
    assert outcomes["fed-0"].session is None
    assert outcomes["fed-0"].reason


def test_too_few_samples_are_refused_with_the_count(engine: ShrinkingEngine) -> None:
    made = world(learners=1)
    outcome = produce(made, open_round(made), RoundPolicy(min_samples=17, max_samples=20))[0]
    assert (outcome.session, outcome.reason_code) == (None, "too_few_samples")
    assert "16" in outcome.reason
    assert "17" in outcome.reason


def test_a_consent_withdrawn_while_training_leaves_no_session(use: Any) -> None:
    made = world(learners=1)
    use(Recording(during=lambda _task: Learner.objects.update(consent_training=False) and None))
    outcome = produce(made, open_round(made))[0]
    assert (outcome.session, outcome.reason_code) == (None, "no_consent_training")
    assert not ModelTrainingSession.objects.exists()


def test_a_personal_session_at_the_same_moment_only_moves_the_number(use: Any) -> None:
    made = world(learners=1)

    def insert(_task: Any) -> None:
        ModelTrainingSession.objects.create(
            personalized_model=made.model(0), base_version=made.version, sequence=1, purpose="PERSONAL", epochs=1,
            batch_size=1, samples=1,
        )  # fmt: skip

    use(Recording(during=insert))
    outcome = produce(made, open_round(made))[0]
    assert outcome.session is not None
    assert outcome.session.sequence == 2


def test_a_session_of_the_same_round_written_by_another_process_counts(use: Any) -> None:
    made = world(learners=1)
    round_ = open_round(made)

    def insert(_task: Any) -> None:
        ModelTrainingSession.objects.create(
            personalized_model=made.model(0), base_version=made.version, round=round_, sequence=1, purpose="CONTRIBUTION",
            epochs=1, batch_size=1, samples=1,
        )  # fmt: skip

    use(Recording(during=insert))
    outcome = produce(made, round_)[0]
    assert outcome.session == ModelTrainingSession.objects.get()
