"""System checks: settings under which jobs are known to run twice, be lost, or break.

Measured behaviour of the queue library behind each rule: docs/architecture.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from django.apps import AppConfig
from django.apps import apps as django_apps
from django.conf import settings
from django.contrib import admin
from django.core.checks import CheckMessage, Error, Warning

from aivo_site.jobs import queueing
from aivo_site.jobs.errors import UnknownKind, UnknownQueue
from aivo_site.jobs.models import Queue
from aivo_site.jobs.registry import get_kind

_SERVED = (Queue.DEFAULT, Queue.TRAINING)
_MESSAGES_AHEAD = 3
"""With queue_limit 1 a message may lie fetched while one worker finishes three others' time before it."""

_WORKER_COMMANDS = frozenset({"qcluster", "worker", "watchdog"})


def check_queues(app_configs: Sequence[AppConfig] | None, **_options: Any) -> list[CheckMessage]:  # noqa: ARG001
    found: list[CheckMessage] = []
    for queue in _SERVED:
        try:
            options = queueing.queue_options(queue)
        except UnknownQueue:
            hint = "Add it to Q_CLUSTER['ALT_CLUSTERS']."
            found.append(Error(f"No worker can serve the queue {queue!r}.", hint=hint, id="jobs.E001"))
            continue
        found += _check_options(queue, options)
    return found


def _check_options(queue: str, options: Any) -> list[CheckMessage]:
    found: list[CheckMessage] = []
    timeout, retry = options.get("timeout"), options.get("retry", 60)
    if not timeout or retry <= _MESSAGES_AHEAD * timeout:
        text = f"Queue {queue!r}: retry ({retry}) must exceed {_MESSAGES_AHEAD} times timeout ({timeout})."
        found.append(Error(text, hint="A message is delivered again when retry ends, even while its job runs.", id="jobs.E002"))
    if options.get("queue_limit") != 1 or options.get("bulk", 1) != 1:
        text = f"Queue {queue!r}: queue_limit and bulk must be 1, not {options.get('queue_limit')} and {options.get('bulk', 1)}."
        found.append(Error(text, hint="Fetched messages age while they wait for a worker.", id="jobs.E003"))
    if not options.get("ack_failures"):
        found.append(Error(f"Queue {queue!r}: ack_failures must be true; the job row counts its starts.", id="jobs.E004"))
    if options.get("sync"):
        found.append(Error(f"Queue {queue!r}: sync must not be set: jobs would run in the caller's transaction.", id="jobs.E005"))
    return found


def check_cluster_names(app_configs: Sequence[AppConfig] | None, **_options: Any) -> list[CheckMessage]:  # noqa: ARG001
    found: list[CheckMessage] = []
    config = settings.Q_CLUSTER
    alternatives = config.get("ALT_CLUSTERS", {})
    for name, options in alternatives.items():
        if {"name", "cluster_name"} & set(options):
            text = f"Queue {name!r} must not name itself: Q_CLUSTER['name'] is the salt of every message's signature."
            found.append(Error(text, id="jobs.E006"))
    wanted = os.environ.get("Q_CLUSTER_NAME", "")
    if wanted and wanted != config.get("name") and wanted not in alternatives:
        known = ", ".join([str(config.get("name")), *alternatives])
        text = f"Q_CLUSTER_NAME is {wanted!r}, but only these queues exist: {known}."
        found.append(Error(text, hint="A worker would run with default options and read a queue nobody writes.", id="jobs.E007"))
    if config.get("catch_up", True):
        found.append(Error("Q_CLUSTER['catch_up'] must be false: missed schedules would all fire at once.", id="jobs.E008"))
    return found


def check_databases(app_configs: Sequence[AppConfig] | None, **_options: Any) -> list[CheckMessage]:  # noqa: ARG001
    found: list[CheckMessage] = []
    for alias, database in settings.DATABASES.items():
        options = database.get("OPTIONS", {})
        if database["ENGINE"].endswith("sqlite3") and options.get("transaction_mode") != "IMMEDIATE":
            text = f"Database {alias!r}: SQLite needs OPTIONS transaction_mode IMMEDIATE."
            hint = "A transaction that reads before it writes fails at once when another process writes."
            found.append(Error(text, hint=hint, id="jobs.E009"))
        if options.get("pool") and _is_worker():
            text = f"Database {alias!r}: a connection pool must not be used in a worker."
            hint = "Worker processes would share the pool's connections. Set AIVO_PROCESS_ROLE=worker."
            found.append(Error(text, hint=hint, id="jobs.E010"))
        if database.get("CONN_MAX_AGE") and (options.get("pool") or _is_worker()):
            found.append(Error(f"Database {alias!r}: CONN_MAX_AGE must be 0 with a pool and in a worker.", id="jobs.E011"))
    return found


def check_console(app_configs: Sequence[AppConfig] | None, **_options: Any) -> list[CheckMessage]:  # noqa: ARG001
    """The queue library's own pages unpickle rows, and a schedule made there may call anything."""
    shown = [model for model in django_apps.get_app_config("django_q").get_models() if admin.site.is_registered(model)]
    return [Error(f"The queue library's page of {model.__name__} must not be in the console.", id="jobs.E012") for model in shown]


def check_schedules(app_configs: Sequence[AppConfig] | None, **_options: Any) -> list[CheckMessage]:  # noqa: ARG001
    from aivo_site.jobs.schedules import SCHEDULES

    found: list[CheckMessage] = []
    for spec in SCHEDULES:
        try:
            get_kind(spec.kind)
        except UnknownKind as error:
            found.append(Warning(f"Schedule {spec.name!r} cannot run: {error}.", id="jobs.W001"))
    return found


CHECKS = (check_queues, check_cluster_names, check_databases, check_console, check_schedules)


def _is_worker() -> bool:
    return settings.ENV.process_role == "worker" or bool(_WORKER_COMMANDS & set(sys.argv[1:2]))
