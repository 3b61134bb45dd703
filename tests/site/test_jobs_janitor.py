"""The janitor: what deaths and lost messages leave behind."""

from __future__ import annotations

import io
import json
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from django.core.management import call_command
from django.db import connection
from django.utils import timezone
from django_q.models import OrmQ, Task

from aivo_site.jobs import janitor, lease, queueing, registry, services
from aivo_site.jobs.lease import Ending
from aivo_site.jobs.models import Job, JobState, Queue, ScheduleRun, WorkerHeartbeat
from tests.site.job_kinds import kinds

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def known_kinds() -> None:
    kinds.register_kinds()


def running(kind: str = "follow", *, expired: bool = True, starts: int = 1, **columns: Any) -> Job:
    job = services.enqueue(kind=kind, params={})
    OrmQ.objects.all().delete()
    lease.claim(job.id, token=uuid4())
    end = timezone.now() + timedelta(seconds=-1 if expired else 60)
    Job.objects.filter(id=job.id).update(lease_expires_at=end, starts=starts, **columns)
    return Job.objects.get(id=job.id)


def waiting(*, age: float, kind: str = "follow", message: bool = True) -> Job:
    job = services.enqueue(kind=kind, params={})
    if not message:
        OrmQ.objects.all().delete()
    Job.objects.filter(id=job.id).update(sent_at=timezone.now() - timedelta(seconds=age))
    return job


def fresh(job: Job) -> Job:
    return Job.objects.get(id=job.id)


def test_a_run_whose_lease_lasts_is_left_alone() -> None:
    job = running(expired=False)
    report = janitor.sweep()
    assert (report.requeued, report.failed) == (0, 0)
    assert fresh(job).owner == job.owner


def test_a_lost_run_waits_again_with_a_new_message() -> None:
    job = running("follow_twice", starts=1)
    assert janitor.sweep().requeued == 1
    row = fresh(job)
    assert (row.state, row.owner, row.lease_expires_at, row.starts) == (JobState.QUEUED, None, None, 1)
    assert [message.job_id for message in queueing.waiting_messages("default")] == [job.id]
    assert janitor.sweep().requeued == 0


def test_a_job_that_was_begun_too_often_fails() -> None:
    job = running("follow_twice", starts=2)
    assert janitor.sweep().failed == 1
    assert (fresh(job).state, fresh(job).error_code) == (JobState.FAILED, "lease_expired")
    assert OrmQ.objects.count() == 0


def test_a_lost_run_in_a_command_fails_at_once() -> None:
    job = running(queue=Queue.INLINE)
    janitor.sweep()
    assert (fresh(job).state, fresh(job).error_code) == (JobState.FAILED, "lease_expired")


def test_a_lost_run_that_was_to_be_cancelled_is_cancelled() -> None:
    job = running(cancel_requested_at=timezone.now())
    assert janitor.sweep().cancelled == 1
    assert fresh(job).state == JobState.CANCELLED


def test_a_lost_run_of_a_kind_that_is_gone_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    job = running()
    monkeypatch.delitem(registry._KINDS, "follow")
    assert janitor.sweep().failed == 1
    assert fresh(job).error_code == "lease_expired"


def test_a_run_that_came_back_in_time_keeps_its_job() -> None:
    seen = running()
    assert seen.owner is not None
    assert lease.renew(seen.id, token=seen.owner)
    assert not lease.finish_expired(seen, ending=Ending(JobState.FAILED))
    assert not lease.release(seen, count_start=True)
    assert fresh(seen).state == JobState.RUNNING


def test_a_lost_message_is_sent_again_once() -> None:
    lost = waiting(age=1000, message=False)
    assert janitor.sweep().resent == 1
    assert [message.job_id for message in queueing.waiting_messages("default")] == [lost.id]
    assert janitor.sweep().resent == 0


def test_a_message_that_waits_or_is_young_is_not_sent_again() -> None:
    waiting(age=1, message=False)
    waiting(age=1000)
    assert janitor.sweep().resent == 0


def test_a_row_that_was_never_sent_is_sent() -> None:
    job = services.enqueue(kind="follow", params={})
    OrmQ.objects.all().delete()
    with connection.cursor() as cursor:
        cursor.execute("UPDATE jobs_job SET sent_at = NULL, created_at = %s", [timezone.now() - timedelta(days=1)])
    assert janitor.sweep().resent == 1
    assert fresh(job).sent_at is not None


def test_a_message_that_cannot_be_read_counts_as_lost() -> None:
    job = waiting(age=1000)
    OrmQ.objects.update(payload="no message")
    assert janitor.sweep().resent == 1
    assert [message.job_id for message in queueing.waiting_messages("default")] == [job.id]


@pytest.mark.parametrize("busy", [False, True])
def test_a_message_that_a_dead_worker_fetched_is_released_when_nobody_works(busy: bool) -> None:
    if busy:
        running(expired=False)
    waiting(age=1000)
    OrmQ.objects.update(lock=timezone.now() + timedelta(hours=20))
    report = janitor.sweep()
    assert (report.released, report.resent) == (0 if busy else 1, 0)
    assert (OrmQ.objects.get().lock <= timezone.now()) == (not busy)


def test_a_starting_worker_takes_over_what_its_predecessor_had_fetched() -> None:
    busy = running(expired=False)
    queueing.send(busy)
    job = waiting(age=0)
    other_queue = services.enqueue(kind="follow_training", params={})
    OrmQ.objects.update(lock=timezone.now() + timedelta(hours=20))
    assert janitor.release_taken("default") == 1
    due = {message.job_id: message.due_at <= timezone.now() for queue in Queue.values[:2] for message in _messages(queue)}
    assert due == {busy.id: False, job.id: True, other_queue.id: False}


def _messages(queue: str) -> list[queueing.Message]:
    return queueing.waiting_messages(queue)


def test_old_rows_go_and_young_ones_stay() -> None:
    now = timezone.now()

    def ended(kind: str, days: float, state: JobState = JobState.SUCCEEDED) -> Job:
        return Job.objects.create(kind=kind, state=state, finished_at=now - timedelta(days=days))

    gone = [ended(janitor.JANITOR_KIND, 2), ended("follow", 400)]
    kept = [ended(janitor.JANITOR_KIND, 2, JobState.FAILED), ended("follow", 300), ended(janitor.JANITOR_KIND, 0.5)]
    WorkerHeartbeat.objects.create(host="h", pid=1, queue="default", version="1", last_seen_at=now - timedelta(hours=2))
    WorkerHeartbeat.objects.create(host="h", pid=2, queue="default", version="1", last_seen_at=now)
    ScheduleRun.objects.create(schedule="weekly", local_date=now.date(), slot="")
    Task.objects.create(id="1", name="x", func="f", started=now, stopped=now - timedelta(days=31), success=False)
    Task.objects.create(id="2", name="y", func="f", started=now, stopped=now, success=False)
    assert janitor.sweep().pruned == 4
    assert set(Job.objects.values_list("id", flat=True)) == {job.id for job in kept}
    assert not Job.objects.filter(id__in=[job.id for job in gone]).exists()
    assert WorkerHeartbeat.objects.get().pid == 2
    assert ScheduleRun.objects.count() == 1
    assert Task.objects.get().id == "2"


def test_the_command_and_the_job_say_what_they_did() -> None:
    running("follow_twice", starts=2)
    out = io.StringIO()
    call_command("janitor", "--json", stdout=out)
    expected = {"requeued": 0, "failed": 1, "cancelled": 0, "resent": 0, "released": 0, "pruned": 0}
    assert json.loads(out.getvalue()) == expected
    assert services.run_inline(kind=janitor.JANITOR_KIND, params={}).result == {**expected, "failed": 0}
