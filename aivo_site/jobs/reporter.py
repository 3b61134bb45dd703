"""What a running job tells the database while it works: that it lives, how far it is, what it says.

A thread with a database connection of its own does the telling, so that every report is a short transaction of its own,
visible at once, whatever transaction the handler is in, and so that a handler never waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from uuid import UUID

from django.db import InterfaceError, OperationalError, connection, connections

from aivo_site.jobs import lease, limits
from aivo_site.jobs.lease import Progress
from aivo_site.jobs.models import Job, JobLog, LogLevel

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.5
"""Progress is written at most this often."""

_CLOSING_SECONDS = 30.0


class Reporter:
    """Keeps the lease of one run, and carries progress, log lines and the wish to cancel.

    Inside a transaction of the caller (``connection.in_atomic_block``) another connection could not see the row, so
    reports are then written directly, as part of that transaction, and the lease is not renewed.
    """

    def __init__(self, job_id: UUID, *, token: UUID) -> None:
        self._job_id = job_id
        self._token = token
        self._lock = threading.Lock()
        self._progress = Progress()
        self._unwritten = False
        self._lines: list[tuple[str, str]] = []
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._direct = False
        self._written_at = 0.0
        self._polled_at = 0.0
        self.cancel_requested = False
        self.lease_lost = False

    def __enter__(self) -> Reporter:
        self._written_at = time.monotonic()
        if connection.in_atomic_block:
            self._direct = True
        else:
            self._thread = threading.Thread(target=self._work, name=f"job-{self._job_id}", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def progress(self) -> Progress:
        """The latest progress reported."""
        with self._lock:
            return self._progress

    def report(self, done: int, total: int, message: str) -> None:
        with self._lock:
            self._progress = Progress.bounded(done, total, message)
            self._unwritten = True
        if self._direct and time.monotonic() - self._written_at >= TICK_SECONDS:
            self._write()

    def log(self, message: str, level: str) -> None:
        with self._lock:
            self._lines.append((level if level in LogLevel.values else LogLevel.INFO, message))
        if self._direct:
            self._write_lines()

    def poll(self) -> bool:
        """Whether the run should stop: a cancel was asked for, or the lease is lost."""
        if self._direct and time.monotonic() - self._polled_at >= TICK_SECONDS:
            self._read_wishes()
        return self.cancel_requested or self.lease_lost

    def close(self) -> None:
        """Write what is left and stop the thread; nothing happens the second time."""
        if self._thread is None:
            if self._direct:
                self._write_lines()
            return
        self._closing.set()
        self._thread.join(_CLOSING_SECONDS)
        if self._thread.is_alive():
            logger.error("job %s: its last log lines could not be written in time", self._job_id)
        self._thread = None

    def _work(self) -> None:
        try:
            while not self._closing.wait(TICK_SECONDS):
                self._attempt()
            self._attempt(closing=True)
        finally:
            connections.close_all()

    def _attempt(self, *, closing: bool = False) -> None:
        """One round of reports; a busy or absent database is tried again at the next one, until the lease runs out."""
        try:
            self._write_lines()
            if closing:
                return
            due = time.monotonic() - self._written_at >= limits.lease().total_seconds() / 4
            if self._unwritten or due:
                self._write()
            if time.monotonic() - self._polled_at >= 2 * TICK_SECONDS:
                self._read_wishes()
        except (OperationalError, InterfaceError) as error:
            logger.warning("job %s: report not written, trying again: %s", self._job_id, error)
            connection.close()

    def _write(self) -> None:
        with self._lock:
            progress = self._progress if self._unwritten else None
            self._unwritten = False
        try:
            kept = lease.renew(self._job_id, token=self._token, progress=progress)
        except (OperationalError, InterfaceError):
            with self._lock:
                self._unwritten = self._unwritten or progress is not None
            raise
        self._written_at = time.monotonic()
        self.lease_lost = self.lease_lost or not kept

    def _write_lines(self) -> None:
        with self._lock:
            lines = list(self._lines)
        if not lines:
            return
        JobLog.objects.bulk_create(JobLog(job_id=self._job_id, level=level, message=message) for level, message in lines)
        with self._lock:
            del self._lines[: len(lines)]

    def _read_wishes(self) -> None:
        self._polled_at = time.monotonic()
        row = Job.objects.filter(id=self._job_id).values("owner", "cancel_requested_at").first()
        self.lease_lost = self.lease_lost or row is None or row["owner"] != self._token
        self.cancel_requested = self.cancel_requested or (row is not None and row["cancel_requested_at"] is not None)
