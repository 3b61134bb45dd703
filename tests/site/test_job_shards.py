"""Jobs done in shards, in one process: planning, claiming, whose shard it is, failures, helpers, and the console."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from django.conf import Settings
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone
from django_q.models import OrmQ

from aivo_site.errors import DomainError
from aivo_site.jobs import janitor, lease, queueing, registry, services, shard_helpers, shards
from aivo_site.jobs.errors import BadParams, JobCancelled, ShardFailed, ShardStopped
from aivo_site.jobs.execution import Interrupted
from aivo_site.jobs.lease import Ending
from aivo_site.jobs.models import Job, JobShard, JobState, Queue, ShardState, WorkerHeartbeat
from aivo_site.jobs.registry import JobKind
from aivo_site.jobs.shard_context import ShardContext, ShardPlan
from aivo_site.jobs.shards import MAX_STARTS
from tests.site.job_kinds import kinds

pytestmark = pytest.mark.django_db

PHASE = "square"
HELPER = shard_helpers.HELPER_KIND


@pytest.fixture(autouse=True)
def known_kinds() -> None:
    kinds.register_kinds()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "POLL_SECONDS", 0.01)


def running(kind: str = "share", **params: Any) -> Job:
    """A job that a run has claimed."""
    job = lease.claim(services.enqueue(kind=kind, params=params).id, token=uuid4())
    assert job is not None
    return job


def planned(parent: Job, count: int = 4) -> list[JobShard]:
    return shards.plan(parent=parent, phase=PHASE, plans=[ShardPlan({"number": n}) for n in range(count)])


def states(parent: Job) -> str:
    """First letters of the shards' states in order."""
    return "".join(state[0] for state in parent.shards.order_by("index").values_list("state", flat=True))


def claim(parent: Job, worker: Job) -> JobShard:
    shard = shards.claim_next(parent=parent, phase=PHASE, worker=worker)
    assert shard is not None
    return shard


def died(job: Job) -> None:
    """As after kill -9: nobody renews the lease any more."""
    Job.objects.filter(pk=job.pk).update(lease_expires_at=timezone.now() - timedelta(seconds=1))


def number_of(context: ShardContext) -> Mapping[str, Any]:
    return {"number": context.params["number"]}


def never() -> bool:
    return False


def work(parent: Job, worker: Job, handler: Callable[[ShardContext], Mapping[str, Any]] = number_of, **options: Any) -> Any:
    return shards.work(
        parent=parent, phase=PHASE, handler=handler, worker=worker, should_stop=options.pop("should_stop", never), **options
    )


# --- planning and claiming ---


def test_a_phase_is_planned_once() -> None:
    parent = running()
    first = planned(parent)
    assert [shard.index for shard in first] == [0, 1, 2, 3]
    assert planned(parent) == first
    assert shards.plan(parent=parent, phase=PHASE, plans=[ShardPlan({"number": 9})]) == first
    assert shards.planned(parent=parent, phase="other") == []


def test_params_must_be_plain() -> None:
    with pytest.raises(TypeError):
        shards.plan(parent=running(), phase=PHASE, plans=[ShardPlan({"x": object()})])
    assert JobShard.objects.count() == 0


def test_every_shard_is_claimed_once_in_order_by_whoever_asks() -> None:
    parent, helper = running(), running(HELPER)
    planned(parent, 3)
    held = [claim(parent, worker) for worker in (parent, helper, parent)]
    assert [shard.index for shard in held] == [0, 1, 2]
    assert [(shard.worker_job_id, shard.holder, shard.starts) for shard in held] == [
        (worker.id, worker.owner, 1) for worker in (parent, helper, parent)
    ]
    assert shards.claim_next(parent=parent, phase=PHASE, worker=helper) is None


def test_a_claim_that_lost_the_race_takes_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, helper = running(), running(HELPER)
    planned(parent, 2)
    real = shards._update

    def late(shard: JobShard, **values: Any) -> bool:
        monkeypatch.setattr(shards, "_update", real)
        claim(parent, parent)
        return real(shard, **values)

    monkeypatch.setattr(shards, "_update", late)
    assert claim(parent, helper).index == 1
    assert states(parent) == "RR"


@pytest.mark.django_db(transaction=True)
def test_workers_that_claim_at_the_same_moment_never_get_the_same_shard() -> None:
    parent = running()
    planned(parent, 24)
    taken: list[int] = []

    def take() -> None:
        try:
            while (shard := shards.claim_next(parent=parent, phase=PHASE, worker=parent)) is not None:
                taken.append(shard.index)
        finally:
            connection.close()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(24))


def ended(job: Job) -> None:
    assert lease.finish(job.pk, token=_token(job), ending=Ending(JobState.FAILED, error_code="child_died"))


def begun_anew(job: Job) -> None:
    """The job runs again, as another run: it lives, but it is not the one that had the shard."""
    died(job)
    assert janitor.sweep().requeued == 1
    assert lease.claim(job.pk, token=uuid4()) is not None


def _token(job: Job) -> Any:
    assert job.owner is not None
    return job.owner


@pytest.mark.parametrize("death", [died, ended, begun_anew], ids=["lease ran out", "job ended", "job runs anew"])
def test_a_shard_of_a_dead_run_is_claimed_again_and_its_late_result_is_dropped(death: Callable[[Job], None]) -> None:
    parent, helper = running(), running("follow")
    planned(parent, 1)
    lost = claim(parent, helper)
    assert shards.claim_next(parent=parent, phase=PHASE, worker=parent) is None
    death(helper)
    again = claim(parent, parent)
    assert (again.pk, again.starts, again.worker_job_id) == (lost.pk, 2, parent.id)
    assert not shards.finish(lost, {"number": "late"})
    assert shards.finish(again, {"number": 0})
    assert shards.results(parent=parent, phase=PHASE) == [{"number": 0}]


# --- working ---


def test_the_parent_alone_does_everything_and_says_how_far_it_is() -> None:
    steps: list[tuple[int, int]] = []
    job = services.run_inline(kind="share", params={"shards": 5}, progress=lambda done, total, _text: steps.append((done, total)))
    assert job.result is not None and job.result["squares"] == [0, 1, 4, 9, 16]
    assert states(job) == "DDDDD"
    assert steps[-1] == (10, 10) and steps == sorted(steps)


def test_one_shard_needs_no_rows() -> None:
    job = services.run_inline(kind="share", params={"shards": 1})
    assert job.result is not None and job.result["squares"] == [0]
    assert JobShard.objects.count() == 0 and Job.objects.count() == 1


def test_without_a_job_the_same_work_is_done_here() -> None:
    plans = [ShardPlan({"number": n}, size=3) for n in range(4)]
    steps: list[tuple[int, int]] = []

    def half(context: ShardContext) -> Mapping[str, Any]:
        context.progress(2)
        return number_of(context)

    found = shard_helpers.do_in_shards(
        job=None, phase=PHASE, make=lambda: plans, handler=half, should_stop=never, progress=lambda *step: steps.append(step)
    )
    assert found == [{"number": n} for n in range(4)]
    assert steps == [(2, 12), (3, 12), (5, 12), (6, 12), (8, 12), (9, 12), (11, 12), (12, 12)]


def test_a_parent_that_runs_again_does_only_what_is_left() -> None:
    parent = running()
    planned(parent)
    shards.finish(claim(parent, parent), {"number": "kept"})
    done: list[int] = []

    def handler(context: ShardContext) -> Mapping[str, Any]:
        done.append(context.params["number"])
        return number_of(context)

    assert work(parent, parent, handler).shards == 3
    assert done == [1, 2, 3]
    assert shards.results(parent=parent, phase=PHASE)[0] == {"number": "kept"}


def test_the_parent_waits_for_what_a_living_helper_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, helper = running(), running(HELPER)
    planned(parent, 2)
    held = claim(parent, helper)
    waits = []

    def sleep(_seconds: float) -> None:
        waits.append(states(parent))
        if len(waits) == 3:
            assert shards.finish(held, {"number": 0})

    monkeypatch.setattr(shards.time, "sleep", sleep)
    assert work(parent, parent).shards == 1
    assert waits == ["RD"] * 3 and states(parent) == "DD"


def test_the_parent_takes_over_what_a_dead_helper_held(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, helper = running(), running(HELPER)
    planned(parent, 2)
    claim(parent, helper)
    monkeypatch.setattr(shards.time, "sleep", lambda _seconds: died(helper))
    assert work(parent, parent).shards == 2
    assert states(parent) == "DD"


def test_a_waiting_parent_stops_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, helper = running(), running(HELPER)
    planned(parent, 1)
    claim(parent, helper)
    asked = iter([False, False, True])
    worked = work(parent, parent, should_stop=lambda: next(asked))
    assert worked.stopped and states(parent) == "R"


def test_a_helper_does_not_wait() -> None:
    parent, helper = running(), running(HELPER)
    planned(parent, 2)
    claim(parent, parent)
    worked = work(parent, helper)
    assert (worked.shards, worked.stopped, states(parent)) == (1, False, "RD")


@pytest.mark.parametrize("error", [ShardStopped(), JobCancelled("asked to stop")])
def test_a_handler_that_stops_early_leaves_its_shard_to_others(error: Exception) -> None:
    parent = running()
    planned(parent, 2)

    def stopping(_context: ShardContext) -> Mapping[str, Any]:
        raise error

    assert work(parent, parent, stopping).stopped
    assert states(parent) == "WW" and set(parent.shards.values_list("starts", flat=True)) == {0}


@pytest.mark.django_db(transaction=True)
def test_a_worker_that_is_told_to_end_hands_its_shard_back() -> None:
    parent = running()
    planned(parent, 2)

    def interrupted(_context: ShardContext) -> Mapping[str, Any]:
        raise Interrupted

    with pytest.raises(Interrupted):
        work(parent, parent, interrupted)
    shard = parent.shards.get(index=0)
    assert (shard.state, shard.starts, shard.holder) == (ShardState.WAITING, 0, None)


# --- failures ---


def refuse(_context: ShardContext) -> Mapping[str, Any]:
    raise DomainError("numbers must be even\0", code="odd")


def test_what_a_handler_refuses_is_the_parents_failure_with_its_own_code() -> None:
    parent = running()
    planned(parent)
    with pytest.raises(DomainError) as raised:
        work(parent, parent, refuse)
    assert raised.value.code == "odd"
    shard = parent.shards.get(index=0)
    assert (shard.state, shard.error_code, shard.error_message) == (ShardState.FAILED, "odd", "numbers must be even")
    with pytest.raises(ShardFailed) as again:
        work(parent, parent)
    assert again.value.code == "odd" and states(parent) == "FWWW"


def test_what_a_helper_met_fails_the_parent_and_not_the_helper() -> None:
    parent, helper = running(), running(HELPER)
    planned(parent, 2)
    assert work(parent, helper, refuse).shards == 2
    with pytest.raises(ShardFailed, match="numbers must be even"):
        work(parent, parent)


def test_trouble_of_a_worker_leaves_the_shard_to_another_but_not_for_ever() -> None:
    parent = running()
    planned(parent, 1)

    def broken(_context: ShardContext) -> Mapping[str, Any]:
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        work(parent, running(HELPER), broken)
    shard = parent.shards.get()
    assert (shard.state, shard.starts) == (ShardState.WAITING, 1) and "no room" in shard.error_message
    assert work(parent, running(HELPER)).shards == 1
    assert states(parent) == "D"


def test_a_shard_that_kills_every_worker_fails_with_its_reason() -> None:
    parent = running()
    planned(parent, 2)
    for start in range(1, MAX_STARTS + 1):
        victim = running(HELPER)
        assert claim(parent, victim).starts == start
        died(victim)
    with pytest.raises(ShardFailed, match=f"{MAX_STARTS} times") as raised:
        work(parent, parent)
    assert raised.value.code == "worker_died"
    assert states(parent) == "FD"


def test_a_result_that_is_no_json_is_the_workers_trouble() -> None:
    parent = running()
    planned(parent, 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        work(parent, parent, lambda _context: {"loss": float("nan")})
    assert states(parent) == "W"


# --- helpers ---


def living_worker(pid: int, *, queue: str = Queue.TRAINING, seconds_ago: int = 0, job: Job | None = None) -> None:
    WorkerHeartbeat.objects.create(
        host="here", pid=pid, queue=queue, version="1", current_job=job,
        last_seen_at=timezone.now() - timedelta(seconds=seconds_ago),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("queue", "shard_count", "asked"),
    [(Queue.TRAINING, 9, 2), (Queue.INLINE, 9, 3), (Queue.INLINE, 3, 2), (Queue.INLINE, 1, 0)],
)
def test_as_many_helpers_are_asked_as_there_are_others_who_can_help(queue: str, shard_count: int, asked: int) -> None:
    for pid in range(3):
        living_worker(pid)
    living_worker(8, seconds_ago=3600)
    living_worker(9, queue=Queue.DEFAULT)
    parent = running()
    Job.objects.filter(pk=parent.pk).update(queue=queue)
    parent.refresh_from_db()
    with shard_helpers.helped(parent=parent, phase=PHASE, shard_count=shard_count):
        helpers = Job.objects.filter(kind=HELPER)
        assert [helper.params for helper in helpers] == [{"parent": str(parent.id), "phase": PHASE}] * asked
        assert set(helpers.values_list("queue", "state")) <= {(Queue.TRAINING, JobState.QUEUED)}
    assert set(Job.objects.filter(kind=HELPER).values_list("state", "error_code")) <= {(JobState.SKIPPED, "nothing_left")}


@pytest.mark.parametrize(("error", "state"), [(DomainError("refused"), JobState.SKIPPED), (Interrupted(), JobState.QUEUED)])
def test_helpers_are_taken_back_when_the_work_fails_and_stay_when_it_is_only_interrupted(
    error: BaseException, state: JobState
) -> None:
    living_worker(1)
    living_worker(2)
    with pytest.raises(type(error)), shard_helpers.helped(parent=running(), phase=PHASE, shard_count=9):
        raise error
    assert Job.objects.get(kind=HELPER).state == state


def test_nobody_is_asked_to_help_with_what_is_done() -> None:
    living_worker(1)
    living_worker(2)
    parent = running()
    planned(parent)
    work(parent, parent)
    found = shard_helpers.do_in_shards(job=parent, phase=PHASE, make=list, handler=number_of, should_stop=never)
    assert found == [{"number": n} for n in range(4)]
    assert not Job.objects.filter(kind=HELPER).exists()


def test_with_no_other_worker_nobody_is_asked() -> None:
    living_worker(1)
    with shard_helpers.helped(parent=running(), phase=PHASE, shard_count=100):
        assert not Job.objects.filter(kind=HELPER).exists()


def messages_of(job: Job) -> list[queueing.Message]:
    return [message for message in queueing.waiting_messages(Queue.TRAINING) if message.job_id == job.id]


def test_a_helpers_message_that_a_busy_worker_sits_on_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    living_worker(1)
    living_worker(2)
    with shard_helpers.helped(parent=running(), phase=PHASE, shard_count=9) as helpers:
        helper = Job.objects.get(kind=HELPER)
        OrmQ.objects.update(lock=timezone.now() + timedelta(hours=20))
        helpers.nudge()
        assert messages_of(helper)[0].due_at > timezone.now(), "not at once: a free worker may be about to begin"
        monkeypatch.setattr(shard_helpers, "_LOOK_SECONDS", 0.0)
        helpers.nudge()
        assert messages_of(helper)[0].due_at <= timezone.now()
        assert lease.claim(helper.id, token=uuid4()) is not None
        OrmQ.objects.update(lock=timezone.now() + timedelta(hours=20))
        helpers.nudge()
        assert messages_of(helper)[0].due_at > timezone.now(), "it has begun"
    helper.refresh_from_db()
    assert helper.state == JobState.RUNNING


def test_in_a_broker_that_cannot_be_looked_into_a_helpers_message_is_sent_again_a_few_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    living_worker(1)
    living_worker(2)
    monkeypatch.setattr(shard_helpers, "_LOOK_SECONDS", 0.0)
    sent: list[Job] = []
    with shard_helpers.helped(parent=running(), phase=PHASE, shard_count=9) as helpers:
        monkeypatch.setattr(queueing, "in_database", lambda: False)
        monkeypatch.setattr(queueing, "send", sent.append)
        for _ in range(5):
            helpers.nudge()
    assert sent == [Job.objects.get(kind=HELPER)] * 2


def help_with(helped: Job, **changes: Any) -> Job:
    return services.run_inline(kind=HELPER, params={"parent": helped.id, "phase": PHASE, **changes})


def test_a_helper_works_until_nothing_is_left() -> None:
    parent = running(shards=3)
    plans = [ShardPlan({"number": n, "seconds": 0, "lethal": False}, size=2) for n in range(3)]
    shards.plan(parent=parent, phase=PHASE, plans=plans)
    helper = help_with(parent)
    assert helper.result == {"parent": str(parent.id), "phase": PHASE, "shards": 3}
    assert states(parent) == "DDD" and set(parent.shards.values_list("worker_job", flat=True)) == {helper.id}
    assert (helper.progress_done, helper.progress_total) == (6, 6)


def test_a_helper_that_comes_too_late_is_skipped_and_alarms_nobody() -> None:
    parent = running()
    with pytest.raises(shard_helpers.Skipped):
        help_with(parent)
    assert Job.objects.filter(kind=HELPER).values_list("state", "error_code").get() == (JobState.SKIPPED, "nothing_left")


@pytest.mark.parametrize("end", ["cancel", "finish"])
def test_a_helper_does_nothing_more_for_a_parent_that_is_over(end: str) -> None:
    parent = running()
    planned(parent)
    if end == "cancel":
        services.request_cancel(job=parent, actor="steward")
    else:
        ended(parent)
    with pytest.raises(shard_helpers.Skipped):
        help_with(parent)
    assert states(parent) == "WWWW"


def test_a_helper_goes_on_for_a_parent_whose_worker_died() -> None:
    parent = running()
    shards.plan(parent=parent, phase=PHASE, plans=[ShardPlan({"number": 3, "seconds": 0, "lethal": False})])
    died(parent)
    help_with(parent)
    assert states(parent) == "D"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parent": "nobody"}, "parent"),
        ({"parent": str(uuid4())}, "parent must be the id of a job"),
        ({"phase": "cube"}, "phase must be one of square for share, not 'cube'"),
    ],
)
def test_a_helper_of_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadParams, match=message):
        help_with(running(), **changes)


def test_a_phase_that_happens_again_has_the_handler_of_its_name() -> None:
    assert shard_helpers.handler_of(running(), "square:7") is kinds.square


@pytest.mark.parametrize(
    ("kind", "params", "needs"), [("share", {}, False), ("share_child", {}, True), ("share_child", {"child": 0}, False)]
)
def test_a_helper_runs_where_its_parent_would(kind: str, params: dict[str, Any], needs: bool) -> None:
    parent = running(kind, **params)
    assert registry.get_kind(kind).needs_child(parent.params) is needs
    assert registry.get_kind(HELPER).needs_child({"parent": str(parent.id), "phase": PHASE}) is needs


def test_params_that_cannot_be_judged_fail_their_job(monkeypatch: pytest.MonkeyPatch) -> None:
    from aivo_site.jobs import runner

    def judge(_params: Mapping[str, Any]) -> bool:
        raise BadParams("engine must be known")

    monkeypatch.setitem(registry._KINDS, "probe", JobKind(name="probe", label="probe", run=lambda _c: {}, child_process=judge))
    job = services.enqueue(kind="probe", params={})
    runner.run_queued_job(str(job.id))
    job.refresh_from_db()
    assert (job.state, job.error_code) == (JobState.FAILED, "bad_params")


# --- afterwards ---


def test_results_can_be_forgotten_once_something_else_stands_for_them() -> None:
    parent = running()
    planned(parent, 2)
    work(parent, parent)
    shards.clear_results(parent=parent, phase=PHASE)
    assert shards.results(parent=parent, phase=PHASE) == [{}, {}]


def test_the_janitor_takes_the_shards_of_jobs_that_ended_long_ago(settings: Settings) -> None:
    old, new = (services.run_inline(kind="share", params={"shards": 2}) for _ in range(2))
    Job.objects.filter(pk=old.pk).update(finished_at=timezone.now() - timedelta(days=8))
    open_ = running()
    planned(open_, 1)
    janitor.sweep()
    assert [job.shards.count() for job in (old, new, open_)] == [0, 2, 1]


def test_the_jobs_page_shows_its_shards_with_a_constant_number_of_queries(client: Client) -> None:
    client.force_login(User.objects.create_superuser("root"))
    client.get(reverse("admin:index"))
    counts = []
    for number in (2, 15, 18):
        parent, helper = running(), running(HELPER)
        planned(parent, number)
        work(parent, helper)
        with CaptureQueriesContext(connection) as queries:
            page = client.get(reverse("admin:jobs_job_change", args=[parent.pk]))
        assert page.status_code == 200
        text = page.content.decode()
        assert text.count(reverse("admin:jobs_job_change", args=[helper.pk])) == number
        assert ">done<" in re.sub(r"\s+", "", text) and "DONE" not in text  # the word for people, not the stored one
        counts.append(len(queries))
    assert counts[1] == counts[2] <= counts[0]
    plain = client.get(reverse("admin:jobs_job_change", args=[running("follow").pk]))
    assert "shards-group" not in plain.content.decode() and "shards-group" in text
