"""System checks of the queue's settings, the commands of workers, and looking at a queue from outside."""

from __future__ import annotations

import io
import json
import os
import socket
from datetime import timedelta
from typing import Any

import pytest
from django.conf import Settings
from django.contrib import admin
from django.core.checks import run_checks
from django.core.management import CommandError, call_command
from django.utils import timezone
from django_q.models import Failure, OrmQ, Schedule, Success

from aivo_site.jobs import checks, child, schedules, services, supervision
from aivo_site.jobs.models import Job, JobState, WorkerHeartbeat
from tests.site.job_kinds import kinds


def ids() -> set[str]:
    return {str(message.id) for message in run_checks(tags=["jobs"]) if message.id != "jobs.W001"}


def changed(settings: Settings, **options: Any) -> None:
    settings.Q_CLUSTER = {**settings.Q_CLUSTER, **options}


def training(settings: Settings, **options: Any) -> None:
    changed(settings, ALT_CLUSTERS={"training": {**settings.Q_CLUSTER["ALT_CLUSTERS"]["training"], **options}})


def test_the_products_own_settings_pass() -> None:
    assert ids() == set()


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"retry": 1800}, "jobs.E002"),
        ({"timeout": None}, "jobs.E002"),
        ({"queue_limit": 4}, "jobs.E003"),
        ({"bulk": 5}, "jobs.E003"),
        ({"ack_failures": False}, "jobs.E004"),
        ({"sync": True}, "jobs.E005"),
        ({"catch_up": True}, "jobs.E008"),
    ],
)
def test_options_that_run_jobs_twice_or_lose_them_are_refused(settings: Settings, options: dict[str, Any], found: str) -> None:
    changed(settings, **options)
    assert found in ids()


def test_each_queue_is_checked_by_itself(settings: Settings) -> None:
    training(settings, retry=3 * 6 * 3600)
    assert ids() == {"jobs.E002"}


def test_a_queue_without_workers_is_refused(settings: Settings) -> None:
    changed(settings, ALT_CLUSTERS={})
    assert ids() == {"jobs.E001"}


def test_a_queue_may_not_change_the_salt_of_signatures(settings: Settings) -> None:
    training(settings, name="training")
    assert ids() == {"jobs.E006"}


@pytest.mark.parametrize(("name", "found"), [("trainig", {"jobs.E007"}), ("training", set()), ("aivo", set()), ("", set())])
def test_a_worker_for_an_unknown_queue_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, found: set[str]) -> None:
    monkeypatch.setenv("Q_CLUSTER_NAME", name)
    assert ids() == found


def database(settings: Settings, **config: Any) -> None:
    settings.DATABASES = {"default": {**settings.DATABASES["default"], **config}}


@pytest.mark.filterwarnings("ignore:Overriding setting DATABASES")
@pytest.mark.parametrize(
    ("config", "command", "found"),
    [
        ({"ENGINE": "django.db.backends.sqlite3", "OPTIONS": {}}, "runserver", "jobs.E009"),
        ({"ENGINE": "django.db.backends.postgresql", "OPTIONS": {"pool": True}}, "qcluster", "jobs.E010"),
        ({"ENGINE": "django.db.backends.postgresql", "OPTIONS": {}, "CONN_MAX_AGE": 60}, "qcluster", "jobs.E011"),
        ({"ENGINE": "django.db.backends.postgresql", "OPTIONS": {"pool": True}, "CONN_MAX_AGE": 60}, "runserver", "jobs.E011"),
        ({"ENGINE": "django.db.backends.postgresql", "OPTIONS": {"pool": True}, "CONN_MAX_AGE": 0}, "runserver", None),
    ],
)
def test_database_options_that_break_workers_are_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], command: str, found: str | None
) -> None:
    monkeypatch.setattr("sys.argv", ["manage.py", command])
    database(settings, **config)
    assert ids() == ({found} if found else set())


def test_the_queue_librarys_own_pages_are_not_in_the_console(monkeypatch: pytest.MonkeyPatch) -> None:
    for model in (Failure, OrmQ, Schedule, Success):
        assert not admin.site.is_registered(model)
    monkeypatch.setitem(admin.site._registry, OrmQ, admin.ModelAdmin(OrmQ, admin.site))
    assert ids() == {"jobs.E012"}


def test_a_schedule_without_its_kind_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "SCHEDULES", (schedules.ScheduleSpec("odd", "odd", "no_such_kind", "0 5 * * *"),))
    (message,) = checks.check_schedules(None)
    assert message.id == "jobs.W001" and "no_such_kind" in message.msg


def test_workers_share_the_cores_and_an_operator_may_say_otherwise(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert child.child_environment()["OMP_NUM_THREADS"] == "4"
    training(settings, workers=3)
    assert child.threads_per_child() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})
    assert child.threads_per_child() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    environment = child.child_environment()
    assert (environment["OMP_NUM_THREADS"], environment["AIVO_PROCESS_ROLE"]) == ("7", "worker")


def test_a_worker_process_is_told_its_queue_and_its_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("Q_CLUSTER_NAME", "training")
    assert "Q_CLUSTER_NAME" not in supervision.worker_environment("default")
    environment = supervision.worker_environment("training")
    assert (environment["Q_CLUSTER_NAME"], environment["AIVO_PROCESS_ROLE"]) == ("training", "worker")


# --- looking at a queue from outside ---


@pytest.fixture
def old_job(db: None) -> Job:
    kinds.register_kinds()
    job = services.enqueue(kind="follow", params={})
    Job.objects.update(sent_at=timezone.now() - timedelta(seconds=500))
    return job


def worker(job: Job, *, pid: int, seen: float = 0.0) -> None:
    last = timezone.now() - timedelta(seconds=seen)
    host = socket.gethostname()
    WorkerHeartbeat.objects.create(host=host, pid=pid, queue="default", version="1", current_job=job, last_seen_at=last)


@pytest.mark.django_db
def test_an_empty_queue_is_not_stuck() -> None:
    state = supervision.queue_state("default")
    assert (state.oldest_seconds, state.busy_workers, state.last_taken_seconds) == (0.0, 0, None)
    assert not state.stuck(10)


def test_a_queue_is_stuck_when_messages_grow_old_and_nobody_works(old_job: Job) -> None:
    state = supervision.queue_state("default")
    assert 499 < state.oldest_seconds < 520
    assert state.stuck(100) and not state.stuck(1000)
    assert not supervision.queue_state("training").stuck(1)


def test_a_fetched_message_grows_old_too(old_job: Job) -> None:
    OrmQ.objects.update(lock=timezone.now() + timedelta(hours=20))
    assert supervision.queue_state("default").stuck(100)


def test_a_queue_with_a_worker_at_work_is_not_stuck(old_job: Job) -> None:
    worker(old_job, pid=os.getpid())
    assert not supervision.queue_state("default").stuck(100)
    assert not supervision.queue_state("default", group=os.getpgid(0)).stuck(100)
    assert supervision.queue_state("default", group=1).stuck(100), "another group's worker"


def test_a_silent_worker_does_not_count(old_job: Job) -> None:
    worker(old_job, pid=os.getpid(), seen=100)
    assert supervision.queue_state("default").stuck(100)


def test_a_queue_that_moves_is_not_stuck(old_job: Job) -> None:
    Job.objects.create(kind="follow", state=JobState.SUCCEEDED, started_at=timezone.now(), finished_at=timezone.now())
    assert not supervision.queue_state("default").stuck(100)


def test_a_job_without_a_message_is_the_janitors_not_the_watchdogs(old_job: Job) -> None:
    OrmQ.objects.all().delete()
    assert not supervision.queue_state("default").stuck(100)


@pytest.mark.django_db
def test_a_schedules_message_counts_when_it_is_due() -> None:
    from aivo_site.jobs.queueing import async_task

    async_task(schedules.RUN_SCHEDULE, "janitor", cluster="aivo")
    OrmQ.objects.update(lock=timezone.now() - timedelta(seconds=300))
    assert supervision.queue_state("default").stuck(100)
    OrmQ.objects.update(lock=timezone.now() + timedelta(seconds=300))
    assert not supervision.queue_state("default").stuck(100)


def test_one_look_of_the_watchdog_tells_and_exits_1_when_stuck(old_job: Job) -> None:
    out = io.StringIO()
    with pytest.raises(SystemExit) as end:
        call_command("watchdog", "--once", "--max-age", "100", "--json", stdout=out)
    assert end.value.code == 1
    told = json.loads(out.getvalue())
    assert (told["queue"], told["stuck"], told["busy_workers"]) == ("default", True, 0)
    call_command("watchdog", "--once", "--max-age", "10000", "--json", stdout=io.StringIO())


@pytest.mark.parametrize("arguments", [("--max-age", "0"), ("--queue", "nope"), ("--interval", "-1")])
def test_wrong_arguments_of_the_watchdog_are_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(CommandError):
        call_command("watchdog", *arguments)


@pytest.mark.django_db
def test_run_job_runs_a_waiting_job_and_refuses_others() -> None:
    kinds.register_kinds()
    job = services.enqueue(kind="follow_training", params={})
    out = io.StringIO()
    call_command("run_job", str(job.id), "--json", stdout=out)
    assert json.loads(out.getvalue())["state"] == JobState.SUCCEEDED
    with pytest.raises(SystemExit) as end:
        call_command("run_job", str(job.id), stdout=io.StringIO(), stderr=io.StringIO())
    assert end.value.code == 1
    with pytest.raises(CommandError, match="no job"):
        call_command("run_job", "6f1f0b3c-6a0f-4a53-9a77-0d6f3f0f0a01")
    skipped = services.enqueue(kind="follow", params={"then": "skip"})
    with pytest.raises(SystemExit) as end:
        call_command("run_job", str(skipped.id), stdout=io.StringIO(), stderr=io.StringIO())
    assert end.value.code == 3
