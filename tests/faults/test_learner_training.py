"""Training of learners' own models whose processes are killed: one session each, with the tails they would have had."""

from __future__ import annotations

import pytest

from aivo_site.jobs.models import JobState
from federation.models import ModelTrainingSession, SessionPurpose
from models_store.models import PersonalizedModel, PersonalizedModelStatus
from tests.faults.conftest import Opened
from tests.faults.installation import Installation, rows
from tests.faults.steps import (
    LEARNERS,
    TRAIN_LEARNERS,
    assert_leftovers_are_collected,
    assert_sound,
    ended,
    kill_job_process,
    kill_worker,
    runs_again,
    some_learners_are_trained,
    started_job,
)

pytestmark = [pytest.mark.worker, pytest.mark.slow]


def trained_before_the_kill() -> int:
    found = rows(ModelTrainingSession).count()
    assert 2 <= found < LEARNERS, "the kill came when a part of the learners was trained"
    return found


def assert_each_trained_once_as_without_interruption(installation: Installation, undisturbed: Installation) -> None:
    models = list(rows(PersonalizedModel))
    assert len(models) == LEARNERS == rows(ModelTrainingSession).count()
    assert_sound(installation)
    mine, undisturbeds = installation.files(), undisturbed.files()
    for model in models:
        session = rows(ModelTrainingSession).get(personalized_model=model)
        assert (session.sequence, session.purpose) == (1, SessionPurpose.PERSONAL)
        assert (model.version, model.status) == (2, PersonalizedModelStatus.ACTIVE)
        assert model.weights_sha256 == session.metadata["tail_sha256"]
        path = f"learners/{model.weights_path}"
        assert mine[path] == undisturbeds[path]


def test_after_kill_9_of_the_worker_only_the_other_learners_are_trained(
    main_trained: Installation, learners_trained: Installation, copied: Opened
) -> None:
    own = copied(main_trained)
    with own.worker() as worker:
        job = started_job(own, TRAIN_LEARNERS)
        some_learners_are_trained(own)
        kill_worker(worker)
    before = trained_before_the_kill()
    with own.worker():
        runs_again(own, job)
    assert job.result is not None
    assert (job.result["trained"], job.result["skipped"]) == (LEARNERS - before, {"nothing_new": before})
    assert_each_trained_once_as_without_interruption(own, learners_trained)
    assert_leftovers_are_collected(own)


def test_after_kill_9_of_the_jobs_process_the_next_run_trains_only_the_other_learners(
    main_trained: Installation, learners_trained: Installation, copied: Opened
) -> None:
    own = copied(main_trained)
    with own.worker() as worker:
        job = started_job(own, TRAIN_LEARNERS)
        some_learners_are_trained(own)
        kill_job_process(worker)
        assert (ended(job).state, job.error_code) == (JobState.FAILED, "child_died")
    before = trained_before_the_kill()
    again = own.done(*TRAIN_LEARNERS)
    assert (again["trained"], again["skipped"]) == (LEARNERS - before, {"nothing_new": before})
    assert_each_trained_once_as_without_interruption(own, learners_trained)
