"""A job in a process of its own.

The worker supervises: it renews the lease, passes a cancel on as a signal, and turns a death without a word (out of
memory, a crash in native code) into an ordinary failure. The child ends when its worker dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from enum import Enum
from typing import IO, Any
from uuid import UUID

from django.conf import settings
from django.utils.translation import gettext as _

from aivo_site.environment import BASE_DIR
from aivo_site.jobs import lease, limits
from aivo_site.jobs.errors import NotClaimable
from aivo_site.jobs.execution import Interrupted, execute
from aivo_site.jobs.lease import Ending
from aivo_site.jobs.models import Job, JobState
from aivo_site.jobs.registry import get_kind
from aivo_site.jobs.reporter import Reporter

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_OUTPUT_KEPT = 8_000
_PR_SET_PDEATHSIG = 1
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)


class Stopped(Enum):
    """Why the supervisor stopped a child."""

    CANCEL = "cancel"
    TIMEOUT = "timeout"
    LEASE_LOST = "lease_lost"


@dataclass(frozen=True)
class ChildExit:
    """How a child ended: its return code (negative: the signal), why it was stopped, and the end of its output."""

    code: int
    stopped: Stopped | None
    output: str

    def in_words(self) -> str:
        if self.code < 0:
            return _("signal %(name)s") % {"name": signal.Signals(-self.code).name}
        return _("exit status %(code)s") % {"code": self.code}


def run_in_child(job: Job, *, token: UUID, deadline_seconds: float) -> None:
    """Run a claimed job in a child process and make sure that it has an ending, or that its lease is lost.

    Must be called from a thread that lives as long as the worker: the child is tied to that thread.
    """
    exit_ = _supervised(job, token, deadline_seconds)
    if exit_.output:
        logger.info("job %s wrote:\n%s", job.id, exit_.output)
    if exit_.stopped is Stopped.LEASE_LOST:
        return
    if lease.finish(job.id, token=token, ending=_ending(exit_, deadline_seconds)):
        logger.error("job %s: its process ended with %s before the job did", job.id, exit_.in_words())


def run_leased(job_id: UUID, *, token: UUID, parent: int) -> None:
    """The child's side: run the job whose lease the parent opened.

    Raises:
        NotClaimable: the lease is not (or no longer) the parent's.
        SystemExit: 143 after SIGTERM.
    """
    die_with(parent)
    signal.signal(signal.SIGTERM, _interrupt)
    job = lease.owned(job_id, token=token)
    if job is None:
        raise NotClaimable(_("Job %(id)s is not leased to this process.") % {"id": job_id})
    try:
        execute(job, get_kind(job.kind), token=token)
    except Interrupted:
        raise SystemExit(128 + signal.SIGTERM) from None


def die_with(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel signal this process when its parent ends (Linux), and end now if it already has."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        raise SystemExit(128 + number)


def child_environment() -> dict[str, str]:
    """The worker's environment, with numerical libraries held to this worker's share of the cores.

    A variable that the operator has set stays.
    """
    environment = {**os.environ, "AIVO_PROCESS_ROLE": "worker"}
    for name in _THREAD_VARIABLES:
        environment.setdefault(name, str(threads_per_child()))
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    return environment


def threads_per_child() -> int:
    """Cores of this machine divided by the workers of all queues, at least one."""
    config = settings.Q_CLUSTER
    workers = sum(int(options.get("workers", 1)) for options in (config, *config.get("ALT_CLUSTERS", {}).values()))
    return max(1, len(os.sched_getaffinity(0)) // max(1, workers))


def _supervised(job: Job, token: UUID, deadline_seconds: float) -> ChildExit:
    command = [sys.executable, str(BASE_DIR / "manage.py"), "run_job", str(job.id)]
    command += ["--lease", str(token), "--parent", str(os.getpid())]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and command
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=child_environment(),
            cwd=BASE_DIR,
        )
        try:
            with Reporter(job.id, token=token) as reporter:
                stopped = _Supervision(process, reporter, deadline_seconds).watch()
        finally:
            _signal_group(process, signal.SIGKILL)
            process.wait()
        return ChildExit(process.returncode, stopped, _tail(output))


class _Supervision:
    """Waits for a child, and stops it where it must be stopped: SIGTERM first, SIGKILL where that does not help."""

    def __init__(self, process: subprocess.Popen[Any], reporter: Reporter, deadline_seconds: float) -> None:
        self._process = process
        self._reporter = reporter
        self._deadline = time.monotonic() + deadline_seconds
        self._stopped: Stopped | None = None
        self._terminate_at = self._kill_at = float("inf")

    def watch(self) -> Stopped | None:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_POLL_SECONDS)
                return self._stopped
            self._decide(time.monotonic())
            self._act(time.monotonic())

    def _decide(self, now: float) -> None:
        if self._reporter.lease_lost:
            self._stopped, self._kill_at = Stopped.LEASE_LOST, now
        elif self._stopped is None and self._reporter.cancel_requested:
            self._stopped, self._terminate_at = Stopped.CANCEL, now + limits.cancel_grace()
        elif self._stopped is None and now >= self._deadline:
            self._stopped, self._terminate_at = Stopped.TIMEOUT, now

    def _act(self, now: float) -> None:
        if now >= self._kill_at:
            _signal_group(self._process, signal.SIGKILL)
        elif now >= self._terminate_at:
            self._terminate_at, self._kill_at = float("inf"), now + limits.terminate_grace()
            _signal_group(self._process, signal.SIGTERM)


def _ending(exit_: ChildExit, deadline_seconds: float) -> Ending:
    """What it means that a child ended; written only where the child has not written its own ending."""
    if exit_.stopped is Stopped.CANCEL:
        return Ending(JobState.CANCELLED, error_code="cancelled", error_message=_("Stopped by a signal."))
    if exit_.stopped is Stopped.TIMEOUT:
        message = _("Stopped after %(seconds)d seconds, the longest time a job of this queue may take.")
        return Ending(JobState.FAILED, error_code="timeout", error_message=message % {"seconds": deadline_seconds})
    message = _("The job's process ended with %(how)s before the job did (SIGKILL: often the system ran out of memory).")
    return Ending(
        JobState.FAILED,
        error_code="child_died",
        error_message=message % {"how": exit_.in_words()},
        error_traceback=exit_.output,
    )


def _signal_group(process: subprocess.Popen[Any], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _tail(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - _OUTPUT_KEPT))
    return output.read().decode("utf-8", errors="replace").replace("\0", "").strip()


def _interrupt(_number: int, _frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted
