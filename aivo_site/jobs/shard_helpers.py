"""Other workers' help with a job that is done in shards: how many are asked, and what each does.

A helper is a job of its own. One that comes too late, when nothing is left to claim, ends as skipped; one that still waits when
the phase ends is taken back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

from django.utils import timezone
from django.utils.translation import gettext as _

from aivo_site.errors import Skipped
from aivo_site.jobs import lease, queueing, services, shards
from aivo_site.jobs.context import JobContext
from aivo_site.jobs.errors import BadParams
from aivo_site.jobs.lease import Ending
from aivo_site.jobs.models import Job, JobState, Queue, ShardState, WorkerHeartbeat
from aivo_site.jobs.registry import get_kind
from aivo_site.jobs.shard_context import ShardHandler, ShardPlan, Steps
from aivo_site.jobs.workers import PULSE_SECONDS

HELPER_KIND = "work_on_shards"

MAX_HELPERS = 15

_LOOK_SECONDS = 1.0
_NUDGES = 30
_SENT_AGAIN = 2
"""How often a helper's message is sent again: a busy cluster holds two at most."""


def do_in_shards(
    *,
    job: Job | None,
    phase: str,
    make: Callable[[], Sequence[ShardPlan]],
    handler: ShardHandler,
    should_stop: Callable[[], bool],
    progress: Steps | None = None,
) -> list[dict[str, Any]] | None:
    """Do a phase's work in shards: shared with other workers where there is a job and more than one shard, else alone.

    Args:
        job: the running job that the work belongs to, whose kind has ``handler`` under the phase's name.
        phase: as for ``shards.plan``.
        make: what to plan; not asked again when the job runs again after it has planned.

    Returns:
        the shards' results in order; None where it ended early because it was asked to stop.

    Raises:
        ShardFailed: a shard failed in another worker. Whatever the handler raises here.
    """
    planned = shards.planned(parent=job, phase=phase) if job is not None else []
    if job is None or not planned:
        plans = make()
        if job is None or len(plans) < 2:
            return shards.work_alone(plans=plans, handler=handler, should_stop=should_stop, progress=progress)
        planned = shards.plan(parent=job, phase=phase, plans=plans)
    left = sum(shard.state != ShardState.DONE for shard in planned)
    with helped(parent=job, phase=phase, shard_count=left) as helpers:

        def looked_after() -> bool:
            helpers.nudge()
            return should_stop()

        worked = shards.work(parent=job, phase=phase, handler=handler, worker=job, should_stop=looked_after, progress=progress)
    return None if worked.stopped else shards.results(parent=job, phase=phase)


@contextmanager
def helped(*, parent: Job, phase: str, shard_count: int) -> Iterator[Helpers]:
    """Within, other living workers are asked to help with so many shards; those that have not begun at the end are taken back.

    Not where this run is interrupted: its job runs again, and until then they are all the more welcome.
    """
    wanted = min(shard_count - 1, MAX_HELPERS, other_workers(parent))
    helpers = Helpers([_ask(parent, phase, number) for number in range(1, wanted + 1)])
    try:
        yield helpers
    except Exception:
        helpers.take_back()
        raise
    helpers.take_back()


class Helpers:
    """The helpers that a parent has asked for one phase."""

    def __init__(self, asked: list[Job]) -> None:
        self._ids = {job.id for job in asked}
        self._nudges = _NUDGES if asked else 0
        self._nudged_at = time.monotonic()

    def nudge(self) -> None:
        """See to it that no busy worker sits on a helper's message; call often, it acts once a second, for a while.

        A cluster fetches a message or two beyond what its worker does, the parent's own too; they are let go again until an
        idle one has them. A message that comes twice does no harm.
        """
        if not self._nudges or time.monotonic() - self._nudged_at < _LOOK_SECONDS:
            return
        self._nudges -= 1
        self._nudged_at = time.monotonic()
        waiting = list(Job.objects.filter(id__in=self._ids, state=JobState.QUEUED))
        if not waiting:
            self._nudges = 0
        elif queueing.in_database():
            ids = {job.id for job in waiting}
            queueing.make_due([message for message in queueing.waiting_messages(Queue.TRAINING) if message.job_id in ids])
        elif self._nudges >= _NUDGES - _SENT_AGAIN:
            for job in waiting:
                queueing.send(job)

    def take_back(self) -> None:
        """End helpers that no worker has begun: their messages then find nothing to do."""
        message = _("Nothing was left to help with.")
        for job_id in self._ids:
            lease.finish_waiting(job_id, ending=Ending(JobState.SKIPPED, error_code="nothing_left", error_message=message))


def run_helper(context: JobContext) -> Mapping[str, Any]:
    """Work on the shards of the phase that the job's parameters name, until none is left to claim.

    Raises:
        Skipped: ``nothing_left``: others have done or claimed everything, or the parent has ended.
        BadParams: the parameters name no job.
    """
    parent, phase = _asked_for(context.params)
    worked = shards.work(
        parent=parent,
        phase=phase,
        handler=handler_of(parent, phase),
        worker=context.job,
        should_stop=_Watch(context, parent),
        progress=lambda done, total: context.progress(done, total, _("helping with %(kind)s") % {"kind": parent.kind}),
    )
    if worked.stopped:
        context.check_cancelled()
    if not worked.shards:
        raise Skipped(_("Nothing was left to help with."), code="nothing_left")
    return {"parent": parent.id, "phase": phase, "shards": worked.shards}


def helper_needs_child(params: Mapping[str, Any]) -> bool:
    """Whether helping with this parent needs a process of its own: where the parent's work does."""
    parent, _phase = _asked_for(params)
    return get_kind(parent.kind).needs_child(parent.params)


def handler_of(parent: Job, phase: str) -> ShardHandler:
    """What does a shard of this phase.

    Raises:
        UnknownKind: the parent's kind is not registered. BadParams: it has no such phase.
    """
    handlers = get_kind(parent.kind).shard_handlers
    name = phase.partition(":")[0]
    if name not in handlers:
        raise BadParams(f"phase must be one of {', '.join(sorted(handlers)) or 'none'} for {parent.kind}, not {name!r}")
    return handlers[name]


class _Watch:
    """Whether a helper should stop: it is told to, or its parent has ended or is to end. Looks once a second."""

    def __init__(self, context: JobContext, parent: Job) -> None:
        self._context = context
        self._parent_id = parent.id
        self._over = False
        self._looked_at = 0.0

    def __call__(self) -> bool:
        if not self._over and time.monotonic() - self._looked_at >= _LOOK_SECONDS:
            open_ = Job.objects.filter(
                id=self._parent_id, state__in=(JobState.QUEUED, JobState.RUNNING), cancel_requested_at__isnull=True
            )
            self._over = not open_.exists()
            self._looked_at = time.monotonic()
        return self._over or self._context.should_stop()


def other_workers(parent: Job) -> int:
    """Living workers of the long jobs' queue beside the one that runs the parent."""
    seen = WorkerHeartbeat.objects.filter(
        queue=Queue.TRAINING, last_seen_at__gte=timezone.now() - timedelta(seconds=3 * PULSE_SECONDS)
    ).count()
    return seen - 1 if parent.queue == Queue.TRAINING else seen


def _ask(parent: Job, phase: str, number: int) -> Job:
    """Enqueue one helper; a parent that runs again asks anew.

    Its message is sent more often than a busy cluster holds messages, so that an idle one finds it at its next look.
    """
    job = services.enqueue(
        kind=HELPER_KIND,
        params={"parent": parent.id, "phase": phase},
        requested_by=parent.requested_by,
        idempotency_key=f"shards:{parent.id}:{phase}:{parent.starts}:{number}",
    )
    for _again in range(_SENT_AGAIN):
        queueing.send(job)
    return job


def _asked_for(params: Mapping[str, Any]) -> tuple[Job, str]:
    try:
        parent = Job.objects.select_related("requested_by").filter(pk=UUID(str(params["parent"]))).first()
        phase = str(params["phase"])
    except (KeyError, ValueError) as error:
        raise BadParams("params must name a parent (the id of a job) and a phase") from error
    if parent is None:
        raise BadParams("parent must be the id of a job")
    return parent, phase
