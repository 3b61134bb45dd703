"""The lease: which run owns a job. Every change of a running job is a conditional UPDATE that names its owner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from django.db.models import F, Q
from django.db.models.functions import Coalesce
from django.utils import timezone

from aivo_site.jobs import limits
from aivo_site.jobs.models import Job, JobState


@dataclass(frozen=True)
class Progress:
    """How far a job is: ``done`` of ``total`` steps, and the current step in words."""

    done: int = 0
    total: int = 0
    message: str = ""

    @classmethod
    def bounded(cls, done: int, total: int, message: str) -> Progress:
        """Within what the table holds: nothing negative, ``done`` at most ``total``, 200 characters."""
        steps = max(0, int(done))
        return cls(steps, max(steps, int(total)), message[:200])

    def columns(self) -> dict[str, Any]:
        return {"progress_done": self.done, "progress_total": self.total, "progress_message": self.message}


@dataclass(frozen=True)
class Ending:
    """How a job ended; ``state`` is a terminal one."""

    state: JobState
    result: dict[str, Any] | None = None
    error_code: str = ""
    error_message: str = ""
    error_traceback: str = ""


def claim(job_id: UUID | str, *, token: UUID) -> Job | None:
    """Take a waiting job, count the start and open the lease.

    Returns None where there is nothing to take: the job runs, has ended, is to be cancelled, or does not exist.
    """
    now = timezone.now()
    taken = Job.objects.filter(id=job_id, state=JobState.QUEUED, cancel_requested_at__isnull=True).update(
        state=JobState.RUNNING,
        owner=token,
        starts=F("starts") + 1,
        lease_expires_at=now + limits.lease(),
        heartbeat_at=now,
        started_at=Coalesce(F("started_at"), now),
        updated_at=now,
        **Progress().columns(),
    )
    return Job.objects.get(id=job_id) if taken else None


def alive() -> Q:
    """The condition on jobs that a run holds the lease now."""
    return Q(state=JobState.RUNNING, lease_expires_at__gt=timezone.now())


def owned(job_id: UUID, *, token: UUID) -> Job | None:
    """The running job, if this token still owns it."""
    return Job.objects.filter(id=job_id, state=JobState.RUNNING, owner=token).first()


def renew(job_id: UUID, *, token: UUID, progress: Progress | None = None) -> bool:
    """Move the lease's end on, with the progress if there is news. False: the lease belongs to another run now."""
    now = timezone.now()
    columns = progress.columns() if progress else {}
    changed = Job.objects.filter(id=job_id, state=JobState.RUNNING, owner=token).update(
        lease_expires_at=now + limits.lease(), heartbeat_at=now, updated_at=now, **columns
    )
    return changed == 1


def finish(job_id: UUID, *, token: UUID, ending: Ending, progress: Progress | None = None) -> bool:
    """Write the terminal state. False: the lease was lost, and nothing changed."""
    return _finish(Q(owner=token), job_id, ending, progress)


def finish_expired(job: Job, *, ending: Ending) -> bool:
    """Write the terminal state of a job whose run is dead, unless that run has come back since ``job`` was read."""
    return _finish(Q(owner=job.owner, lease_expires_at=job.lease_expires_at), job.id, ending, None)


def finish_waiting(job_id: UUID, *, ending: Ending) -> bool:
    """Write the terminal state of a job that no run has begun. False: one has, and nothing changed."""
    return _finish(Q(), job_id, ending, None, state=JobState.QUEUED)


def release(job: Job, *, count_start: bool) -> bool:
    """Put a running job back to waiting, unless its lease moved since ``job`` was read or a cancel was asked for.

    ``count_start=False`` takes the start back: a worker that was told to stop is not the job's fault.
    """
    now = timezone.now()
    changed = Job.objects.filter(
        id=job.id,
        state=JobState.RUNNING,
        owner=job.owner,
        lease_expires_at=job.lease_expires_at,
        cancel_requested_at__isnull=True,
    ).update(
        state=JobState.QUEUED,
        owner=None,
        lease_expires_at=None,
        starts=F("starts") if count_start else F("starts") - 1,
        updated_at=now,
    )
    return changed == 1


def _finish(owner: Q, job_id: UUID, ending: Ending, progress: Progress | None, *, state: JobState = JobState.RUNNING) -> bool:
    now = timezone.now()
    changed = Job.objects.filter(owner, id=job_id, state=state).update(
        state=ending.state,
        result=ending.result,
        error_code=ending.error_code,
        error_message=ending.error_message,
        error_traceback=ending.error_traceback,
        finished_at=now,
        lease_expires_at=None,
        updated_at=now,
        **(progress.columns() if progress else {}),
    )
    return changed == 1
