"""Shards: bounded parts of one job's work, which several workers share.

The job that plans them is their parent. Whoever works on them claims one by a conditional UPDATE, does it, writes its result,
and takes the next. A shard whose holder is dead (its lease ran out, or its job ended) is claimed again, so that nothing is lost
with a worker; a handler is therefore idempotent. The parent works too: alone it finishes everything, and helpers
(``shard_helpers``) only make it faster.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.db import IntegrityError, connection, transaction
from django.db.models import Exists, F, OuterRef, Q, QuerySet, Sum
from django.utils import timezone
from django.utils.translation import gettext as _

from aivo_site.jobs import lease
from aivo_site.jobs.errors import JobCancelled, ShardFailed, ShardStopped
from aivo_site.jobs.execution import Interrupted, ending_of, plain_object
from aivo_site.jobs.models import Job, JobShard, ShardState
from aivo_site.jobs.shard_context import ShardContext, ShardHandler, ShardPlan, Steps

logger = logging.getLogger(__name__)

MAX_STARTS = 3
"""How often workers may begin a shard and die in it before it counts as the reason."""

POLL_SECONDS = 0.3
"""How often the parent looks whether others have finished."""

_COUNT_SECONDS = 0.5
_CANDIDATES = 8
_UNEXPECTED = "unexpected_error"


def planned(*, parent: Job, phase: str) -> list[JobShard]:
    """The shards of a phase, in order; none where nothing is planned yet."""
    return list(JobShard.objects.filter(parent=parent, phase=phase).order_by("index"))


def plan(*, parent: Job, phase: str, plans: Sequence[ShardPlan]) -> list[JobShard]:
    """Plan the shards of a phase and return them, in order.

    A phase is planned once: where it is planned already, by an earlier run of the parent, those shards are returned with what
    is done of them, whatever ``plans`` are.

    Args:
        phase: the name of a handler of the parent's kind; ``name:3`` where a phase happens more than once.
    """
    rows = [
        JobShard(parent=parent, phase=phase, index=index, params=plain_object(entry.params), size=entry.size)
        for index, entry in enumerate(plans)
    ]
    try:
        with transaction.atomic():
            if not JobShard.objects.filter(parent=parent, phase=phase).exists():
                JobShard.objects.bulk_create(rows, batch_size=200)
    except IntegrityError:
        logger.info("job %s: phase %s was planned by another run at the same moment", parent.id, phase)
    return planned(parent=parent, phase=phase)


def claim_next(*, parent: Job, phase: str, worker: Job) -> JobShard | None:
    """Take the first shard that waits, or whose holder is dead; None where there is none.

    A shard that was begun ``MAX_STARTS`` times by workers that died in it is failed instead.

    Args:
        worker: a running job as its run claimed it (``owner`` is the run's token).
    """
    while candidates := list(_claimable(parent, phase)[:_CANDIDATES]):
        for shard in candidates:
            if shard.state == ShardState.RUNNING and shard.starts >= MAX_STARTS:
                text = _("Every worker that began this part ended without a word, %(n)d times.") % {"n": shard.starts}
                _update(shard, state=ShardState.FAILED, error_code="worker_died", error_message=text)
            elif _update(shard, state=ShardState.RUNNING, worker_job=worker, holder=worker.owner, starts=F("starts") + 1):
                return JobShard.objects.get(pk=shard.pk)
    return None


def finish(shard: JobShard, result: Mapping[str, Any]) -> bool:
    """Write the result of a claimed shard. False: another run has claimed it meanwhile, and nothing changed."""
    return _update(shard, state=ShardState.DONE, result=plain_object(result))


def release(shard: JobShard, *, count_start: bool, note: str = "") -> bool:
    """Let others claim a claimed shard; ``count_start=False`` where its beginning was no try."""
    starts = F("starts") if count_start else F("starts") - 1
    return _update(shard, state=ShardState.WAITING, holder=None, starts=starts, error_message=note)


def fail(shard: JobShard, *, code: str, message: str) -> bool:
    """End a claimed shard, and with it its parent's work, as failed."""
    return _update(shard, state=ShardState.FAILED, error_code=code, error_message=message)


def open_phase(*, parent: Job, phase: str) -> bool:
    """Whether anything of the phase is still to be done."""
    return JobShard.objects.filter(parent=parent, phase=phase, state__in=(ShardState.WAITING, ShardState.RUNNING)).exists()


def results(*, parent: Job, phase: str) -> list[dict[str, Any]]:
    """The results of a phase whose shards are all done, in order."""
    return [shard.result or {} for shard in planned(parent=parent, phase=phase)]


def finished_results(*, parent: Job, phase: str) -> list[dict[str, Any]]:
    """The results of those shards of a phase that are done, in order."""
    return [shard.result or {} for shard in planned(parent=parent, phase=phase) if shard.state == ShardState.DONE]


def clear_results(*, parent: Job, phase: str) -> None:
    """Forget what a phase's shards left, once something else stands for it."""
    JobShard.objects.filter(parent=parent, phase=phase, state=ShardState.DONE).update(result={}, updated_at=timezone.now())


@dataclass(frozen=True)
class Worked:
    """What one call of ``work`` did: how many shards, and whether it ended early because it was asked to stop."""

    shards: int
    stopped: bool


def work(
    *,
    parent: Job,
    phase: str,
    handler: ShardHandler,
    worker: Job,
    should_stop: Callable[[], bool],
    progress: Steps | None = None,
) -> Worked:
    """Claim and do shards until there is none left to claim.

    Where ``worker`` is the parent itself, also wait for those that others hold, and take over those of the dead, until all are
    done. Errors that a handler is expected to raise end the phase; others (a lost database, too little memory) are the
    worker's own trouble: the shard waits again, for another worker.

    Raises:
        ShardFailed: in the parent: a shard failed in another worker, or ended every worker that began it.
        Whatever a handler raises here: in a helper only what is unexpected.
    """
    own = worker.pk == parent.pk
    count = _Count(parent, phase, progress)
    done = 0
    while not should_stop():
        if own:
            _raise_failure(parent, phase)
        shard = claim_next(parent=parent, phase=phase, worker=worker)
        if shard is None:
            if not (own and open_phase(parent=parent, phase=phase)):
                count.say()
                if own:
                    _raise_failure(parent, phase)
                return Worked(done, stopped=False)
            count.say()
            time.sleep(POLL_SECONDS)
            continue
        context = ShardContext(shard.params, should_stop, count.within)
        if not _perform(shard, handler, context, raise_expected=own):
            return Worked(done, stopped=True)
        done += 1
        count.add(shard)
    return Worked(done, stopped=True)


def work_alone(
    *, plans: Sequence[ShardPlan], handler: ShardHandler, should_stop: Callable[[], bool], progress: Steps | None = None
) -> list[dict[str, Any]] | None:
    """Do planned shards here, one after the other, with no row written: for work that is not shared.

    Returns:
        the results in order; None where it ended early because it was asked to stop.
    """
    total, before = sum(entry.size for entry in plans), 0
    found = []
    for entry in plans:

        def within(done: int, before: int = before, size: int = entry.size) -> None:
            if progress is not None:
                progress(before + min(done, size), total)

        if should_stop():
            return None
        try:
            found.append(dict(handler(ShardContext(plain_object(entry.params), should_stop, within))))
        except ShardStopped:
            return None
        before += entry.size
        within(0, before, 0)
    return found


def _perform(shard: JobShard, handler: ShardHandler, context: ShardContext, *, raise_expected: bool) -> bool:
    """Run the handler and write what came of it; False where it stopped early."""
    try:
        result = plain_object(handler(context))
    except (ShardStopped, JobCancelled):
        release(shard, count_start=False)
        return False
    except Interrupted:
        connection.close()  # the signal may have come in the middle of a query
        release(shard, count_start=False)
        raise
    except Exception as error:
        ending = ending_of(error)
        if ending.error_code == _UNEXPECTED:
            release(shard, count_start=True, note=ending.error_message)
            raise
        fail(shard, code=ending.error_code, message=ending.error_message)
        if raise_expected:
            raise
        return True
    if not finish(shard, result):
        logger.warning("shard %s of job %s was taken over by another worker; its result here is dropped", shard, shard.parent_id)
    return True


class _Count:
    """Tells the steps done in all: those of finished shards, whoever did them, and of the one at hand."""

    def __init__(self, parent: Job, phase: str, progress: Steps | None) -> None:
        self._rows = JobShard.objects.filter(parent=parent, phase=phase)
        self._progress = progress
        self._total = int(self._rows.aggregate(n=Sum("size"))["n"] or 0) if progress is not None else 0
        self._finished = 0
        self._looked_at = 0.0

    def within(self, done: int) -> None:
        if self._progress is None:
            return
        if time.monotonic() - self._looked_at >= _COUNT_SECONDS:
            self._look()
        self._progress(min(self._finished + done, self._total), self._total)

    def add(self, shard: JobShard) -> None:
        """A shard that was done here."""
        self._finished += shard.size

    def say(self) -> None:
        if self._progress is not None:
            self._look()
            self._progress(self._finished, self._total)

    def _look(self) -> None:
        self._finished = int(self._rows.filter(state=ShardState.DONE).aggregate(n=Sum("size"))["n"] or 0)
        self._looked_at = time.monotonic()


def _claimable(parent: Job, phase: str) -> QuerySet[JobShard]:
    holding = Job.objects.filter(lease.alive(), pk=OuterRef("worker_job"), owner=OuterRef("holder"))
    rows = JobShard.objects.filter(parent=parent, phase=phase).alias(held=Exists(holding))
    return rows.filter(Q(state=ShardState.WAITING) | Q(state=ShardState.RUNNING, held=False)).order_by("index")


def _update(shard: JobShard, **values: Any) -> bool:
    """Change a shard that still is as this object has it: nobody has claimed it since."""
    if "error_message" in values:
        values["error_message"] = values["error_message"].replace("\0", "")
    rows = JobShard.objects.filter(pk=shard.pk, state=shard.state, holder=shard.holder, starts=shard.starts)
    return rows.update(updated_at=timezone.now(), **values) == 1


def _raise_failure(parent: Job, phase: str) -> None:
    failed = JobShard.objects.filter(parent=parent, phase=phase, state=ShardState.FAILED).order_by("index").first()
    if failed is not None:
        raise ShardFailed(failed.error_message, code=failed.error_code)
