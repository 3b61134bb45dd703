"""Shards through real queue workers, each a process tree of its own on the test run's database."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from django.conf import Settings
from django_q.models import Failure, OrmQ, Schedule

from aivo_site.jobs import janitor, services
from aivo_site.jobs.models import Job, JobShard, JobState, ShardState, WorkerHeartbeat
from aivo_site.jobs.shard_helpers import HELPER_KIND
from tests.site.job_kinds import kinds
from tests.site.worker_processes import ended, kill_all, living_workers, started, until, workers_of

pytestmark = pytest.mark.worker

Cluster = subprocess.Popen[bytes]
SHARDS = 13
"""With two steps of .2 s each: long enough for a helper to come."""


@pytest.fixture(autouse=True)
def db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """In the place of the usual fixture: rows are committed, so that other processes see them, and taken away at the end."""
    kinds.register_kinds()
    with django_db_blocker.unblock():
        yield
        for model in (WorkerHeartbeat, JobShard, Job, Schedule, OrmQ, Failure):
            model.objects.all().delete()


@pytest.fixture(autouse=True)
def quick_times(settings: Settings) -> None:
    settings.JOB_LEASE_SECONDS = 3
    settings.JOB_RESEND_AFTER_SECONDS = 2


@pytest.fixture
def two(db: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Cluster]]:
    """Two workers of the long jobs' queue."""
    monkeypatch.setenv("TEST_TRAINING_TIMEOUT", "30")
    with ExitStack() as stack:
        running = [stack.enter_context(started(tmp_path / "log", "worker", "--queue", "training")) for _ in range(2)]
        until(lambda: len(living_workers("training")) == 2, seconds=30, what=f"two workers are up, see {tmp_path / 'log'}")
        yield running


def share(kind: str = "share", **params: Any) -> Job:
    return services.enqueue(kind=kind, params={"shards": SHARDS, "step_seconds": 0.2, **params})


def cluster_of(job: Job, clusters: list[Cluster]) -> Cluster:
    """The one whose worker is at work on the job."""

    def find() -> Cluster | None:
        pid = WorkerHeartbeat.objects.filter(current_job=job).values_list("pid", flat=True).first()
        return next((cluster for cluster in clusters if pid in workers_of(cluster)), None)

    found: Cluster = until(find, what=f"a worker with {job.kind}")
    return found


def helper_at_work(job: Job) -> Job:
    shard = until(lambda: job.shards.filter(worker_job__kind=HELPER_KIND).select_related("worker_job").first(), what="a helper")
    helper: Job = shard.worker_job
    return helper


def assert_all_squared(job: Job) -> None:
    assert job.state == JobState.SUCCEEDED, job.error_message
    assert job.result is not None and job.result["squares"] == [number**2 for number in range(SHARDS)]
    assert set(job.shards.values_list("state", flat=True)) == {ShardState.DONE}


@pytest.mark.parametrize("kind", ["share", "share_child"])
def test_two_workers_share_a_job(kind: str, two: list[Cluster]) -> None:
    job = ended(share(kind), seconds=30)
    assert_all_squared(job)
    assert set(job.shards.values_list("worker_job__kind", flat=True)) == {kind, HELPER_KIND}
    assert job.result is not None and len(job.result["pids"]) == 2
    helper = ended(Job.objects.get(kind=HELPER_KIND))
    assert helper.state == JobState.SUCCEEDED and helper.result is not None
    assert helper.result["shards"] == job.shards.filter(worker_job=helper).count()


def test_a_command_that_works_in_its_own_process_is_helped_too(two: list[Cluster]) -> None:
    job = services.run_inline(kind="share", params={"shards": SHARDS, "step_seconds": 0.2})
    assert_all_squared(job)
    assert set(job.shards.values_list("worker_job__kind", flat=True)) == {"share", HELPER_KIND}


def test_after_kill_9_of_the_helper_the_parent_ends_the_work(two: list[Cluster]) -> None:
    job = share()
    helper = helper_at_work(job)
    kill_all(cluster_of(helper, two))
    assert_all_squared(ended(job, seconds=30))
    assert job.starts == 1


def test_after_kill_9_of_the_parent_the_helper_goes_on_and_the_parents_next_run_only_puts_together(two: list[Cluster]) -> None:
    job = share()
    helper = helper_at_work(job)
    kill_all(cluster_of(job, two))
    open_ = job.shards.exclude(state=ShardState.DONE)
    until(
        lambda: set(open_.values_list("worker_job", flat=True)) <= {job.id} and open_.count() <= 1, what="the helper did the rest"
    )
    until(lambda: janitor.sweep().requeued, what="the parent waits again")
    assert_all_squared(ended(job, seconds=30))
    assert job.starts == 2
    assert job.shards.filter(worker_job=helper).count() >= 3
    assert list(job.shards.filter(starts__gt=1).values_list("starts", flat=True)) in ([], [2])


def test_cancelling_the_parent_stops_its_helpers(two: list[Cluster]) -> None:
    job = share()
    helper = helper_at_work(job)
    services.request_cancel(job=job, actor="steward")
    assert ended(job).state == JobState.CANCELLED
    assert ended(helper).state in (JobState.SUCCEEDED, JobState.SKIPPED)
    assert set(job.shards.values_list("state", flat=True)) == {ShardState.WAITING, ShardState.DONE}


def test_a_shard_that_kills_the_process_it_is_in_ends_the_job_with_that_reason(two: list[Cluster]) -> None:
    job = ended(share("share_child", lethal=[SHARDS - 1]))
    assert (job.state, job.error_code) == (JobState.FAILED, "child_died")
    assert len(living_workers("training")) == 2
