"""What runs by itself, and when, in the deployment's time zone.

The queue's scheduler may fire twice (two clusters, a clock set back), so each firing first takes the unique key
(schedule, local date, slot). Nothing is scheduled between 01:00 and 03:00, hours that daylight saving repeats or skips.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from django.db import IntegrityError, transaction
from django.utils import timezone
from django.utils.translation import gettext_lazy
from django_q.models import Schedule

from aivo_site.jobs.errors import UnknownSchedule
from aivo_site.jobs.janitor import JANITOR_KIND
from aivo_site.jobs.models import ScheduleRun
from aivo_site.jobs.services import enqueue

RUN_SCHEDULE = "aivo_site.jobs.schedules.run_schedule"
"""What the rows of the queue's scheduler name; it imports the function by this path."""


@dataclass(frozen=True)
class ScheduleSpec:
    """One schedule: a kind of job and a cron expression.

    ``slot_minutes``: for schedules that run more than once a day, the width of the slots of the day.
    """

    name: str
    label: object
    kind: str
    cron: str
    slot_minutes: int | None = None

    def key(self, moment: datetime) -> tuple[datetime, str]:
        """The local time of a firing, and its slot within the day."""
        local = timezone.localtime(moment)
        if self.slot_minutes is None:
            return local, ""
        minutes = local.hour * 60 + local.minute
        start = minutes - minutes % self.slot_minutes
        return local, f"{start // 60:02d}:{start % 60:02d}{local:%z}"


SCHEDULES: tuple[ScheduleSpec, ...] = (
    ScheduleSpec("weekly_aggregation", gettext_lazy("weekly aggregation"), "run_federated_aggregation", "0 23 * * 0"),
    ScheduleSpec("collect_garbage", gettext_lazy("garbage collection"), "collect_garbage", "30 3 * * *"),
    ScheduleSpec("janitor", gettext_lazy("janitor"), JANITOR_KIND, "*/5 * * * *", slot_minutes=5),
)


@dataclass
class SetupReport:
    """Names of the schedules that a setup created, changed, left alone and removed."""

    created: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


def run_schedule(name: str, intended: str | None = None) -> str:
    """Called by the queue when a schedule is due: take the key of this firing and enqueue the job.

    ``intended`` is the time, in ISO format, for which the scheduler fired. Returns the job's id, or a word where this
    firing was taken before.

    Raises:
        UnknownSchedule: the row of the scheduler is older than the code; ``setup_schedules`` removes it.
        UnknownKind: no app has registered the kind.
    """
    spec = _spec(name)
    moment = datetime.fromisoformat(intended) if intended else timezone.now()
    local, slot = spec.key(moment)
    key = {"schedule": spec.name, "local_date": local.date(), "slot": slot}
    try:
        with transaction.atomic():
            run = ScheduleRun.objects.create(**key)
            run.job = enqueue(kind=spec.kind, params={})
            run.save(update_fields=["job", "updated_at"])
    except IntegrityError:
        if not ScheduleRun.objects.filter(**key).exists():
            raise
        return "ran before"
    return str(run.job.id)


def setup_schedules() -> SetupReport:
    """Make the scheduler's rows what ``SCHEDULES`` says; a second time changes nothing."""
    report = SetupReport()
    with transaction.atomic():
        rows: dict[str, list[Schedule]] = {}
        for row in Schedule.objects.select_for_update().filter(func=RUN_SCHEDULE).order_by("id"):
            rows.setdefault(row.name, []).append(row)
        for spec in SCHEDULES:
            first, *doubles = rows.pop(spec.name, []) or [None]
            _delete(doubles, report)
            _set_up(spec, first, report)
        for left in rows.values():
            _delete(left, report)
    return report


def _set_up(spec: ScheduleSpec, row: Schedule | None, report: SetupReport) -> None:
    wanted = {
        "args": repr((spec.name,)),
        "kwargs": None,
        "schedule_type": Schedule.CRON,
        "cron": spec.cron,
        "repeats": -1,
        "cluster": None,
        "intended_date_kwarg": "intended",
    }
    if row is not None and all(getattr(row, name) == value for name, value in wanted.items()):
        report.unchanged.append(spec.name)
        return
    (report.created if row is None else report.updated).append(spec.name)
    row = row or Schedule(name=spec.name, func=RUN_SCHEDULE)
    for name, value in wanted.items():
        setattr(row, name, value)
    row.next_run = row.calculate_next_run()
    row.full_clean()
    row.save()


def _delete(rows: list[Schedule], report: SetupReport) -> None:
    for row in rows:
        report.removed.append(row.name)
        row.delete()


def _spec(name: str) -> ScheduleSpec:
    for spec in SCHEDULES:
        if spec.name == name:
            return spec
    raise UnknownSchedule(f"schedule must be one of {', '.join(spec.name for spec in SCHEDULES)}, not {name!r}")
