"""Jobs in one process: putting them in a queue, running them here, leases, endings, cancelling and trying again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.conf import Settings
from django.contrib.auth.models import User
from django.db import connection, transaction
from django.utils import timezone
from django_q.models import OrmQ

from aivo_site.errors import DomainError, Skipped
from aivo_site.jobs import lease, queueing, registry, runner, services
from aivo_site.jobs.context import JobContext
from aivo_site.jobs.errors import (
    BadParams,
    IdempotencyConflict,
    JobCancelled,
    JobFinished,
    JobNotFinished,
    NotClaimable,
    UnknownKind,
    UnknownQueue,
)
from aivo_site.jobs.execution import Interrupted
from aivo_site.jobs.lease import Ending
from aivo_site.jobs.models import Job, JobState, Queue
from aivo_site.jobs.registry import JobKind
from tests.site.job_kinds import kinds

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def known_kinds() -> None:
    kinds.register_kinds()


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[JobContext], Any]], str]:
    """Makes a function the handler of a kind that lasts as long as the test."""

    def use(run: Callable[[JobContext], Any], **options: Any) -> str:
        monkeypatch.setitem(registry._KINDS, "probe", JobKind(name="probe", label="probe", run=run, **options))
        return "probe"

    return use


def fresh(job: Job) -> Job:
    return Job.objects.get(id=job.id)


def claimed(kind: str = "follow") -> tuple[Job, UUID]:
    token = uuid4()
    job = lease.claim(services.enqueue(kind=kind, params={}).id, token=token)
    assert job is not None
    return job, token


# --- putting in a queue ---


def test_enqueue_writes_the_row_and_a_message_with_nothing_but_its_id() -> None:
    user = User.objects.create(username="anna")
    job = services.enqueue(kind="follow_training", params={"learner": uuid4()}, requested_by=user)
    assert (job.state, job.queue, job.requested_by, job.starts) == (JobState.QUEUED, Queue.TRAINING, user, 0)
    assert job.sent_at is not None
    row = OrmQ.objects.get()
    assert row.key == "training"
    assert (row.task["func"], row.task["args"], row.task["kwargs"]) == (queueing.RUN_JOB, (str(job.id),), {})


def test_row_and_message_vanish_with_the_callers_transaction() -> None:
    with pytest.raises(RuntimeError), transaction.atomic():
        services.enqueue(kind="follow", params={})
        raise RuntimeError
    assert (Job.objects.count(), OrmQ.objects.count()) == (0, 0)


@pytest.mark.django_db(transaction=True)
def test_with_redis_the_message_goes_after_the_commit(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    sent: list[str] = []
    monkeypatch.setattr(queueing, "async_task", lambda func, job_id, **options: sent.append(job_id))
    settings.Q_CLUSTER = {**settings.Q_CLUSTER, "orm": None, "redis": {"host": "127.0.0.1"}}
    with transaction.atomic():
        job = services.enqueue(kind="follow", params={})
        assert sent == [] and job.sent_at is None
    assert sent == [str(job.id)] and fresh(job).sent_at is not None


def test_the_same_idempotency_key_gives_the_same_job() -> None:
    first = services.enqueue(kind="follow", params={"a": 1}, idempotency_key="k")
    again = services.enqueue(kind="follow", params={"a": 1}, idempotency_key="k")
    assert first.id == again.id and OrmQ.objects.count() == 1
    for kind, params in (("follow", {"a": 2}), ("follow_child", {"a": 1})):
        with pytest.raises(IdempotencyConflict):
            services.enqueue(kind=kind, params=params, idempotency_key="k")


@pytest.mark.parametrize("params", [{"x": object()}, {"x": float("nan")}, [1], "text"])
def test_params_that_are_no_json_object_are_refused(params: Any) -> None:
    with pytest.raises(BadParams, match="params must be"):
        services.enqueue(kind="follow", params=params)
    assert Job.objects.count() == 0


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    for attempt in (services.enqueue, services.run_inline):
        with pytest.raises(UnknownKind, match=r"follow_child.*not 'nope'"):
            attempt(kind="nope", params={})
    assert Job.objects.count() == 0


def test_a_queue_that_nobody_serves_is_refused(handler: Any, settings: Settings) -> None:
    with pytest.raises(UnknownQueue, match="default, training"):
        services.enqueue(kind=handler(lambda context: {}, queue="trainig"), params={})
    assert Job.objects.count() == 0


def test_two_kinds_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two job kinds"):
        registry.register(JobKind(name="follow", label="other", run=lambda context: {}))
    with pytest.raises(ValueError, match="max_starts"):
        registry.register(JobKind(name="zero", label="zero", run=lambda context: {}, max_starts=0))


# --- running here ---


def test_run_inline_returns_the_finished_row() -> None:
    seen: list[tuple[int, int, str]] = []
    job = services.run_inline(kind="follow", params={"steps": 2}, progress=lambda *step: seen.append(step))
    assert (job.state, job.queue, job.starts, job.progress_done) == (JobState.SUCCEEDED, Queue.INLINE, 1, 2)
    assert job.result is not None and job.result["starts"] == 1
    assert job.finished_at is not None and job.started_at is not None and job.lease_expires_at is None
    assert [line.message for line in job.log_lines.all()] == ["all steps done"]
    assert seen == [(0, 2, "step 0"), (1, 2, "step 1"), (2, 2, "all steps")]
    assert OrmQ.objects.count() == 0


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (DomainError("no", code="refused_so"), JobState.FAILED, "refused_so"),
        (Skipped("no", code="nothing_new"), JobState.SKIPPED, "nothing_new"),
        (JobCancelled("no"), JobState.CANCELLED, "cancelled"),
        (ZeroDivisionError("no"), JobState.FAILED, "unexpected_error"),
    ],
)
def test_what_the_handler_raises_is_recorded_and_raised_again(handler: Any, error: Exception, state: JobState, code: str) -> None:
    def run(context: JobContext) -> Mapping[str, Any]:
        raise error

    with pytest.raises(type(error)):
        services.run_inline(kind=handler(run), params={})
    job = Job.objects.get()
    assert (job.state, job.error_code) == (state, code)
    assert job.error_message.endswith("no")
    assert ("Traceback" in job.error_traceback) == (code == "unexpected_error")


def test_a_refusal_keeps_its_partial_result(handler: Any) -> None:
    def run(context: JobContext) -> Mapping[str, Any]:
        error = Skipped("too few", code="too_few")
        error.result = {"eligible": 3}  # type: ignore[attr-defined]
        raise error

    with pytest.raises(Skipped):
        services.run_inline(kind=handler(run), params={})
    assert Job.objects.get().result == {"eligible": 3}


@pytest.mark.parametrize("result", [None, [1], {"x": float("inf")}, {"x": object()}])
def test_a_result_that_is_no_json_object_is_a_failure(handler: Any, result: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        services.run_inline(kind=handler(lambda context: result), params={})
    assert (Job.objects.get().state, Job.objects.get().error_code) == (JobState.FAILED, "unexpected_error")


@pytest.mark.parametrize("signal", [KeyboardInterrupt, Interrupted])
def test_an_interrupted_command_leaves_a_cancelled_job(handler: Any, signal: type[BaseException]) -> None:
    def run(context: JobContext) -> Mapping[str, Any]:
        raise signal

    with pytest.raises(signal):
        services.run_inline(kind=handler(run), params={})
    assert (Job.objects.get().state, Job.objects.get().error_code) == (JobState.CANCELLED, "interrupted")


def test_progress_is_kept_within_what_the_table_holds(handler: Any) -> None:
    def run(context: JobContext) -> Mapping[str, Any]:
        context.progress(7, 3, "x" * 500)
        return {}

    job = services.run_inline(kind=handler(run), params={})
    assert (job.progress_done, job.progress_total, len(job.progress_message)) == (7, 7, 200)


@pytest.mark.django_db(transaction=True)
def test_reports_of_a_run_are_visible_even_while_the_handler_is_in_a_transaction(handler: Any, settings: Settings) -> None:
    settings.JOB_LEASE_SECONDS = 2
    seen: list[tuple[int, int, bool]] = []

    def run(context: JobContext) -> Mapping[str, Any]:
        before = fresh(context.job).lease_expires_at
        context.progress(1, 2, "half way")
        context.log("a line", "WARNING")
        until = time.monotonic() + 5
        while time.monotonic() < until and (fresh(context.job).lease_expires_at == before or not seen_line()):
            time.sleep(0.05)
        row = fresh(context.job)
        seen.append((row.progress_done, row.log_lines.count(), row.lease_expires_at > before))
        with pytest.raises(RuntimeError), transaction.atomic():
            context.progress(2, 2, "in vain")
            context.log("said all the same")
            raise RuntimeError
        return {}

    def seen_line() -> bool:
        return Job.objects.get().log_lines.exists()

    job = services.run_inline(kind=handler(run), params={})
    assert seen == [(1, 1, True)]
    assert [line.message for line in job.log_lines.all()] == ["a line", "said all the same"]
    assert (job.progress_done, job.progress_message) == (2, "in vain")


@pytest.mark.django_db(transaction=True)
def test_progress_is_written_at_most_twice_a_second(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[str] = []
    reports: list[Any] = []
    renew = lease.renew

    def counted(job_id: UUID, **options: Any) -> bool:
        reports.append(options["progress"])
        return renew(job_id, **options)

    monkeypatch.setattr(lease, "renew", counted)

    def run(context: JobContext) -> Mapping[str, Any]:
        def count(execute: Any, sql: str, params: Any, many: bool, extra: Any) -> Any:
            writes.append(sql)
            return execute(sql, params, many, extra)

        until = time.monotonic() + 1.2
        steps = 0
        with connection.execute_wrapper(count):
            while time.monotonic() < until:
                steps += 1
                context.progress(steps, 10**9)
                context.should_stop()
        return {"steps": steps}

    job = services.run_inline(kind=handler(run), params={})
    assert job.result is not None and job.result["steps"] > 1000
    assert writes == [], "the handler's own connection wrote nothing"
    assert 1 <= len(reports) <= 3
    assert job.progress_done == job.result["steps"]


@pytest.mark.django_db(transaction=True)
def test_a_running_job_sees_the_wish_to_cancel(handler: Any) -> None:
    def run(context: JobContext) -> Mapping[str, Any]:
        services.request_cancel(job=Job.objects.get(), actor="anna")
        until = time.monotonic() + 5
        while time.monotonic() < until:
            context.check_cancelled()
            time.sleep(0.02)
        return {}

    with pytest.raises(JobCancelled):
        services.run_inline(kind=handler(run), params={})
    assert Job.objects.get().state == JobState.CANCELLED


@pytest.mark.django_db(transaction=True)
def test_a_run_that_lost_its_lease_stops_and_changes_nothing(handler: Any) -> None:
    other = uuid4()

    def run(context: JobContext) -> Mapping[str, Any]:
        Job.objects.update(owner=other)
        until = time.monotonic() + 5
        while time.monotonic() < until and not context.should_stop():
            time.sleep(0.02)
        return {"mine": True}

    services.run_inline(kind=handler(run), params={})
    job = Job.objects.get()
    assert (job.state, job.owner, job.result) == (JobState.RUNNING, other, None)


# --- leases ---


def test_a_job_is_claimed_once() -> None:
    job, token = claimed()
    assert lease.claim(job.id, token=uuid4()) is None
    assert (fresh(job).starts, fresh(job).owner) == (1, token)
    assert lease.claim(uuid4(), token=uuid4()) is None


@pytest.mark.django_db(transaction=True)
def test_of_many_claims_at_one_moment_one_wins() -> None:
    job = services.enqueue(kind="follow", params={})
    won: list[bool] = []

    def attempt() -> None:
        try:
            won.append(lease.claim(job.id, token=uuid4()) is not None)
        finally:
            connection.close()

    threads = [threading.Thread(target=attempt) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(won) == [False] * 5 + [True]
    assert fresh(job).starts == 1


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.SKIPPED])
def test_an_ended_job_never_changes(state: JobState) -> None:
    job, token = claimed()
    assert lease.finish(job.id, token=token, ending=Ending(state, result={"n": 1}))
    before = Job.objects.values().get(id=job.id)
    assert not lease.finish(job.id, token=token, ending=Ending(JobState.FAILED, error_code="late"))
    assert not lease.renew(job.id, token=token)
    assert not lease.release(job, count_start=True)
    assert lease.claim(job.id, token=uuid4()) is None
    assert runner.run_queued_job(str(job.id)) == "not claimed"
    if state != JobState.CANCELLED:
        with pytest.raises(JobFinished):
            services.request_cancel(job=job, actor="anna")
    assert Job.objects.values().get(id=job.id) == before


def test_only_the_owner_may_renew_and_finish() -> None:
    job, _token = claimed()
    stranger = uuid4()
    assert not lease.renew(job.id, token=stranger)
    assert not lease.finish(job.id, token=stranger, ending=Ending(JobState.SUCCEEDED))
    assert fresh(job).state == JobState.RUNNING


# --- messages ---


def test_a_message_runs_its_job_and_a_second_one_does_nothing() -> None:
    job = services.enqueue(kind="follow", params={})
    assert runner.run_queued_job(str(job.id)) == "done"
    assert runner.run_queued_job(str(job.id)) == "not claimed"
    assert (fresh(job).state, fresh(job).starts) == (JobState.SUCCEEDED, 1)


def test_a_message_whose_kind_is_unknown_here_fails_its_job(handler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = services.enqueue(kind=handler(lambda context: {}), params={})
    monkeypatch.delitem(registry._KINDS, "probe")
    runner.run_queued_job(str(job.id))
    assert (fresh(job).state, fresh(job).error_code) == (JobState.FAILED, "unknown_job_kind")


@pytest.mark.django_db(transaction=True)
def test_the_queues_timeout_fails_the_job_and_not_the_worker(handler: Any) -> None:
    def run(context: JobContext) -> Mapping[str, Any]:
        raise queueing.QueueTimeout("too long")

    job = services.enqueue(kind=handler(run), params={})
    assert runner.run_queued_job(str(job.id)) == "timeout"
    assert (fresh(job).state, fresh(job).error_code) == (JobState.FAILED, "timeout")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("cancel", [False, True])
def test_a_worker_told_to_stop_hands_its_job_back_unless_it_was_cancelled(handler: Any, cancel: bool) -> None:
    def run(context: JobContext) -> Mapping[str, Any]:
        if cancel:
            services.request_cancel(job=context.job, actor="anna")
        raise Interrupted

    job = services.enqueue(kind=handler(run), params={})
    OrmQ.objects.all().delete()
    with pytest.raises(SystemExit):
        runner.run_queued_job(str(job.id))
    row = fresh(job)
    assert (row.state, row.starts) == ((JobState.CANCELLED, 1) if cancel else (JobState.QUEUED, 0))
    assert OrmQ.objects.count() == (0 if cancel else 1)


def test_children_end_before_the_queue_would_end_their_worker() -> None:
    for queue in (Queue.DEFAULT, Queue.TRAINING):
        timeout = queueing.queue_options(queue)["timeout"]
        assert timeout - 60 <= runner.child_deadline(queue) < timeout


# --- stopping, trying again ---


def test_a_waiting_job_is_cancelled_at_once_and_never_runs() -> None:
    job = services.enqueue(kind="follow", params={})
    assert services.request_cancel(job=job, actor=User(username="anna")).state == JobState.CANCELLED
    assert services.request_cancel(job=job, actor="anna").state == JobState.CANCELLED
    assert runner.run_queued_job(str(job.id)) == "not claimed"
    assert [line.message for line in job.log_lines.all()] == ["Cancel asked for by anna."]


def test_a_job_that_did_not_succeed_is_tried_again_as_a_new_one() -> None:
    job = services.enqueue(kind="follow", params={"steps": 3})
    with pytest.raises(JobNotFinished):
        services.retry(job=job)
    services.request_cancel(job=job, actor="anna")
    again = services.retry(job=job)
    assert (again.kind, again.params, again.state) == (job.kind, job.params, JobState.QUEUED)
    assert again.id != job.id and services.retry(job=job).id == again.id
    done = services.run_inline(kind="follow", params={})
    with pytest.raises(JobFinished):
        services.retry(job=done)


def test_only_a_waiting_job_is_run_by_hand() -> None:
    job = services.enqueue(kind="follow_training", params={})
    assert services.run_here(job=job).state == JobState.SUCCEEDED
    with pytest.raises(NotClaimable):
        services.run_here(job=job)


def test_times_of_a_lease_come_from_the_settings(settings: Settings) -> None:
    settings.JOB_LEASE_SECONDS = 5
    before: datetime = timezone.now()
    job, _token = claimed()
    assert job.lease_expires_at is not None
    assert before + timedelta(seconds=5) <= job.lease_expires_at <= timezone.now() + timedelta(seconds=5)
