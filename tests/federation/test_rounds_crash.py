"""Rounds that die, overlap, are late or are cancelled: one version, sessions counted once, the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from django.conf import Settings
from django.core.files.storage import storages
from django.db import transaction
from django.utils import timezone

from aivo_site.jobs import services as jobs
from aivo_site.jobs.models import Job, JobState
from federation.models import AggregationRound, Contribution, FederatedUpdate, ModelTrainingSession, RoundAttempt, RoundState
from federation.rounds import lifecycle, running, service
from federation.rounds.errors import RoundConflict, RoundFailed, RoundSkipped, RoundStopped
from models_store.models import MainModelVersion, PersonalizedModel, VersionStatus
from models_store.verification import verify_store
from models_store.versions import active_version
from tests.federation.round_process import POINTS
from tests.federation.rounds_world import ShrinkingEngine, make_world
from tests.site.worker_processes import environment, until

KIND = "run_federated_aggregation"


class Killed(BaseException):
    """Passes through every handler, as a kill would."""


def expire_leases() -> None:
    Job.objects.filter(state=JobState.RUNNING).update(lease_expires_at=timezone.now() - timedelta(seconds=1))
    AggregationRound.objects.update(updated_at=timezone.now() - timedelta(hours=1))


def weights_of(version: MainModelVersion) -> bytes:
    with storages["main_models"].open(f"{version.model_path}/weights.safetensors") as file:
        return bytes(file.read())


def uninterrupted() -> bytes:
    """The promoted version's weights of a round that nothing disturbed, in a transaction that is undone."""
    with transaction.atomic():
        service.aggregate()
        made = weights_of(active_version())
        transaction.set_rollback(True)
    return made


@pytest.mark.django_db
@pytest.mark.parametrize("point", POINTS.names)
def test_a_round_that_died_is_gone_on_with_and_gives_one_version_with_the_same_bytes(
    point: str, engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()
    expected = uninterrupted()

    def die() -> None:
        raise Killed

    with monkeypatch.context() as patched:
        POINTS[point](die, patched.setattr)
        with pytest.raises(Killed):
            service.aggregate()
    expire_leases()
    result = service.aggregate() if point != "after the promotion" else {"state": RoundState.PROMOTED}

    assert result["state"] == RoundState.PROMOTED
    assert AggregationRound.objects.count() == 1
    assert MainModelVersion.objects.count() == 2 and MainModelVersion.objects.filter(status="ACTIVE").count() == 1
    assert active_version().parent == world.version and weights_of(active_version()) == expected
    assert FederatedUpdate.objects.count() == 1
    contributed = ModelTrainingSession.objects.filter(contributed_to_federation=True)
    assert contributed.count() == 6 == Contribution.objects.filter(verdict="ACCEPTED").count()
    assert RoundAttempt.objects.exclude(aggregate_path="").count() == 1
    report = verify_store()
    assert not report.missing and not report.corrupt


@pytest.mark.django_db
def test_a_round_whose_owner_lives_is_not_touched(engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    make_world()
    refusals = []

    def try_meanwhile(run: running.RoundRun) -> None:
        with pytest.raises(RoundSkipped) as refused:
            service.aggregate()
        refusals.append(refused.value)
        check(run)

    check = running.STEPS[RoundState.INTAKE]
    monkeypatch.setitem(running.STEPS, RoundState.INTAKE, try_meanwhile)
    assert service.aggregate()["state"] == RoundState.PROMOTED
    assert [refusal.code for refusal in refusals] == ["round_running"]
    assert "Round 1" in str(refusals[0]) and refusals[0].result["reason"]
    assert AggregationRound.objects.count() == 1


@pytest.mark.django_db
def test_a_round_past_its_deadline_is_failed_and_a_new_one_begins(engine: ShrinkingEngine) -> None:
    world = make_world()
    round_ = lifecycle.claim_round(policy=service.policy_with({}), base=world.version, job=None, actor="test").round
    AggregationRound.objects.filter(pk=round_.pk).update(deadline=timezone.now() - timedelta(seconds=1))

    result = service.aggregate()

    assert result["round"] == 2 and result["state"] == RoundState.PROMOTED
    round_.refresh_from_db()
    assert (round_.state, round_.reason_code) == (RoundState.FAILED, "deadline_passed")


@pytest.mark.django_db
def test_a_round_that_runs_into_its_deadline_ends_itself(engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world()
    check = running.STEPS[RoundState.INTAKE]

    def late(run: running.RoundRun) -> None:
        check(run)
        run.round.deadline = timezone.now()

    monkeypatch.setitem(running.STEPS, RoundState.INTAKE, late)
    with pytest.raises(RoundFailed) as failed:
        service.aggregate()
    assert failed.value.code == "deadline_passed" and active_version() == world.version


@pytest.mark.django_db
def test_a_run_that_lost_its_round_changes_nothing_more(engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    make_world()
    check = running.STEPS[RoundState.INTAKE]

    def cancelled_meanwhile(run: running.RoundRun) -> None:
        lifecycle.cancel_round(round_=run.round, actor="steward", reason="not tonight")
        check(run)

    monkeypatch.setitem(running.STEPS, RoundState.INTAKE, cancelled_meanwhile)
    with pytest.raises(RoundStopped) as stopped:
        service.aggregate()
    assert stopped.value.code == "cancelled" and "not tonight" in str(stopped.value)
    round_ = AggregationRound.objects.get()
    assert (round_.state, round_.open_slot) == (RoundState.CANCELLED, None)
    with pytest.raises(RoundConflict):
        lifecycle.cancel_round(round_=round_, actor="steward", reason="again")
    with pytest.raises(RoundConflict):
        lifecycle.advance(round_, to=RoundState.PROMOTED)


@pytest.mark.django_db
@pytest.mark.parametrize("state", [RoundState.INTAKE, RoundState.AGGREGATING, RoundState.EVALUATING])
def test_a_stop_leaves_the_round_open_for_the_next_run(
    state: RoundState, engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_world()
    with pytest.raises(RoundStopped):
        service.aggregate(should_stop=lambda: AggregationRound.objects.filter(state=state).exists())
    assert AggregationRound.objects.get().state == state
    expire_leases()
    assert service.aggregate()["state"] == RoundState.PROMOTED


@pytest.mark.django_db(transaction=True)
def test_a_job_that_is_run_again_after_its_round_ended_gives_that_round_and_finishes_the_rebase(engine: ShrinkingEngine) -> None:
    """The worker died after the promotion, before the learners' models were moved."""
    make_world()
    job = jobs.run_inline(kind=KIND, params={"rebase": False})
    again = service.aggregate(job=job)
    assert (again["round"], again["state"], again["resumed"]) == (1, RoundState.PROMOTED, True)
    assert again["rebase"]["rebased"] == 6
    assert AggregationRound.objects.count() == 1 and MainModelVersion.objects.count() == 2


@pytest.mark.django_db
def test_a_candidate_of_a_cancelled_round_is_rejected(engine: ShrinkingEngine) -> None:
    make_world(policy={"promotion": "manual"})
    service.aggregate()
    round_ = AggregationRound.objects.get()
    lifecycle.cancel_round(round_=round_, actor="steward", reason="not needed")
    candidate = MainModelVersion.objects.get(pk=round_.candidate_version_id)
    assert candidate.status == VersionStatus.REJECTED


# --- In processes of their own ---------------------------------------------------------------------------------------------


@pytest.fixture
def committed(transactional_db: None, settings: Settings, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Rows that other processes see; the environment that gives them this test's database and stores."""
    yield {
        **environment(),
        "AIVO_MAIN_MODEL_PATH": str(tmp_path / "main_models"),
        "AIVO_LEARNER_MODELS_PATH": str(tmp_path / "learner_models"),
    }


def start(env: dict[str, str], *arguments: str, **extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.federation.round_process", *arguments, "--json"],
        env={**env, **extra},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_of_two_runs_at_the_same_moment_one_works_and_the_other_exits_with_the_reason(committed: dict[str, str]) -> None:
    make_world()
    both = [start(committed, KIND, TEST_ENGINE_DELAY="0.2") for _ in range(2)]
    ended = [process.communicate(timeout=60) for process in both]

    codes = sorted(process.returncode for process in both)
    assert codes == [0, 3], ended
    results = {process.returncode: json.loads(out) for process, (out, _err) in zip(both, ended, strict=True)}
    assert results[0]["state"] == "PROMOTED" and results[0]["accepted"] == 6
    assert results[3]["error"]["code"] == "round_running" and "one round runs at a time" in results[3]["reason"]
    assert AggregationRound.objects.count() == 1 and MainModelVersion.objects.count() == 2
    assert set(Job.objects.values_list("state", flat=True)) == {JobState.SUCCEEDED, JobState.SKIPPED}


@pytest.mark.parametrize("point", ["after a contribution", "after the aggregate's file", "in the transaction of the promotion"])
def test_a_killed_process_leaves_a_round_that_the_next_one_finishes(committed: dict[str, str], point: str) -> None:
    make_world()
    killed = start(committed, KIND, TEST_DIE_AT=point)
    _out, err = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL, err
    assert AggregationRound.objects.get().open_slot == 1

    expire_leases()
    again = start(committed, KIND)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    result = json.loads(out)
    assert result["state"] == "PROMOTED" and result["round"] == 1 and result["resumed"]
    assert MainModelVersion.objects.count() == 2 and FederatedUpdate.objects.count() == 1
    assert ModelTrainingSession.objects.filter(contributed_to_federation=True).count() == 6
    assert set(PersonalizedModel.objects.values_list("source_version__version", flat=True)) == {result["candidate_version"]}
    report = verify_store()
    assert not report.missing and not report.corrupt


def test_a_cancelled_job_ends_the_round_cancelled(committed: dict[str, str]) -> None:
    make_world(learners=20)
    process = start(committed, KIND, TEST_ENGINE_DELAY="0.3")
    until(lambda: AggregationRound.objects.filter(state=RoundState.TRAINING).exists(), seconds=30, what="training began")
    jobs.request_cancel(job=Job.objects.get(kind=KIND), actor="steward")
    process.communicate(timeout=60)
    assert process.returncode == 1
    round_ = AggregationRound.objects.get()
    assert (round_.state, round_.reason_code) == (RoundState.CANCELLED, "cancelled")
    assert Job.objects.get(kind=KIND).state == JobState.CANCELLED
    assert MainModelVersion.objects.count() == 1
