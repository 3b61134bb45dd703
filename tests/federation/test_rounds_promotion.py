"""Promotion, rejection, an operator's decision, promotion by hand, rollback."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from django.contrib.auth.models import User
from django.core.files.storage import storages
from django.utils import timezone

from aivo_site.audit.models import AuditEvent
from aivo_site.jobs.models import Job
from federation.models import AggregationRound, Contribution, FederatedUpdate, ModelTrainingSession, RoundState
from federation.rounds import promotion, running, service
from federation.rounds.errors import BadDecision, NotPromotable, RoundConflict, RoundFailed, RoundSkipped
from learners.models import Learner
from models_store.errors import VersionConflict
from models_store.models import MainModelVersion, VersionStatus
from models_store.versions import activate, active_version
from tests.federation.rounds_world import ShrinkingEngine, make_world, set_policy
from tests.models_store.factories import make_version

pytestmark = pytest.mark.django_db


def the_round() -> AggregationRound:
    return AggregationRound.objects.select_related("candidate_version", "base_version").get()


def rejected_round(engine: ShrinkingEngine) -> AggregationRound:
    engine.factor = 2.0
    make_world()
    assert service.aggregate()["state"] == RoundState.REJECTED
    return the_round()


def test_a_candidate_that_the_gate_refuses_stays_a_rejected_version_and_main_stays(engine: ShrinkingEngine) -> None:
    round_ = rejected_round(engine)
    assert round_.reason_code == "gate_worse" and "total" in round_.reason
    assert round_.candidate_version is not None and round_.candidate_version.status == VersionStatus.REJECTED
    assert active_version() == round_.base_version
    assert FederatedUpdate.objects.count() == 0
    assert not ModelTrainingSession.objects.filter(contributed_to_federation=True).exists()
    assert round_.performance_improvement is not None and round_.performance_improvement < 0


def test_what_went_into_a_rejected_round_may_be_used_again() -> None:
    make_world(policy={"contribution_source": "sessions", "gate_minimum_gain": 1e6})
    assert service.aggregate()["state"] == RoundState.REJECTED
    set_policy(gate_minimum_gain=0.0)
    result = service.aggregate(with_rebase=False)
    assert result["state"] == RoundState.PROMOTED and result["accepted"] == 6


def test_a_gate_without_learners_fails_closed(engine: ShrinkingEngine) -> None:
    world = make_world(evaluators=9)
    result = service.aggregate()
    assert (result["state"], result["reason_code"]) == (RoundState.REJECTED, "gate_no_evidence")
    assert result["performance_improvement"] is None and active_version() == world.version


def test_only_consenting_learners_of_the_evaluation_pool_judge(engine: ShrinkingEngine) -> None:
    world = make_world(evaluators=12)
    Learner.objects.filter(pk__in=[learner.pk for learner in world.evaluators[:2]]).update(consent_contribution=False)
    Learner.objects.filter(pk=world.evaluators[2].pk).update(withdrawn_at=timezone.now())
    result = service.aggregate()
    assert (result["state"], result["reason_code"]) == (RoundState.REJECTED, "gate_no_evidence")
    Learner.objects.filter(pk=world.evaluators[2].pk).update(withdrawn_at=None)
    assert service.aggregate()["gate"]["learners"] == 10


def test_a_manual_policy_waits_and_an_operator_promotes(engine: ShrinkingEngine) -> None:
    world = make_world(policy={"promotion": "manual"})
    result = service.aggregate()
    assert result["state"] == RoundState.AWAITING_DECISION
    assert active_version() == world.version

    with pytest.raises(RoundSkipped) as blocked:
        service.aggregate()
    assert blocked.value.code == "awaiting_decision"

    promotion.decide_round(round_=the_round(), decision="promote", reason="looks right", actor="steward")
    round_ = the_round()
    assert round_.state == RoundState.PROMOTED and active_version() == round_.candidate_version
    assert Job.objects.filter(kind="rebase", params={"version": active_version().version}).exists()
    event = AuditEvent.objects.get(action="version.activated", object_id=str(active_version().pk))
    assert (event.actor, event.data["reason"]) == ("steward", "looks right")


def test_an_operator_rejects_with_a_reason(engine: ShrinkingEngine) -> None:
    world = make_world(policy={"promotion": "manual"})
    service.aggregate()
    for decision, reason in (("maybe", "why not"), ("reject", "  ")):
        with pytest.raises(BadDecision):
            promotion.decide_round(round_=the_round(), decision=decision, reason=reason, actor="steward")
    promotion.decide_round(round_=the_round(), decision="reject", reason="not now", actor="steward")
    assert the_round().state == RoundState.REJECTED and the_round().reason == "not now"
    assert active_version() == world.version
    with pytest.raises(RoundConflict):
        promotion.decide_round(round_=the_round(), decision="promote", reason="changed my mind", actor="steward")


def test_a_decision_that_comes_too_late_promotes_nothing_and_frees_the_slot(engine: ShrinkingEngine) -> None:
    make_world(policy={"promotion": "manual"})
    service.aggregate()
    AggregationRound.objects.update(deadline=timezone.now() - timedelta(seconds=1))
    with pytest.raises(RoundFailed) as late:
        promotion.decide_round(round_=the_round(), decision="promote", reason="now", actor="steward")
    assert late.value.code == "deadline_passed"
    assert the_round().candidate_version.status == VersionStatus.CANDIDATE  # type: ignore[union-attr]
    assert service.aggregate()["state"] == RoundState.AWAITING_DECISION


def test_a_contributor_who_withdraws_before_the_decision_stops_the_promotion(engine: ShrinkingEngine) -> None:
    world = make_world(policy={"promotion": "manual"})
    service.aggregate()
    Learner.objects.filter(pk=world.learners[0].pk).update(withdrawn_at=timezone.now())
    with pytest.raises(RoundFailed) as failed:
        promotion.decide_round(round_=the_round(), decision="promote", reason="go", actor="steward")
    assert failed.value.code == "consent_withdrawn"
    assert active_version() == world.version and the_round().state == RoundState.FAILED


def test_a_version_that_became_active_meanwhile_is_not_overwritten(
    engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_world()
    other = make_version(seed=7, active=False)
    promote = promotion.promote_round

    def overtaken(round_: AggregationRound, *, actor: str, reason: str) -> FederatedUpdate:
        activate(row=other, actor="operator", reason="at the same time")
        return promote(round_, actor=actor, reason=reason)

    monkeypatch.setattr(promotion, "promote_round", overtaken)
    with pytest.raises(RoundFailed) as failed:
        service.aggregate()
    assert failed.value.code == "base_moved" and failed.value.result["state"] == "FAILED"
    assert active_version() == other
    assert not ModelTrainingSession.objects.filter(contributed_to_federation=True).exists()
    assert FederatedUpdate.objects.count() == 0


def test_a_base_that_moves_early_ends_the_round_before_it_works_for_nothing(
    engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_world()
    other = make_version(seed=7, active=False)
    train = running.STEPS[RoundState.TRAINING]

    def train_then(run: running.RoundRun) -> None:
        train(run)
        activate(row=other, actor="operator", reason="meanwhile")

    monkeypatch.setitem(running.STEPS, RoundState.TRAINING, train_then)
    with pytest.raises(RoundFailed) as failed:
        service.aggregate()
    assert failed.value.code == "base_moved"
    assert Contribution.objects.filter(verdict="PENDING").count() == 6


def test_promotion_is_all_or_nothing(engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world()

    def broken(*_args: object, **_values: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(promotion.lifecycle, "finish", broken)
    with pytest.raises(OSError, match="disk"):
        service.aggregate()
    assert active_version() == world.version
    assert FederatedUpdate.objects.count() == 0
    assert not ModelTrainingSession.objects.filter(contributed_to_federation=True).exists()
    assert AggregationRound.objects.get().state == RoundState.EVALUATING


def test_a_rejected_candidate_is_promoted_by_hand_with_a_reason_and_its_round_stays_rejected(engine: ShrinkingEngine) -> None:
    round_ = rejected_round(engine)
    candidate = round_.candidate_version
    assert candidate is not None
    with pytest.raises(NotPromotable) as refused:
        promotion.promote_version(version=candidate, reason=" ", actor="steward")
    assert refused.value.code == "no_reason"

    promotion.promote_version(version=candidate, reason="a new subject begins", actor="steward")

    assert active_version() == candidate and the_round().state == RoundState.REJECTED
    update = FederatedUpdate.objects.get(main_model_version=candidate)
    assert update.metadata["promoted_by_hand"] and len(update.contributing_learners) == 6
    assert ModelTrainingSession.objects.filter(federated_update=update).count() == 6
    event = AuditEvent.objects.get(action="main_model.promoted_by_hand")
    assert event.data["reason"] == "a new subject begins"


def test_only_candidates_and_rejected_versions_with_files_can_be_promoted_and_the_message_names_them() -> None:
    first = make_version(seed=1)
    second = make_version(seed=2, parent=first)
    waiting = make_version(seed=3, active=False)
    for version in (first, second):
        with pytest.raises(NotPromotable) as refused:
            promotion.promote_version(version=version, reason="because", actor="steward")
        assert waiting.version in str(refused.value)
    empty = MainModelVersion.objects.create(version="aivo-main-v9", sequence=9, status=VersionStatus.REJECTED)
    with pytest.raises(NotPromotable) as refused:
        promotion.promote_version(version=empty, reason="because", actor="steward")
    assert refused.value.code == "no_files"
    assert active_version() == second


def test_rollback_makes_an_archived_version_active_and_only_an_archived_one() -> None:
    first = make_version(seed=1)
    second = make_version(seed=2, parent=first)
    candidate = make_version(seed=3, active=False)
    with pytest.raises(NotPromotable) as refused:
        promotion.rollback(to=candidate, reason="worse", actor="steward")
    assert refused.value.code == "not_archived" and first.version in str(refused.value)
    with pytest.raises(NotPromotable):
        promotion.rollback(to=None, reason="", actor="steward")

    row = promotion.rollback(to=None, reason="path got worse", actor="steward")

    assert row == first == active_version()
    second.refresh_from_db()
    assert second.status == VersionStatus.ARCHIVED
    assert second.metadata["rolled_back"][0]["reason"] == "path got worse"
    assert AuditEvent.objects.get(action="main_model.rolled_back").data["from"] == second.version


@pytest.mark.django_db(transaction=True)
def test_the_pointer_file_follows_promotion_and_rollback(engine: ShrinkingEngine) -> None:
    world = make_world()

    def pointed() -> str:
        with storages["main_models"].open("ACTIVE.json") as file:
            return str(json.loads(file.read())["version"])

    service.aggregate()
    assert pointed() == active_version().version != world.version.version
    promotion.rollback(to=None, reason="worse", actor="steward")
    assert pointed() == world.version.version


def test_sessions_of_a_rolled_back_version_stay_used_and_no_round_builds_on_it() -> None:
    world = make_world(policy={"contribution_source": "sessions"})
    service.aggregate()
    service.roll_back(version=None, reason="worse", actor="steward")
    assert active_version() == world.version
    assert ModelTrainingSession.objects.filter(contributed_to_federation=True).count() == 6
    with pytest.raises(RoundSkipped) as skipped:
        service.aggregate()
    assert skipped.value.result["excluded"] == {"nothing_to_contribute": 6}
    assert skipped.value.result["base_version"] == world.version.version


def test_rolling_back_twice_at_once_is_one_rollback() -> None:
    first = make_version(seed=1)
    make_version(seed=2, parent=first)
    promotion.rollback(to=first, reason="worse", actor="one")
    with pytest.raises((NotPromotable, VersionConflict)):
        promotion.rollback(to=first, reason="worse", actor="two")


def test_a_promotion_job_names_the_user_and_moves_the_models(engine: ShrinkingEngine) -> None:
    from aivo_site.jobs import services as jobs

    round_ = rejected_round(engine)
    user = User.objects.create(username="steward")
    params = {"version": round_.candidate_version.version, "reason": "decided"}  # type: ignore[union-attr]
    job = jobs.run_inline(kind="promote_main_model", params=params, requested_by=user)
    assert job.result is not None and job.result["active_version"] == params["version"]
    assert job.result["rebase"]["rebased"] == 6
    assert AuditEvent.objects.get(action="main_model.promoted_by_hand").actor == "steward"
