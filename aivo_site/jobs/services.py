"""What doors and other apps do with jobs: put one in a queue, run one here, stop one, try one again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from django.db import IntegrityError, transaction
from django.utils import timezone
from django.utils.translation import gettext as _

from aivo_site.jobs import lease, queueing
from aivo_site.jobs.context import ProgressCallback
from aivo_site.jobs.errors import BadParams, IdempotencyConflict, JobFinished, JobNotFinished, NotClaimable
from aivo_site.jobs.execution import Interrupted, execute, plain_object
from aivo_site.jobs.lease import Ending
from aivo_site.jobs.models import Job, JobLog, JobState, LogLevel, Queue
from aivo_site.jobs.registry import JobKind, get_kind

if TYPE_CHECKING:
    from django.contrib.auth.models import User


def enqueue(
    *,
    kind: str,
    params: Mapping[str, Any],
    requested_by: User | None = None,
    idempotency_key: str | None = None,
) -> Job:
    """Write a job and its message in the caller's transaction.

    With an idempotency key that was used before for the same kind and parameters, the earlier job is returned and
    nothing is written.

    Raises:
        UnknownKind: no such kind.
        BadParams: ``params`` is no JSON object.
        IdempotencyConflict: the key was used for another kind or other parameters.
        UnknownQueue: no worker serves the kind's queue.
    """
    job_kind = get_kind(kind)
    plain = _plain_params(params)
    queueing.cluster_name(job_kind.queue)
    key = idempotency_key or None
    if key and (earlier := _earlier(key, kind, plain)):
        return earlier
    try:
        with transaction.atomic():
            job = _create(job_kind, plain, job_kind.queue, requested_by, key)
            queueing.send(job)
    except IntegrityError:
        earlier = _earlier(key, kind, plain) if key else None
        if earlier is None:
            raise
        return earlier
    job.refresh_from_db()
    return job


def run_inline(
    *,
    kind: str,
    params: Mapping[str, Any],
    requested_by: User | None = None,
    progress: ProgressCallback | None = None,
) -> Job:
    """Run a job in this process and return its finished row.

    ``progress(done, total, message)`` is called as the handler reports. Whatever the handler raises is recorded in the
    row and then raised again.

    Raises:
        UnknownKind, BadParams: nothing was written.
        Skipped, DomainError: the handler's own refusal.
    """
    job_kind = get_kind(kind)
    job = _create(job_kind, _plain_params(params), Queue.INLINE, requested_by, None)
    return run_here(job=job, progress=progress)


def run_here(*, job: Job, progress: ProgressCallback | None = None) -> Job:
    """Claim a waiting job, run it in this process and return its finished row; raises as ``run_inline`` does.

    Raises:
        NotClaimable: the job is not waiting.
    """
    kind = get_kind(job.kind)
    token = uuid4()
    claimed = lease.claim(job.id, token=token)
    if claimed is None:
        raise NotClaimable(_("Job %(id)s is not waiting to be run.") % {"id": job.id})
    try:
        execution = execute(claimed, kind, token=token, progress=progress)
    except (KeyboardInterrupt, Interrupted):
        message = _("Interrupted by a signal.")
        lease.finish(claimed.id, token=token, ending=Ending(JobState.CANCELLED, error_code="interrupted", error_message=message))
        raise
    if execution.error is not None:
        raise execution.error
    claimed.refresh_from_db()
    return claimed


def request_cancel(*, job: Job, actor: User | str) -> Job:
    """Cancel a waiting job at once, or ask a running one to stop; asking twice changes nothing more.

    Raises:
        JobFinished: the job has ended otherwise.
    """
    now = timezone.now()
    name = actor if isinstance(actor, str) else actor.get_username()
    with transaction.atomic():
        waiting = Job.objects.filter(id=job.id, state=JobState.QUEUED).update(
            state=JobState.CANCELLED,
            cancel_requested_at=now,
            finished_at=now,
            updated_at=now,
            error_code="cancelled",
            error_message=_("Cancelled before it began."),
        )
        asked = waiting or Job.objects.filter(id=job.id, state=JobState.RUNNING, cancel_requested_at__isnull=True).update(
            cancel_requested_at=now, updated_at=now
        )
        if asked:
            JobLog.objects.create(
                job_id=job.id, level=LogLevel.WARNING, message=_("Cancel asked for by %(name)s.") % {"name": name}
            )
    job.refresh_from_db()
    if job.is_terminal and job.state != JobState.CANCELLED:
        raise JobFinished(_("Job %(id)s has already ended as %(state)s.") % {"id": job.id, "state": job.state})
    return job


def retry(*, job: Job, actor: User | None = None) -> Job:
    """Enqueue the same work again as a new job; retrying the same job twice gives the same new job.

    Raises:
        JobNotFinished: the job waits or runs.
        JobFinished: it succeeded, there is nothing to try again.
    """
    job.refresh_from_db()
    if not job.is_terminal:
        raise JobNotFinished(_("Job %(id)s has not ended yet.") % {"id": job.id})
    if job.state == JobState.SUCCEEDED:
        raise JobFinished(_("Job %(id)s has succeeded.") % {"id": job.id})
    return enqueue(kind=job.kind, params=job.params, requested_by=actor, idempotency_key=f"retry:{job.id}")


def _create(kind: JobKind, params: dict[str, Any], queue: str, user: User | None, key: str | None) -> Job:
    return Job.objects.create(kind=kind.name, queue=queue, params=params, requested_by=user, idempotency_key=key)


def _earlier(key: str, kind: str, params: dict[str, Any]) -> Job | None:
    earlier = Job.objects.filter(idempotency_key=key).first()
    if earlier is not None and (earlier.kind, earlier.params) != (kind, params):
        raise IdempotencyConflict(_("The idempotency key was used before for another job."))
    return earlier


def _plain_params(params: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return plain_object(params)
    except (TypeError, ValueError) as error:
        raise BadParams(f"params must be a JSON object of ids, numbers and words: {error}") from error
