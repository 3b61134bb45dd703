"""Jobs through real queue workers, each a process tree of its own on the test run's database."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import Settings
from django.utils import timezone
from django_q.models import Failure, OrmQ, Schedule

from aivo_site.jobs import janitor, queueing, schedules, services
from aivo_site.jobs.models import Job, JobState, ScheduleRun, WorkerHeartbeat
from tests.site.job_kinds import kinds
from tests.site.worker_processes import alive, descendants, ended, kill_all, living_workers, started, until, workers_of

pytestmark = pytest.mark.worker


@pytest.fixture(scope="module", autouse=True)
def db(django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """In the place of the usual fixture: rows are committed, so that other processes see them, and taken away at the end."""
    kinds.register_kinds()
    with django_db_blocker.unblock():
        yield
        for model in (ScheduleRun, WorkerHeartbeat, Job, Schedule, OrmQ, Failure):
            model.objects.all().delete()


@pytest.fixture(autouse=True)
def quick_times(settings: Settings) -> None:
    settings.JOB_LEASE_SECONDS = 3
    settings.JOB_RESEND_AFTER_SECONDS = 2


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers") / "log"


@pytest.fixture(scope="module")
def clusters(db: None, log: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two clusters on the default queue and one on the training queue."""
    with ExitStack() as stack:
        running = [stack.enter_context(started(log, "worker", "--queue", queue)) for queue in ("default", "default", "training")]
        until(lambda: WorkerHeartbeat.objects.count() == 3, seconds=30, what=f"three workers are up, see {log}")
        yield running


@pytest.fixture
def training(clusters: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    return clusters[2]


def run(kind: str, **params: Any) -> Job:
    return services.enqueue(kind=kind, params=params)


def messages() -> int:
    return OrmQ.objects.count()


@pytest.mark.usefixtures("clusters")
def test_a_due_schedule_is_planned_for_both_clusters() -> None:
    """First in the file: the schedulers look about every 30 seconds; the last test sees what came of it."""
    schedules.setup_schedules()
    Schedule.objects.exclude(name="janitor").delete()
    Schedule.objects.update(next_run=timezone.now() - timedelta(seconds=1), repeats=1)
    assert Schedule.objects.count() == 1


@pytest.mark.usefixtures("clusters")
def test_a_job_runs_in_the_worker_and_its_message_goes() -> None:
    job = ended(run("follow", steps=2))
    assert (job.state, job.starts, job.progress_done, job.progress_total) == (JobState.SUCCEEDED, 1, 2, 2)
    assert job.result is not None and job.result["pid"] in WorkerHeartbeat.objects.values_list("pid", flat=True)
    assert [line.message for line in job.log_lines.all()] == ["all steps done"]
    until(lambda: messages() == 0, what="the message was acknowledged")


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize(
    ("kind", "then", "state", "code"),
    [
        ("follow", "fail", JobState.FAILED, "odd_steps"),
        ("follow", "skip", JobState.SKIPPED, "nothing_new"),
        ("follow", "break", JobState.FAILED, "unexpected_error"),
        ("follow_child", "fail", JobState.FAILED, "odd_steps"),
        ("follow_child", "skip", JobState.SKIPPED, "nothing_new"),
    ],
)
def test_what_a_handler_raises_becomes_the_jobs_ending(kind: str, then: str, state: JobState, code: str) -> None:
    job = ended(run(kind, then=then))
    assert (job.state, job.error_code, job.starts) == (state, code, 1)
    assert ("broken on purpose" in job.error_traceback) == (then == "break")


@pytest.mark.usefixtures("clusters")
def test_progress_is_visible_while_the_job_runs() -> None:
    job = run("follow", steps=8, step_seconds=0.3)
    seen = until(lambda: Job.objects.filter(id=job.id, state=JobState.RUNNING, progress_done__gte=2).first(), what="progress")
    assert seen.progress_total == 8 and seen.progress_message.startswith("step")
    assert ended(job).state == JobState.SUCCEEDED


@pytest.mark.usefixtures("clusters")
def test_a_message_that_comes_again_returns_at_once() -> None:
    job = run("follow", steps=10, step_seconds=0.3)
    until(lambda: Job.objects.filter(id=job.id, state=JobState.RUNNING).exists(), what="the job runs")
    for _ in range(4):
        queueing.send(job)
    # The busy cluster may fetch two of the four before it notices; the idle one takes the rest.
    until(lambda: messages() <= 3, seconds=2.5, what="further messages were taken while the job runs")
    job.refresh_from_db()
    assert job.state == JobState.RUNNING
    ended(job)
    queueing.send(job)
    until(lambda: messages() == 0, what="all messages were taken")
    job.refresh_from_db()
    assert (job.state, job.starts) == (JobState.SUCCEEDED, 1)


def test_a_training_job_runs_in_a_child_with_its_share_of_the_cores(training: subprocess.Popen[bytes]) -> None:
    job = ended(run("follow_training"))
    assert job.state == JobState.SUCCEEDED and job.result is not None
    assert [job.result["parent"]] == workers_of(training)
    assert int(job.result["threads"]) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_a_killed_child_is_an_ordinary_failure_and_its_worker_goes_on(training: subprocess.Popen[bytes]) -> None:
    before = workers_of(training)
    job = ended(run("follow_training", then="kill"))
    assert (job.state, job.error_code) == (JobState.FAILED, "child_died")
    assert "SIGKILL" in job.error_message
    assert ended(run("follow_training")).state == JobState.SUCCEEDED
    assert workers_of(training) == before


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize(
    ("kind", "cooperative"),
    [("follow", True), ("follow_child", True), ("follow_child", False)],
    ids=["worker", "child", "deaf child"],
)
def test_a_running_job_is_cancelled(kind: str, cooperative: bool) -> None:
    job = run(kind, steps=40, step_seconds=0.25, cooperative=cooperative)
    until(lambda: Job.objects.filter(id=job.id, progress_done__gte=1).exists(), what="the job runs")
    services.request_cancel(job=job, actor="an operator")
    services.request_cancel(job=job, actor="an operator")
    ended(job, seconds=8)
    assert (job.state, job.error_code) == (JobState.CANCELLED, "cancelled")
    assert job.log_lines.filter(message__contains="an operator").count() == 1


@pytest.mark.usefixtures("clusters")
def test_a_child_that_takes_too_long_fails_and_its_worker_lives() -> None:
    job = ended(run("follow_training", steps=40, step_seconds=0.25, cooperative=False), seconds=16)
    assert (job.state, job.error_code) == (JobState.FAILED, "timeout")
    assert ended(run("follow_training")).state == JobState.SUCCEEDED


def test_after_kill_9_of_the_workers_the_job_runs_again(clusters: list[subprocess.Popen[bytes]], log: Path) -> None:
    kill_all(clusters.pop())
    with started(log, "worker", "--queue", "training") as first:
        job = run("follow_training", steps=8, step_seconds=0.25)
        follower = run("follow_training")
        until(lambda: Job.objects.filter(id=job.id, progress_done__gte=1).exists(), what="the job runs in its child")
        (worker,) = workers_of(first)
        (child,) = descendants(worker)
        os.killpg(first.pid, signal.SIGKILL)  # the child is in a group of its own
    until(lambda: not alive(child), seconds=2.0, what="the child died with its worker")
    job.refresh_from_db()
    assert job.state == JobState.RUNNING
    assert janitor.sweep().requeued == 0, "its lease has not run out"
    with started(log, "worker", "--queue", "training"):
        until(lambda: janitor.sweep().requeued == 1, what="the lease runs out")
        assert ended(job).state == JobState.SUCCEEDED
        assert job.starts == 2
        assert ended(follower).state == JobState.SUCCEEDED, "fetched by the dead worker, taken over by the next"


def test_sigterm_lets_the_running_job_end(log: Path) -> None:
    with started(log, "worker", "--queue", "training") as worker:
        job = run("follow_training", steps=6, step_seconds=0.25)
        until(lambda: Job.objects.filter(id=job.id, state=JobState.RUNNING).exists(), what="the job runs")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=10) == 0
        job.refresh_from_db()
        assert (job.state, job.starts) == (JobState.SUCCEEDED, 1)
        assert descendants(worker.pid) == []


def test_kill_9_of_the_main_process_ends_the_whole_cluster_and_hands_the_job_back(log: Path) -> None:
    with started(log, "worker", "--queue", "training") as worker:
        job = run("follow_training", steps=40, step_seconds=0.25)
        until(lambda: Job.objects.filter(id=job.id, progress_done__gte=1).exists(), what="the job runs in its child")
        left = descendants(worker.pid)
        assert len(left) == 5, "guard, worker, pusher, monitor, and the job's child"
        worker.kill()
        until(lambda: not any(alive(pid) for pid in left), seconds=10, what="all its processes end")
    job.refresh_from_db()
    assert (job.state, job.starts) == (JobState.QUEUED, 0)
    services.request_cancel(job=job, actor="the test")


def test_workers_stop_when_their_watchdog_is_killed(log: Path) -> None:
    with started(log, "watchdog", "--queue", "training") as watchdog:
        job = run("follow_training", steps=6, step_seconds=0.25)
        until(lambda: Job.objects.filter(id=job.id, state=JobState.RUNNING).exists(), what="the job runs")
        left = descendants(watchdog.pid)
        watchdog.kill()
        assert ended(job).state == JobState.SUCCEEDED, "the running job ends first"
        until(lambda: not any(alive(pid) for pid in left), seconds=10, what="all its processes end")


def test_a_watchdog_told_to_stop_hands_the_running_job_back(log: Path) -> None:
    with started(log, "watchdog", "--queue", "training", "--stop-timeout", "0.5") as watchdog:
        job = run("follow_training", steps=40, step_seconds=0.25)
        until(lambda: Job.objects.filter(id=job.id, progress_done__gte=1).exists(), what="the job runs")
        (worker,) = living_workers("training")
        (child,) = descendants(worker)
        watchdog.send_signal(signal.SIGTERM)
        assert watchdog.wait(timeout=10) == 0
    job.refresh_from_db()
    assert (job.state, job.starts, job.owner, job.lease_expires_at) == (JobState.QUEUED, 0, None, None)
    assert any(message.job_id == job.id and message.due_at <= timezone.now() for message in queueing.waiting_messages("training"))
    assert not alive(child) and not alive(worker)
    services.request_cancel(job=job, actor="the test")


def test_the_watchdog_starts_a_stuck_cluster_again(log: Path) -> None:
    with started(
        log, "watchdog", "--queue", "training", "--max-age", "2", "--interval", "0.5", "--stop-timeout", "5"
    ) as watchdog:
        (first,) = until(lambda: living_workers("training"), what="a worker")
        assert os.getpgid(first) != watchdog.pid
        time.sleep(1.0)  # the worker waits for messages and holds the lock of the queue between the processes
        os.kill(first, signal.SIGKILL)
        assert ended(run("follow_training"), seconds=25).state == JobState.SUCCEEDED
        watchdog.send_signal(signal.SIGTERM)
        assert watchdog.wait(timeout=10) == 0
    assert living_workers("training") == []
    assert "took no messages" in log.read_text(encoding="utf-8")


@pytest.mark.usefixtures("clusters")
def test_two_clusters_fire_a_due_schedule_once() -> None:
    until(lambda: ScheduleRun.objects.exists(), seconds=40, what="the schedule fired")
    run_row = ScheduleRun.objects.get()
    assert run_row.job == Job.objects.get(kind=janitor.JANITOR_KIND)
    assert ended(run_row.job).state == JobState.SUCCEEDED
