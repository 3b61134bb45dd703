"""Becomes a queue worker."""

from __future__ import annotations

import os
import sys
from typing import Any

from django.core.management.base import CommandParser
from django.db import connections
from django.utils.translation import gettext as _

from aivo_site.commands import AivoCommand, Outcome, ProgressBar
from aivo_site.environment import BASE_DIR
from aivo_site.jobs.janitor import release_taken
from aivo_site.jobs.models import Queue
from aivo_site.jobs.supervision import worker_environment


class Command(AivoCommand):
    help = _(
        "Serve one queue until SIGTERM, then end when the running job ends. SIGTERM to all its processes makes them hand the "
        "job back at once. Service managers that cannot notice a stuck queue start `watchdog` instead."
    )
    example = "worker --queue training"

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--queue", choices=(Queue.DEFAULT.value, Queue.TRAINING.value), default=Queue.DEFAULT.value, help=_("which queue")
        )

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:  # noqa: ARG002
        queue = options["queue"]
        environment = worker_environment(queue)
        release_taken(queue)
        connections.close_all()
        # The queue library reads its options when it is imported, so it needs a new interpreter.
        command = [sys.executable, str(BASE_DIR / "manage.py"), "qcluster"]
        os.execve(sys.executable, command, environment)  # noqa: S606 - our own interpreter and command
