"""What a queue worker says about itself, and how it takes a signal.

Runs in worker processes only. The pulse shows that the process lives and what it works on; it is no proof that the worker
can still take messages, which is why the watchdog looks at the age of messages instead.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import util
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import UUID

from django.db import DatabaseError, InterfaceError, connection, connections
from django.utils import timezone

from aivo_core import __version__
from aivo_site.jobs import queueing
from aivo_site.jobs.execution import Interrupted
from aivo_site.jobs.models import WorkerHeartbeat

logger = logging.getLogger(__name__)

PULSE_SECONDS = 10.0
"""How often a worker says that it lives; three missing ones make it silent."""

_LOOK_SECONDS = 1.0

_JOIN_SECONDS = 5.0


class Pulse:
    """A thread that keeps this worker's row, with a database connection of its own."""

    def __init__(self, queue: str) -> None:
        self._row: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "queue": queue}
        self._job_id: UUID | None = None
        self._news = threading.Event()
        self._closing = False
        self._guard = os.getppid()
        self._main = _parent_of(self._guard)
        self._thread = threading.Thread(target=self._work, name="worker-pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def show(self, job_id: UUID | None) -> None:
        """Say which job runs, soon."""
        self._job_id = job_id
        self._news.set()

    def stop(self) -> None:
        """End the thread, which takes the worker's row away."""
        self._closing = True
        self._news.set()
        self._thread.join(_JOIN_SECONDS)

    def _work(self) -> None:
        try:
            due = 0.0
            while not self._closing:
                if self._news.is_set() or time.monotonic() >= due:
                    self._news.clear()
                    self._attempt(self._write)
                    due = time.monotonic() + PULSE_SECONDS
                if _parent_of(self._guard) != self._main:
                    _end_cluster(self._guard)
                    return
                self._news.wait(_LOOK_SECONDS)
            self._attempt(self._remove)
        finally:
            connections.close_all()

    def _attempt(self, step: Callable[[], None]) -> None:
        try:
            step()
        except (DatabaseError, InterfaceError) as error:
            logger.warning("worker %s: heartbeat not written, trying again: %s", self._row["pid"], error)
            connection.close()

    def _write(self) -> None:
        told = {"version": __version__, "current_job_id": self._job_id, "last_seen_at": timezone.now()}
        WorkerHeartbeat.objects.update_or_create(defaults=told, **self._row)

    def _remove(self) -> None:
        WorkerHeartbeat.objects.filter(**self._row).delete()


_pulse: Pulse | None = None
_interruptible = False


def worker_started(**_signal: Any) -> None:
    """Receiver of the queue's ``post_spawn``: runs once in each new worker process."""
    global _pulse
    signal.signal(signal.SIGTERM, _on_sigterm)
    _pulse = Pulse(queueing.own_queue())
    _pulse.start()
    util.Finalize(None, _pulse.stop, exitpriority=10)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, SIGTERM raises ``Interrupted`` once, so that the job can be handed back."""
    global _interruptible
    _interruptible = True
    try:
        yield
    finally:
        _interruptible = False


@contextmanager
def showing(job_id: UUID) -> Iterator[None]:
    """Within, this worker's row names the job."""
    if _pulse is not None:
        _pulse.show(job_id)
    try:
        yield
    finally:
        if _pulse is not None:
            _pulse.show(None)


def _parent_of(pid: int) -> int | None:
    """The parent's process id; None where there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def _end_cluster(guard: int) -> None:
    """Without its main process nobody can stop a cluster, and a restart would add a second one: end what is left of it.

    This worker is the last to be signalled; like the others it hands its job back.
    """
    logger.error("the main process of this cluster is gone: ending the rest of it")
    others = Path(f"/proc/{guard}/task/{guard}/children")
    pids = [int(pid) for pid in others.read_text(encoding="ascii").split()] if others.exists() else []
    for pid in (guard, *(pid for pid in pids if pid != os.getpid()), os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _on_sigterm(_number: int, _frame: FrameType | None) -> None:
    """Sent by who stops all processes at once. An idle worker ends here and leaves the lock of the message queue free."""
    global _interruptible
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if _interruptible:
        _interruptible = False
        raise Interrupted
    raise SystemExit(128 + signal.SIGTERM)
