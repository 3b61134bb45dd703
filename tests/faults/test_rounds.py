"""Rounds whose processes are killed while Keras trains or the gate compares: one round, one candidate, the same bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aivo_site.jobs.models import Job, JobState
from federation.models import (
    AggregationRound,
    Contribution,
    FederatedUpdate,
    ModelTrainingSession,
    RoundState,
    SessionPurpose,
    Verdict,
)
from models_store.models import MainModelVersion, PersonalizedModel, VersionStatus
from tests.faults.conftest import Opened
from tests.faults.installation import Installation, rows
from tests.faults.steps import (
    AGGREGATE,
    LEARNERS,
    assert_sound,
    ended,
    kill_job_process,
    kill_worker,
    lease_runs_out,
    runs_again,
    some_contributions_are_trained,
    started_job,
    the_gate_compares,
)

pytestmark = [pytest.mark.worker, pytest.mark.slow]


def assert_killed_in(state: RoundState) -> None:
    round_ = rows(AggregationRound).get()
    assert (round_.state, round_.gate) == (state, {}), "the kill came at the moment that was meant"


def assert_one_round_as_without_interruption(installation: Installation, undisturbed: Installation) -> None:
    round_ = rows(AggregationRound).get()
    assert round_.state == RoundState.PROMOTED and round_.open_slot is None
    first, second = rows(MainModelVersion).order_by("sequence")
    assert (first.status, second.status) == (VersionStatus.ARCHIVED, VersionStatus.ACTIVE)
    assert round_.candidate_version_id == second.pk and second.parent_id == first.pk
    assert rows(FederatedUpdate).get().main_model_version_id == second.pk
    assert round_.attempts.exclude(aggregate_path="").count() == 1

    contributed = rows(ModelTrainingSession).filter(purpose=SessionPurpose.CONTRIBUTION)
    assert contributed.count() == LEARNERS == contributed.values("personalized_model").distinct().count()
    assert contributed.filter(contributed_to_federation=True).count() == LEARNERS
    assert not rows(ModelTrainingSession).exclude(purpose=SessionPurpose.CONTRIBUTION).filter(contributed_to_federation=True)
    assert rows(Contribution).filter(verdict=Verdict.ACCEPTED).count() == LEARNERS == rows(Contribution).count()
    assert set(rows(PersonalizedModel).values_list("source_version", "status")) == {(second.pk, "ACTIVE")}

    assert_sound(installation)
    assert candidate_files(installation) == candidate_files(undisturbed)


def candidate_files(installation: Installation) -> dict[str, bytes]:
    """All files of the second version and of the round."""
    kept = ("main/aivo-main-v2/", "main/rounds/")
    return {path: content for path, content in installation.files().items() if path.startswith(kept)}


@pytest.mark.parametrize(
    ("moment", "state"),
    [(some_contributions_are_trained, RoundState.TRAINING), (the_gate_compares, RoundState.EVALUATING)],
    ids=["while contributions train", "while the gate compares"],
)
def test_after_kill_9_of_the_worker_its_successor_ends_the_round(
    moment: Callable[[Installation], None],
    state: RoundState,
    learners_trained: Installation,
    aggregated: Installation,
    copied: Opened,
) -> None:
    own = copied(learners_trained)
    with own.worker() as worker:
        job = started_job(own, AGGREGATE)
        moment(own)
        kill_worker(worker)
    assert_killed_in(state)
    with own.worker():
        runs_again(own, job)
    assert job.result is not None and job.result["resumed"] and job.result["state"] == "PROMOTED"
    assert_one_round_as_without_interruption(own, aggregated)


def test_after_kill_9_of_the_jobs_process_the_next_run_ends_the_round(
    learners_trained: Installation, aggregated: Installation, copied: Opened
) -> None:
    own = copied(learners_trained)
    with own.worker() as worker:
        job = started_job(own, AGGREGATE)
        some_contributions_are_trained(own)
        kill_job_process(worker)
        assert (ended(job).state, job.error_code) == (JobState.FAILED, "child_died")
        assert_killed_in(RoundState.TRAINING)
        again = ended(started_job(own, AGGREGATE))
    assert again.state == JobState.SUCCEEDED and again.result is not None and again.result["resumed"]
    assert_one_round_as_without_interruption(own, aggregated)


def test_after_kill_9_of_the_command_the_next_one_waits_for_the_lease_and_ends_the_round(
    learners_trained: Installation, aggregated: Installation, copied: Opened
) -> None:
    own = copied(learners_trained)
    with own.started("manage.py", *AGGREGATE) as command:
        some_contributions_are_trained(own)
        command.kill()
    assert_killed_in(RoundState.TRAINING)
    dead = rows(Job).get(kind="run_federated_aggregation", state=JobState.RUNNING)
    refused = own.run(*AGGREGATE)
    assert (refused.code, refused.object["error"]["code"]) == (3, "round_running")

    lease_runs_out(dead)
    result = own.done(*AGGREGATE)
    assert (result["round"], result["state"], result["resumed"]) == (1, "PROMOTED", True)
    assert own.done("janitor")["failed"] == 1
    dead.refresh_from_db()
    assert (dead.state, dead.error_code) == (JobState.FAILED, "lease_expired")
    assert_one_round_as_without_interruption(own, aggregated)
