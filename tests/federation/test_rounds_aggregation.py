"""The update itself: weights, order, composition of sessions, staleness, and what it does to the version."""

from __future__ import annotations

from unittest.mock import ANY

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.models import Contribution, FederatedUpdate, ModelTrainingSession, RoundAttempt
from federation.rounds import service
from federation.rounds.cohort import staleness_discount
from federation.rounds.errors import RoundFailed, RoundSkipped
from federation.rounds.quality import quality_of_change
from learners.models import Learner
from models_store import store
from models_store.evaluation import learner_losses
from models_store.forecasting import forecast
from models_store.learning_data import learner_samples
from models_store.models import MainModelVersion, PersonalizedModel
from models_store.versions import active_version
from tests.federation.rounds_world import ShrinkingEngine, make_delta, make_world, set_policy, train_personally
from tests.models_store.factories import SMALL

pytestmark = pytest.mark.django_db

SESSIONS = {"contribution_source": "sessions"}
ANYTHING = {"total": 1e6}


def aggregate_vector() -> np.ndarray:
    attempt = RoundAttempt.objects.order_by("-created_at").first()
    assert attempt is not None
    return store.read_aggregate(path=attempt.aggregate_path, sha256=attempt.aggregate_sha256, spec=SMALL)


def test_learners_weigh_by_the_samples_they_trained_on() -> None:
    world = make_world(learners=2, events=150, sessions=False, policy={**SESSIONS, "minimum_learners": 2, "min_samples": 1})
    zeros, ones = np.zeros(SMALL.tail_size, np.float32), np.full(SMALL.tail_size, 0.01, np.float32)
    train_personally(world.model(0), delta=zeros, samples=1)
    train_personally(world.model(1), delta=ones, samples=99)

    service.aggregate(with_rebase=False)

    np.testing.assert_allclose(aggregate_vector(), 0.01 * 0.99, rtol=1e-6)
    assert set(Contribution.objects.values_list("weight", flat=True)) == {1.0, 99.0}


def test_two_opposite_deltas_of_equal_weight_move_nothing() -> None:
    world = make_world(learners=2, sessions=False, policy={**SESSIONS, "minimum_learners": 2})
    delta = make_delta(3)
    train_personally(world.model(0), delta=delta)
    train_personally(world.model(1), delta=-delta)
    result = service.aggregate(with_rebase=False)
    assert not aggregate_vector().any()
    assert result["state"] == "REJECTED" and result["reason_code"] == "gate_not_better"


def test_the_server_learning_rate_scales_the_update_and_nothing_but_the_tail_changes(engine: ShrinkingEngine) -> None:
    world = make_world()
    result = service.aggregate(overrides={"server_learning_rate": 0.5}, with_rebase=False)
    base = store.load_version(world.version)
    new = store.load_version(MainModelVersion.objects.get(version=result["candidate_version"]))
    expected = (base.tail.astype(np.float64) + 0.5 * aggregate_vector().astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(new.tail, expected)
    tail = {tensor.name for tensor in base.spec.tail_tensors}
    for name, value in base.weights.items():
        if name not in tail:
            assert value.tobytes() == new.weights[name].tobytes(), name
    assert (new.encoder.sha256, new.content_mix, new.spec) == (base.encoder.sha256, base.content_mix, base.spec)


def test_a_candidate_says_where_it_comes_from(engine: ShrinkingEngine) -> None:
    world = make_world()
    result = service.aggregate(with_rebase=False)
    row = MainModelVersion.objects.get(version=result["candidate_version"])
    assert (row.origin, row.parent) == ("FEDERATED", world.version)
    assert row.training_metrics == {
        "accuracy": ANY, "loss": result["metrics"]["candidate"]["total"], "epochs": 5, "samples": ANY, "gate": ANY
    }  # fmt: skip
    lineage = store.load_version(row).manifest["lineage"]
    assert lineage["parent"] == world.version.version and lineage["contributions"] == 6
    assert lineage["set_digest"] == RoundAttempt.objects.get().set_digest


def test_a_session_counts_once_and_a_learner_without_a_new_one_has_nothing_to_give() -> None:
    world = make_world(learners=5, policy=SESSIONS)
    for index in range(5):
        train_personally(world.model(index), seed=20 + index)
    service.aggregate(with_rebase=False)
    update = FederatedUpdate.objects.get()
    assert ModelTrainingSession.objects.filter(contributed_to_federation=True, federated_update=update).count() == 10

    with pytest.raises(RoundSkipped) as again:
        service.aggregate()
    assert again.value.result["excluded"] == {"nothing_to_contribute": 5}

    train_personally(world.model(0), seed=40)
    with pytest.raises(RoundSkipped) as third:
        service.aggregate()
    assert third.value.result["eligible"] == 1


def test_a_contribution_is_the_sum_of_the_learners_sessions_since_the_last_one() -> None:
    world = make_world(learners=1, sessions=False, policy={**SESSIONS, "minimum_learners": 1, "guarded_metrics": ANYTHING})
    one, two = make_delta(1), make_delta(2)
    train_personally(world.model(0), delta=one, samples=10)
    train_personally(world.model(0), delta=two, samples=12)
    service.aggregate(with_rebase=False)
    np.testing.assert_allclose(aggregate_vector(), one + two, atol=1e-7)
    assert Contribution.objects.get().samples == 12  # the interactions of the first session come again in the second


def test_a_learner_who_trained_two_versions_ago_contributes_their_own_change_and_never_undoes_the_rounds() -> None:
    """A learner on v1 while main is v3: their discounted delta, not the difference from the current main."""
    policy = {**SESSIONS, "minimum_learners": 1, "staleness_exponent": 0.5}
    world = make_world(learners=4, sessions=False, policy=policy)
    for index in (1, 2):
        train_personally(world.model(index), seed=index)
        assert service.aggregate(with_rebase=False)["state"] == "PROMOTED"
    assert active_version().parent.parent == world.version  # type: ignore[union-attr]

    own = make_delta(9)
    train_personally(world.model(0), delta=own, base=world.version)
    service.aggregate(with_rebase=False)

    np.testing.assert_allclose(aggregate_vector(), own * 3**-0.5, atol=1e-7)
    contribution = Contribution.objects.get(subject_key=world.learners[0].subject_key)
    assert contribution.versions_behind == 2 and contribution.discount == pytest.approx(3**-0.5)


def test_what_was_trained_too_many_versions_ago_is_left_out() -> None:
    world = make_world(learners=3, sessions=False, policy={**SESSIONS, "minimum_learners": 1, "max_versions_behind": 0})
    train_personally(world.model(1), seed=1)
    service.aggregate(with_rebase=False)
    train_personally(world.model(0), seed=2, base=world.version)
    with pytest.raises(RoundSkipped) as skipped:
        service.aggregate()
    assert skipped.value.result["excluded"]["too_many_versions_behind"] == 1


def test_a_learner_without_training_since_main_moved_contributes_nothing(engine: ShrinkingEngine) -> None:
    world = make_world(learners=5, policy=SESSIONS)
    service.aggregate()
    assert PersonalizedModel.objects.exclude(source_version=active_version()).count() == 0
    assert active_version() != world.version
    with pytest.raises(RoundSkipped):
        service.aggregate()


def test_the_sources_agree_where_both_have_the_same_deltas(engine: ShrinkingEngine) -> None:
    """Sessions that start at the main tail and fresh contributions with the same change give the same update."""
    world = make_world(learners=5, sessions=False, policy={"guarded_metrics": ANYTHING, "promotion": "manual"})
    for index in range(5):
        train_personally(world.model(index), seed=index)
    service.aggregate(with_rebase=False)
    fresh = aggregate_vector()
    from federation.models import AggregationRound
    from federation.rounds.promotion import decide_round

    decide_round(round_=AggregationRound.objects.get(), decision="reject", reason="only measured", actor="test")
    deltas = {s.personalized_model_id: s for s in ModelTrainingSession.objects.filter(purpose="CONTRIBUTION")}
    for session in ModelTrainingSession.objects.filter(purpose="PERSONAL"):
        other = deltas[session.personalized_model_id]
        ModelTrainingSession.objects.filter(pk=session.pk).update(
            delta_path=other.delta_path, delta_sha256=other.delta_sha256, samples=other.samples
        )
    service.aggregate(overrides={"contribution_source": "sessions"}, with_rebase=False)
    np.testing.assert_array_equal(aggregate_vector(), fresh)


def test_weighted_measures_quality_on_each_learners_own_later_interactions(engine: ShrinkingEngine) -> None:
    world = make_world(policy={"strategy": "weighted"})
    result = service.aggregate(with_rebase=False)
    assert result["state"] == "PROMOTED"
    base = store.load_version(world.version)
    for learner, samples in learner_samples(learners=Learner.objects.filter(pool="FEDERATED"), loaded=base):
        contribution = Contribution.objects.get(subject_key=learner.subject_key)
        session = contribution.sessions.get()
        later = samples.take(samples.position >= 0.7 * samples.events)
        delta = store.read_delta(path=session.delta_path, sha256=session.delta_sha256, spec=base.spec)
        before, after = (
            learner_losses("k", forecast(base, tail, later), later, base.content_mix).total
            for tail in (base.tail, base.tail + delta)
        )
        assert contribution.quality == pytest.approx(quality_of_change(before, after), abs=1e-6)
    assert np.mean(Contribution.objects.values_list("quality", flat=True)) > 0.5


def test_weighted_gives_no_weight_to_deltas_that_harm_their_own_learner(engine: ShrinkingEngine) -> None:
    engine.factor = 2.0
    make_world(policy={"strategy": "weighted"})
    with pytest.raises(RoundSkipped) as skipped:
        service.aggregate()
    assert skipped.value.code == "zero_weight"


def test_files_of_rounds_that_a_restored_database_does_not_know_are_left_alone(engine: ShrinkingEngine) -> None:
    make_world()
    other = store.write_aggregate(
        round_sequence=1, attempt=1, spec=SMALL, aggregate=np.ones(SMALL.tail_size, np.float32), metadata={}
    )
    assert service.aggregate(with_rebase=False)["state"] == "PROMOTED"
    first, second = RoundAttempt.objects.order_by("n")
    assert (first.aggregate_path, second.n) == ("", 2) and first.set_digest == second.set_digest
    assert store.read_aggregate(path=other.path, sha256=other.sha256, spec=SMALL).min() == 1.0


def test_an_update_that_overflows_fails_the_round_and_leaves_main(engine: ShrinkingEngine) -> None:
    world = make_world()
    set_policy(server_learning_rate=1e39)
    with pytest.raises(RoundFailed) as failed:
        service.aggregate()
    assert failed.value.code == "not_finite" and failed.value.result["state"] == "FAILED"
    assert active_version() == world.version


@given(before=st.floats(0.1, 10), fall=st.floats(-3, 3))
def test_quality_grows_with_the_fall_of_the_loss_and_stays_in_bounds(before: float, fall: float) -> None:
    quality = quality_of_change(before, before * (1 - fall / 10))
    assert 0.0 <= quality <= 1.0
    assert quality == pytest.approx(min(1.0, max(0.0, 0.5 + fall / 2)), abs=1e-6)


@given(behind=st.integers(0, 50), exponent=st.floats(0, 5))
def test_a_staleness_discount_never_amplifies(behind: int, exponent: float) -> None:
    assert 0.0 < staleness_discount(behind, exponent) <= 1.0
    assert staleness_discount(behind + 1, exponent) <= staleness_discount(behind, exponent)
    assert staleness_discount(0, exponent) == 1.0


def test_quality_of_something_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        quality_of_change(1.0, float("nan"))
