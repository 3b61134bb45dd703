"""Repairs what deaths and lost messages leave behind, and prunes old rows. Safe to run at any time, by several at once."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from django.db import transaction
from django.db.models import QuerySet
from django.db.models.functions import Coalesce
from django.utils import timezone
from django.utils.translation import gettext as _
from django_q.models import Failure

from aivo_site.jobs import lease, limits, queueing
from aivo_site.jobs.errors import UnknownKind
from aivo_site.jobs.lease import Ending
from aivo_site.jobs.models import (
    TERMINAL_JOB_STATES,
    Job,
    JobLog,
    JobShard,
    JobState,
    LogLevel,
    Queue,
    ScheduleRun,
    WorkerHeartbeat,
)
from aivo_site.jobs.queueing import Message
from aivo_site.jobs.registry import get_kind

logger = logging.getLogger(__name__)

JANITOR_KIND = "run_janitor"

JOBS_KEPT = timedelta(days=365)
JANITOR_JOBS_KEPT = timedelta(days=1)
SCHEDULE_RUNS_KEPT = timedelta(days=400)
FAILED_MESSAGES_KEPT = timedelta(days=30)
WORKERS_KEPT = timedelta(hours=1)
SHARDS_KEPT = timedelta(days=7)
INVISIBLE_QUEUE_WAIT = timedelta(minutes=30)
"""How long a message may wait in a broker that cannot be looked into before it is sent again."""

_PRUNED_AT_ONCE = 2_000


@dataclass
class SweepReport:
    """How many jobs and rows one sweep changed."""

    requeued: int = 0
    failed: int = 0
    cancelled: int = 0
    resent: int = 0
    released: int = 0
    pruned: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def sweep() -> SweepReport:
    """End or requeue jobs whose lease has run out, send lost messages again, and delete old rows."""
    report = SweepReport()
    _end_expired(report)
    for queue in (Queue.DEFAULT, Queue.TRAINING):
        _find_lost_messages(queue, report)
    report.pruned = _prune(timezone.now())
    return report


def release_taken(queue: str) -> int:
    """Make messages of waiting jobs due again that a worker fetched; returns how many.

    For the start of a worker: what its predecessor had fetched would otherwise be hidden until the queue's retry time. A
    message that a living worker holds is then delivered twice, which is harmless.
    """
    if not queueing.in_database():
        return 0
    messages = [message for message in queueing.waiting_messages(queue) if message.due_at > timezone.now()]
    waiting = _waiting(queue).filter(id__in=[message.job_id for message in messages if message.job_id])
    ids = set(waiting.values_list("id", flat=True))
    return queueing.make_due([message for message in messages if message.job_id in ids])


def _end_expired(report: SweepReport) -> None:
    for job in Job.objects.filter(state=JobState.RUNNING, lease_expires_at__lt=timezone.now()).order_by("lease_expires_at"):
        if job.cancel_requested_at is not None:
            message = _("The process that ran it ended while it was asked to stop.")
            report.cancelled += lease.finish_expired(
                job, ending=Ending(JobState.CANCELLED, error_code="cancelled", error_message=message)
            )
        elif _may_start_again(job):
            report.requeued += _requeue(job)
        else:
            message = _("The process that ran it ended without a word, after %(starts)d starts.") % {"starts": job.starts}
            report.failed += lease.finish_expired(
                job, ending=Ending(JobState.FAILED, error_code="lease_expired", error_message=message)
            )


def _may_start_again(job: Job) -> bool:
    """Whether a lost run is tried again: work of a command ends with its command."""
    if job.queue == Queue.INLINE:
        return False
    try:
        return job.starts < get_kind(job.kind).max_starts
    except UnknownKind:
        logger.error("job %s: its kind %s is not registered", job.id, job.kind)
        return False


def _requeue(job: Job) -> bool:
    with transaction.atomic():
        if not lease.release(job, count_start=True):
            return False
        message = _("Start %(starts)d ended without a word; waiting again.") % {"starts": job.starts}
        JobLog.objects.create(job=job, level=LogLevel.WARNING, message=message)
        queueing.send(job)
    return True


def _find_lost_messages(queue: str, report: SweepReport) -> None:
    wait = limits.resend_after() if queueing.in_database() else INVISIBLE_QUEUE_WAIT
    silent = list(_waiting(queue).alias(asked_at=Coalesce("sent_at", "created_at")).filter(asked_at__lt=timezone.now() - wait))
    if not silent:
        return
    messages = _by_job(queueing.waiting_messages(queue)) if queueing.in_database() else {}
    now = timezone.now()
    idle = not Job.objects.filter(queue=queue, state=JobState.RUNNING, lease_expires_at__gte=now).exists()
    for job in silent:
        held = messages.get(job.id, [])
        if not held:
            report.resent += _send_again(job)
        elif idle and all(message.due_at > now for message in held):
            report.released += queueing.make_due(held)


def _send_again(job: Job) -> bool:
    with transaction.atomic():
        now = timezone.now()
        unchanged = Job.objects.filter(id=job.id, state=JobState.QUEUED, sent_at=job.sent_at)
        if not unchanged.update(sent_at=now, updated_at=now):
            return False
        JobLog.objects.create(job=job, level=LogLevel.WARNING, message=_("Its message was lost and has been sent again."))
        queueing.send(job)
    return True


def _waiting(queue: str) -> QuerySet[Job]:
    return Job.objects.filter(queue=queue, state=JobState.QUEUED)


def _by_job(messages: list[Message]) -> dict[object, list[Message]]:
    found: dict[object, list[Message]] = {}
    for message in messages:
        found.setdefault(message.job_id, []).append(message)
    return found


def _prune(now: datetime) -> int:
    """Delete rows past their time, a bounded number at once; what is left goes next time."""
    old: list[QuerySet[Any]] = [
        Job.objects.filter(kind=JANITOR_KIND, state=JobState.SUCCEEDED, finished_at__lt=now - JANITOR_JOBS_KEPT),
        Job.objects.filter(finished_at__lt=now - JOBS_KEPT),
        JobShard.objects.filter(parent__state__in=TERMINAL_JOB_STATES, parent__finished_at__lt=now - SHARDS_KEPT),
        ScheduleRun.objects.filter(slot="", created_at__lt=now - SCHEDULE_RUNS_KEPT),
        ScheduleRun.objects.exclude(slot="").filter(created_at__lt=now - 2 * JANITOR_JOBS_KEPT),
        WorkerHeartbeat.objects.filter(last_seen_at__lt=now - WORKERS_KEPT),
        Failure.objects.filter(stopped__lt=now - FAILED_MESSAGES_KEPT),
    ]
    return sum(_delete_some(rows) for rows in old)


def _delete_some(rows: QuerySet[Any]) -> int:
    ids = list(rows.values_list("pk", flat=True)[:_PRUNED_AT_ONCE])
    rows.filter(pk__in=ids).delete()
    return len(ids)
