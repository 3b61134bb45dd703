"""What a queue worker does with a message."""

from __future__ import annotations

import logging
import signal
from uuid import UUID, uuid4

from django.db import connections, transaction
from django.utils.translation import gettext as _

from aivo_site.jobs import lease, queueing, workers
from aivo_site.jobs.child import run_in_child
from aivo_site.jobs.errors import UnknownKind
from aivo_site.jobs.execution import Interrupted, ending_of, execute
from aivo_site.jobs.lease import Ending
from aivo_site.jobs.models import JobLog, JobState, LogLevel
from aivo_site.jobs.registry import get_kind

logger = logging.getLogger(__name__)

_MARGIN_SECONDS = 60.0
_MARGIN_SHARE = 0.1


def run_queued_job(job_id: str) -> str:
    """Run the job that a message names; returns a word for the worker's log.

    Messages come at least once, and sometimes long after their job has ended: one that cannot claim its job returns at
    once. Failures of the job are its ending, not an exception of this function.

    Raises:
        SystemExit: the worker was told to stop; the job waits again, and its message has been sent anew.
    """
    token, identity = uuid4(), UUID(job_id)
    try:
        with workers.interruptible():
            return _run(identity, token)
    except Interrupted:
        _hand_back(identity, token)
        raise SystemExit(128 + signal.SIGTERM) from None
    except queueing.QueueTimeout as error:
        connections.close_all()
        message = _("The job took longer than its queue allows: %(error)s.") % {"error": error}
        lease.finish(identity, token=token, ending=Ending(JobState.FAILED, error_code="timeout", error_message=message))
        return "timeout"


def child_deadline(queue: str) -> float:
    """Seconds that a child process may take: less than the queue's own timeout, which would end the worker too."""
    timeout = float(queueing.queue_options(queue)["timeout"])
    return timeout - min(_MARGIN_SECONDS, _MARGIN_SHARE * timeout)


def _run(job_id: UUID, token: UUID) -> str:
    job = lease.claim(job_id, token=token)
    if job is None:
        logger.info("job %s: nothing to do for this message", job_id)
        return "not claimed"
    with workers.showing(job_id):
        try:
            kind = get_kind(job.kind)
        except UnknownKind as error:
            lease.finish(job_id, token=token, ending=ending_of(error))
            return "unknown kind"
        try:
            needs_child = kind.needs_child(job.params)
        except Exception as error:  # noqa: BLE001 - parameters that cannot be judged fail their job, not the worker
            lease.finish(job_id, token=token, ending=ending_of(error))
            return "bad parameters"
        if needs_child:
            run_in_child(job, token=token, deadline_seconds=child_deadline(job.queue))
        else:
            execute(job, kind, token=token)
    return "done"


def _hand_back(job_id: UUID, token: UUID) -> None:
    """Let another worker run the job; the start does not count against it."""
    connections.close_all()  # the signal may have come in the middle of a query
    with transaction.atomic():
        job = lease.owned(job_id, token=token)
        if job is None:
            return
        if lease.release(job, count_start=False):
            JobLog.objects.create(job=job, level=LogLevel.WARNING, message=_("Handed back: the worker was told to stop."))
            queueing.send(job)
        else:
            message = _("Cancelled while the worker was told to stop.")
            lease.finish(job_id, token=token, ending=Ending(JobState.CANCELLED, error_code="cancelled", error_message=message))
