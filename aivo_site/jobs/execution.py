"""Runs the handler of a claimed job in this process and turns whatever happens into an ending."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from django.core.serializers.json import DjangoJSONEncoder

from aivo_site.errors import DomainError, Skipped
from aivo_site.jobs import lease
from aivo_site.jobs.context import JobContext, ProgressCallback
from aivo_site.jobs.errors import JobCancelled
from aivo_site.jobs.lease import Ending
from aivo_site.jobs.models import Job, JobState
from aivo_site.jobs.registry import JobKind
from aivo_site.jobs.reporter import Reporter


class Interrupted(BaseException):
    """A signal asks the run to end now; raised by signal handlers in the main thread, past every ``except Exception``."""


@dataclass(frozen=True)
class Execution:
    """What came of a run: its ending, whether it could be written (the lease was kept), and the handler's exception."""

    ending: Ending
    recorded: bool
    error: Exception | None


def execute(job: Job, kind: JobKind, *, token: UUID, progress: ProgressCallback | None = None) -> Execution:
    """Run the handler of a job that ``token`` owns and write how it ended.

    Exceptions of the handler become the job's ending; those that are no ``Exception`` pass through with nothing written.
    """
    with Reporter(job.id, token=token) as reporter:
        ending, error = _perform(kind, JobContext(job, reporter, progress=progress))
    recorded = lease.finish(job.id, token=token, ending=ending, progress=reporter.progress)
    return Execution(ending, recorded, error)


def _perform(kind: JobKind, context: JobContext) -> tuple[Ending, Exception | None]:
    try:
        return Ending(JobState.SUCCEEDED, result=plain_object(kind.run(context))), None
    except Exception as error:  # noqa: BLE001 - the one place where a handler's failure becomes the job's
        return ending_of(error), error


def ending_of(error: Exception) -> Ending:
    """The ending that an exception of a handler means."""
    state = JobState.FAILED
    if isinstance(error, JobCancelled):
        state = JobState.CANCELLED
    elif isinstance(error, Skipped):
        state = JobState.SKIPPED
    code = getattr(error, "code", None)
    partial = getattr(error, "result", None)
    expected = isinstance(error, DomainError) or (isinstance(error, ValueError) and isinstance(code, str))
    return Ending(
        state,
        result=plain_object(partial) if isinstance(partial, Mapping) else None,
        error_code=str(code) if expected else "unexpected_error",
        error_message=str(error) if expected else f"{type(error).__name__}: {error}",
        error_traceback="" if expected else "".join(traceback.format_exception(error)),
    )


def plain_object(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object of plain values; ids and times become strings.

    Raises:
        TypeError: something in it has no JSON form.
        ValueError: a number is not finite.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"a job's parameters and result must be a JSON object, not {type(value).__name__}")
    plain: dict[str, Any] = json.loads(json.dumps(dict(value), cls=DjangoJSONEncoder, allow_nan=False))
    return plain
