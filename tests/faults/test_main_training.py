"""Main training whose processes are killed: one version, with the weights that it would have had."""

from __future__ import annotations

import pytest

from aivo_site.jobs.models import Job, JobState
from models_store.models import MainModelVersion, VersionStatus
from tests.faults.conftest import Opened
from tests.faults.installation import Installation, rows
from tests.faults.steps import (
    TRAIN_MAIN,
    an_epoch_is_kept,
    assert_sound,
    ended,
    kill_job_process,
    kill_main_process,
    kill_queue_worker,
    kill_worker,
    lease_runs_out,
    runs_again,
    started_job,
)

pytestmark = [pytest.mark.worker, pytest.mark.slow]


def assert_one_version_as_without_interruption(installation: Installation, undisturbed: Installation) -> None:
    version = rows(MainModelVersion).get()
    assert version.status == VersionStatus.ACTIVE
    assert installation.weights(version.version) == undisturbed.weights(version.version)
    assert_sound(installation)


def test_after_kill_9_of_the_worker_its_successor_goes_on_from_the_last_epoch(
    imported: Installation, main_trained: Installation, copied: Opened
) -> None:
    own = copied(imported)
    with own.worker() as worker:
        job = started_job(own, TRAIN_MAIN)
        an_epoch_is_kept(own)
        kill_worker(worker)
    with own.worker():
        runs_again(own, job)
    assert job.result is not None and job.result["resumed_from"] >= 1
    assert_one_version_as_without_interruption(own, main_trained)


def test_after_kill_9_of_the_main_process_alone_the_cluster_ends_and_its_successor_goes_on(
    imported: Installation, main_trained: Installation, copied: Opened
) -> None:
    own = copied(imported)
    with own.worker() as worker:
        job = started_job(own, TRAIN_MAIN)
        an_epoch_is_kept(own)
        kill_main_process(worker)
    job.refresh_from_db()
    assert job.state == JobState.QUEUED, "the worker handed its job back"
    with own.worker():
        assert ended(job).state == JobState.SUCCEEDED
    assert job.result is not None and job.result["resumed_from"] >= 1
    assert_one_version_as_without_interruption(own, main_trained)


def test_after_kill_9_of_the_queue_worker_its_cluster_goes_on_from_the_last_epoch(
    imported: Installation, main_trained: Installation, copied: Opened
) -> None:
    own = copied(imported)
    with own.worker() as worker:
        job = started_job(own, TRAIN_MAIN)
        an_epoch_is_kept(own)
        kill_queue_worker(worker)
        runs_again(own, job)
    assert job.result is not None and job.result["resumed_from"] >= 1
    assert_one_version_as_without_interruption(own, main_trained)


def test_after_kill_9_of_the_jobs_process_the_job_failed_and_the_next_one_goes_on(
    imported: Installation, main_trained: Installation, copied: Opened
) -> None:
    own = copied(imported)
    with own.worker() as worker:
        job = started_job(own, TRAIN_MAIN)
        an_epoch_is_kept(own)
        kill_job_process(worker)
        assert (ended(job).state, job.error_code) == (JobState.FAILED, "child_died")
        again = ended(started_job(own, TRAIN_MAIN))
    assert again.state == JobState.SUCCEEDED and again.result is not None
    assert again.result["created"] and again.result["resumed_from"] >= 1
    assert_one_version_as_without_interruption(own, main_trained)


def test_after_kill_9_of_the_command_the_next_one_goes_on_and_the_dead_job_fails(
    imported: Installation, main_trained: Installation, copied: Opened
) -> None:
    own = copied(imported)
    with own.started("manage.py", *TRAIN_MAIN) as command:
        an_epoch_is_kept(own)
        command.kill()
    dead = rows(Job).get()
    result = own.done(*TRAIN_MAIN)
    assert result["created"] and result["resumed_from"] >= 1

    lease_runs_out(dead)
    assert own.done("janitor")["failed"] == 1
    dead.refresh_from_db()
    assert (dead.state, dead.error_code) == (JobState.FAILED, "lease_expired")
    assert_one_version_as_without_interruption(own, main_trained)
    assert not own.done(*TRAIN_MAIN)["created"]
