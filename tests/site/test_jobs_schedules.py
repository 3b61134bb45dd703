"""Schedules: the scheduler's rows, and that a firing counts once."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.core.management import call_command
from django.utils import timezone
from django_q.conf import Conf
from django_q.models import OrmQ, Schedule
from django_q.scheduler import scheduler

from aivo_site.jobs import registry, schedules
from aivo_site.jobs.errors import UnknownKind, UnknownSchedule
from aivo_site.jobs.janitor import JANITOR_KIND
from aivo_site.jobs.models import Job, ScheduleRun
from aivo_site.jobs.registry import JobKind

pytestmark = pytest.mark.django_db

BERLIN = ZoneInfo("Europe/Berlin")


@pytest.fixture(autouse=True)
def weekly_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(context: Any) -> Mapping[str, Any]:
        return {}

    for spec in schedules.SCHEDULES:
        if spec.kind != JANITOR_KIND:
            monkeypatch.setitem(registry._KINDS, spec.kind, JobKind(name=spec.kind, label=spec.kind, run=nothing))


def test_a_firing_enqueues_the_kind_and_a_second_one_does_nothing() -> None:
    moment = datetime(2026, 3, 1, 23, 0, tzinfo=UTC).isoformat()
    first = schedules.run_schedule("weekly_aggregation", intended=moment)
    assert schedules.run_schedule("weekly_aggregation", intended=moment) == "ran before"
    job = Job.objects.get()
    assert (str(job.id), job.kind, job.params) == (first, "run_federated_aggregation", {})
    run = ScheduleRun.objects.get()
    assert (run.schedule, run.local_date.isoformat(), run.slot, run.job) == ("weekly_aggregation", "2026-03-01", "", job)
    schedules.run_schedule("weekly_aggregation", intended=datetime(2026, 3, 8, 23, 0, tzinfo=UTC).isoformat())
    assert Job.objects.count() == 2


def test_a_firing_that_comes_late_counts_for_the_day_it_was_meant_for() -> None:
    with timezone.override(BERLIN):
        schedules.run_schedule("weekly_aggregation", intended="2026-03-01T22:00:00+00:00")
        schedules.run_schedule("collect_garbage")
    assert ScheduleRun.objects.get(schedule="weekly_aggregation").local_date.isoformat() == "2026-03-01"
    assert ScheduleRun.objects.get(schedule="collect_garbage").local_date == timezone.localdate(timezone=BERLIN)


def test_the_janitor_runs_in_every_slot_even_in_the_hour_that_comes_twice() -> None:
    start = datetime(2026, 10, 25, 0, 0, tzinfo=UTC)  # Berlin: 02:00, and 02:00 again an hour later
    with timezone.override(BERLIN):
        for minutes in range(0, 180, 5):
            schedules.run_schedule("janitor", intended=(start + timedelta(minutes=minutes)).isoformat())
            schedules.run_schedule("janitor", intended=(start + timedelta(minutes=minutes, seconds=20)).isoformat())
    assert ScheduleRun.objects.count() == 36
    assert all(len(run.slot) <= 32 for run in ScheduleRun.objects.all())


def test_nothing_is_scheduled_in_hours_that_daylight_saving_moves() -> None:
    from croniter import croniter

    for spec in schedules.SCHEDULES:
        if spec.slot_minutes is not None:
            continue
        times = croniter(spec.cron, datetime(2026, 1, 1))
        for _ in range(400):
            assert not 1 <= times.get_next(datetime).hour < 3
    (weekly,) = (spec for spec in schedules.SCHEDULES if spec.name == "weekly_aggregation")
    first = croniter(weekly.cron, datetime(2026, 1, 1)).get_next(datetime)
    assert (first.isoweekday(), first.hour, first.minute) == (7, 23, 0)


def test_an_unknown_schedule_or_kind_is_refused_and_takes_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownSchedule, match="janitor"):
        schedules.run_schedule("weekly")
    monkeypatch.delitem(registry._KINDS, "collect_garbage")
    with pytest.raises(UnknownKind):
        schedules.run_schedule("collect_garbage")
    assert ScheduleRun.objects.count() == 0


def test_setting_up_twice_changes_nothing() -> None:
    names = [spec.name for spec in schedules.SCHEDULES]
    assert schedules.setup_schedules().created == names
    before = list(Schedule.objects.order_by("id").values())
    report = schedules.setup_schedules()
    assert (report.created, report.updated, report.removed, report.unchanged) == ([], [], [], names)
    assert list(Schedule.objects.order_by("id").values()) == before


def test_setting_up_corrects_changed_doubled_and_forgotten_rows_and_leaves_others() -> None:
    schedules.setup_schedules()
    Schedule.objects.filter(name="janitor").update(cron="0 2 * * *", cluster="training")
    Schedule.objects.create(name="collect_garbage", func=schedules.RUN_SCHEDULE, schedule_type=Schedule.DAILY)
    Schedule.objects.create(name="forgotten", func=schedules.RUN_SCHEDULE, schedule_type=Schedule.DAILY)
    Schedule.objects.create(name="someone's", func="math.copysign", schedule_type=Schedule.DAILY)
    out = io.StringIO()
    call_command("setup_schedules", "--json", stdout=out)
    told = json.loads(out.getvalue())
    assert told["updated"] == ["janitor"]
    assert sorted(told["removed"]) == ["collect_garbage", "forgotten"]
    assert sorted(Schedule.objects.values_list("name", flat=True)) == [
        "collect_garbage",
        "janitor",
        "someone's",
        "weekly_aggregation",
    ]
    row = Schedule.objects.get(name="janitor")
    assert (row.cron, row.cluster) == ("*/5 * * * *", None)
    assert row.next_run > timezone.now()


@pytest.mark.django_db(transaction=True)
def test_the_queues_scheduler_calls_ours_with_the_time_it_was_meant_for() -> None:
    """Through the library's own scheduler: what it sends is what our function takes."""
    assert Conf.CLUSTER_NAME == Conf.PREFIX == "aivo"
    schedules.setup_schedules()
    meant = timezone.now() - timedelta(hours=3)
    Schedule.objects.filter(name="weekly_aggregation").update(next_run=meant)
    scheduler()
    scheduler()
    task = OrmQ.objects.get().task
    assert task["func"] == schedules.RUN_SCHEDULE
    schedules.run_schedule(*task["args"], **task["kwargs"])
    assert ScheduleRun.objects.get().local_date == timezone.localdate(meant)
    assert Schedule.objects.get(name="weekly_aggregation").next_run > timezone.now()
