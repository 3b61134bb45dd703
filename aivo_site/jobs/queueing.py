"""The messages: the one module that talks to the queue's broker.

A message carries a job's id and nothing else. With the database as broker it is a row of the same database, written in
the caller's transaction; with Redis it is sent after the commit, and the janitor repairs what is lost in between.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import transaction
from django.utils import timezone
from django_q.exceptions import TimeoutException
from django_q.models import OrmQ
from django_q.tasks import async_task

from aivo_site.jobs.errors import UnknownQueue
from aivo_site.jobs.models import Job, Queue

logger = logging.getLogger(__name__)

RUN_JOB = "aivo_site.jobs.runner.run_queued_job"
"""What a message names; workers import it by this path."""

QueueTimeout = TimeoutException
"""Raised by the queue in the middle of a task that runs for too long."""


@dataclass(frozen=True)
class Message:
    """One message of the database broker: its row, when it becomes due, and the job it is for (None: a schedule's)."""

    id: int
    due_at: datetime
    job_id: UUID | None


def cluster_name(queue: str) -> str:
    """The queue library's name of one of our queues.

    Raises:
        UnknownQueue: no worker could be started for it with these settings.
    """
    config = settings.Q_CLUSTER
    if queue == Queue.DEFAULT:
        return str(config["name"])
    if queue in config.get("ALT_CLUSTERS", {}):
        return queue
    known = [Queue.DEFAULT.value, *config.get("ALT_CLUSTERS", {})]
    raise UnknownQueue(f"queue must be one of {', '.join(known)}, not {queue!r}")


def queue_options(queue: str) -> Mapping[str, Any]:
    """The options that a worker of the queue runs with."""
    base = {key: value for key, value in settings.Q_CLUSTER.items() if key != "ALT_CLUSTERS"}
    name = cluster_name(queue)
    return base if queue == Queue.DEFAULT else {**base, **settings.Q_CLUSTER["ALT_CLUSTERS"][name]}


def own_queue() -> str:
    """The queue that this worker process serves."""
    name = os.environ.get("Q_CLUSTER_NAME", "")
    return Queue.DEFAULT.value if name in ("", settings.Q_CLUSTER["name"]) else name


def in_database() -> bool:
    """Whether messages are rows of the database."""
    return bool(settings.Q_CLUSTER.get("orm"))


def send(job: Job) -> None:
    """Send the job's message: within the current transaction where the database is the broker, else on commit.

    Raises:
        UnknownQueue: the job's queue is not served.
    """
    cluster = cluster_name(job.queue)
    if in_database():
        _send(job.id, cluster)
    else:
        transaction.on_commit(partial(_send, job.id, cluster))


def waiting_messages(queue: str, *, limit: int | None = None) -> list[Message]:
    """The (first ``limit``) messages of a queue in the database broker, oldest first, without those that cannot be read."""
    messages = []
    for row in OrmQ.objects.filter(key=cluster_name(queue)).order_by("id")[:limit].iterator(chunk_size=500):
        task = row.task
        if "func" not in task:
            logger.warning("message %s cannot be read (was SECRET_KEY changed?); the queue will drop it", row.pk)
            continue
        job_id = UUID(task["args"][0]) if task["func"] == RUN_JOB else None
        messages.append(Message(row.pk, row.lock, job_id))
    return messages


def make_due(messages: list[Message]) -> int:
    """Let messages be fetched again at once: whoever fetched them is gone."""
    now = timezone.now()
    return sum(OrmQ.objects.filter(pk=message.id, lock=message.due_at).update(lock=now) for message in messages)


def _send(job_id: UUID, cluster: str) -> None:
    async_task(RUN_JOB, str(job_id), cluster=cluster, save=False, task_name=f"job {job_id}")
    now = timezone.now()
    Job.objects.filter(id=job_id).update(sent_at=now, updated_at=now)
