"""Starts a queue's worker processes in a process group of their own, ends them whole, and notices when they are stuck.

A cluster of workers can look alive and take no messages: a worker that dies at the wrong moment keeps the lock of the
queue between the processes. Seen from outside, messages then grow old while no worker of the cluster is at work; that, not
a heartbeat, is what counts here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import connections
from django.db.models import Max
from django.utils import timezone

from aivo_site.environment import BASE_DIR
from aivo_site.jobs import preparations, queueing
from aivo_site.jobs.child import die_with
from aivo_site.jobs.janitor import release_taken
from aivo_site.jobs.models import Job, JobState, WorkerHeartbeat
from aivo_site.jobs.workers import PULSE_SECONDS

logger = logging.getLogger(__name__)

_MESSAGES_LOOKED_AT = 200
_HAND_BACK_SECONDS = 5.0
_PAUSES = (1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class QueueState:
    """How old the oldest waiting message is, how many workers are at work, and how long ago a job was first taken."""

    queue: str
    oldest_seconds: float
    busy_workers: int
    last_taken_seconds: float | None

    def stuck(self, max_age: float) -> bool:
        """Whether messages grow old with nobody at work.

        True for a moment also where a long job has just ended: ask twice, some seconds apart.
        """
        moving = self.last_taken_seconds is not None and self.last_taken_seconds <= max_age
        return self.oldest_seconds > max_age and self.busy_workers == 0 and not moving


def queue_state(queue: str, *, group: int | None = None) -> QueueState:
    """Look at a queue from outside.

    ``group``: count only this host's workers that belong to the process group; None counts every host's.
    """
    now = timezone.now()
    waiting = [moment for moment in _waiting_since(queue, now) if moment < now]
    oldest = (now - min(waiting)).total_seconds() if waiting else 0.0
    taken = Job.objects.filter(queue=queue).aggregate(last=Max("started_at"))["last"]
    return QueueState(queue, oldest, _busy_workers(queue, group, now), (now - taken).total_seconds() if taken else None)


class ClusterProcess:
    """One ``qcluster`` and everything it starts, in a session of its own; it stops when this process dies."""

    def __init__(self, queue: str) -> None:
        parent = os.getpid()
        self.started_at = timezone.now()
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and command
            [sys.executable, str(BASE_DIR / "manage.py"), "qcluster"],
            env=worker_environment(queue),
            cwd=BASE_DIR,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=partial(die_with, parent, signal.SIGTERM),  # safe: this process has one thread
        )

    @property
    def group(self) -> int:
        return self._process.pid

    def ended(self) -> bool:
        """Whether the main process is gone; what it started may live on."""
        return self._process.poll() is not None

    def stop(self, timeout: float) -> None:
        """Let running jobs end for ``timeout`` seconds, then have workers hand theirs back, then kill what is left."""
        with contextlib.suppress(ProcessLookupError):
            if not self.ended():
                self._process.send_signal(signal.SIGTERM)
                self._wait_until_idle(timeout)
            os.killpg(self.group, signal.SIGTERM)
            self._wait_until_idle(_HAND_BACK_SECONDS)
            os.killpg(self.group, signal.SIGKILL)
        self._process.wait()

    def _wait_until_idle(self, seconds: float) -> None:
        """Wait until nothing of the group lives but the main process, which may wait for ever for one that is gone."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and _members(self.group) - {self.group}:
            self.ended()
            time.sleep(0.1)


class Watchdog:
    """Keeps one queue's workers running until it is told to stop.

    ``max_age``: seconds after which a message that nobody takes means that they are stuck.
    """

    def __init__(self, queue: str, *, max_age: float, interval: float, stop_timeout: float) -> None:
        queueing.cluster_name(queue)
        self._queue = queue
        self._max_age = max_age
        self._interval = interval
        self._stop_timeout = stop_timeout
        self._stopping = False
        self._failures = 0
        self.restarts = 0

    def stop(self, *_signal: Any) -> None:
        """End the watch at the next look; usable as a signal handler."""
        self._stopping = True

    def watch(self) -> None:
        """Prepare the machine, start the workers, and start them again whenever they end or are stuck."""
        preparations.prepare(self._queue)
        while not self._stopping:
            reason = self._run_once()
            if not self._stopping:
                self.restarts += 1
                logger.error("queue %s: workers %s; starting them again", self._queue, reason)
                self._pause(lambda: False, _PAUSES[min(self._failures, len(_PAUSES) - 1)])

    def _run_once(self) -> str:
        """Start the workers and see them end; returns why in words. Nothing of them is left."""
        released = release_taken(self._queue)
        if released:
            logger.info("queue %s: %d fetched messages are due again", self._queue, released)
        connections.close_all()
        cluster = ClusterProcess(self._queue)
        try:
            return self._watch_one(cluster)
        finally:
            cluster.stop(self._stop_timeout if self._stopping else _HAND_BACK_SECONDS)

    def _watch_one(self, cluster: ClusterProcess) -> str:
        stuck = False
        while not self._stopping:
            if self._pause(cluster.ended, self._interval):
                self._failures += 1
                return "ended"
            if (timezone.now() - cluster.started_at).total_seconds() <= self._max_age:
                continue
            self._failures = 0
            before, stuck = stuck, queue_state(self._queue, group=cluster.group).stuck(self._max_age)
            if before and stuck:
                return "took no messages"
        return "were told to stop"

    def _pause(self, done: Callable[[], bool], seconds: float) -> bool:
        """Wait in small steps, so that signals count at once; True as soon as ``done()`` is."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stopping:
            if done():
                return True
            time.sleep(0.1)
        return done()


def worker_environment(queue: str) -> dict[str, str]:
    """The environment in which ``qcluster`` serves a queue."""
    name = queueing.cluster_name(queue)
    environment = {**os.environ, "AIVO_PROCESS_ROLE": "worker"}
    environment.pop("Q_CLUSTER_NAME", None)
    if name != settings.Q_CLUSTER["name"]:
        environment["Q_CLUSTER_NAME"] = name
    return environment


def _waiting_since(queue: str, now: datetime) -> list[datetime]:
    """Since when each message that should have been taken has waited."""
    if not queueing.in_database():
        return list(_queued(queue).values_list("sent_at", flat=True)[:_MESSAGES_LOOKED_AT])
    messages = queueing.waiting_messages(queue, limit=_MESSAGES_LOOKED_AT)
    ids = [message.job_id for message in messages if message.job_id]
    jobs = list(_queued(queue).filter(id__in=ids).values_list("sent_at", flat=True))
    return jobs + [message.due_at for message in messages if message.job_id is None and message.due_at <= now]


def _queued(queue: str) -> Any:
    return Job.objects.filter(queue=queue, state=JobState.QUEUED, sent_at__isnull=False).order_by("sent_at")


def _busy_workers(queue: str, group: int | None, now: datetime) -> int:
    seen = WorkerHeartbeat.objects.filter(
        queue=queue, current_job__isnull=False, last_seen_at__gte=now - timedelta(seconds=3 * PULSE_SECONDS)
    )
    if group is None:
        return seen.count()
    pids = seen.filter(host=socket.gethostname()).values_list("pid", flat=True)
    return sum(_group_of(pid) == group for pid in pids)


def _members(group: int) -> set[int]:
    """The living processes of a process group."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _parent, entry_group = entry.read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()[:3]
            if int(entry_group) == group and state != "Z":
                found.add(int(entry.parent.name))
    return found


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
