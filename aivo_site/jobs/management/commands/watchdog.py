"""Keeps queue workers running."""

from __future__ import annotations

import signal
from dataclasses import asdict
from typing import Any

from django.core.management.base import CommandParser
from django.utils.translation import gettext as _

from aivo_site.commands import EXIT_DONE, EXIT_FAILED, AivoCommand, Outcome, ProgressBar
from aivo_site.errors import UsageError
from aivo_site.jobs.models import Queue
from aivo_site.jobs.supervision import Watchdog, queue_state


class Command(AivoCommand):
    help = _(
        "For service managers: serve one queue, and start its workers again when they end or when messages grow old while "
        "none of them works. SIGTERM ends it cleanly."
    )
    example = "watchdog --queue training --max-age 120"
    result_keys = ("queue", "oldest_seconds", "busy_workers", "last_taken_seconds", "stuck", "restarts")

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--queue", choices=(Queue.DEFAULT.value, Queue.TRAINING.value), default=Queue.DEFAULT.value, help=_("which queue")
        )
        parser.add_argument("--max-age", type=float, default=120.0, help=_("seconds a message may wait for idle workers"))
        parser.add_argument("--interval", type=float, default=5.0, help=_("seconds between two looks"))
        parser.add_argument("--stop-timeout", type=float, default=60.0, help=_("seconds that running jobs may take on SIGTERM"))
        parser.add_argument("--once", action="store_true", help=_("start nothing: look once, exit 1 if the queue is stuck"))

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:  # noqa: ARG002
        for name in ("max_age", "interval", "stop_timeout"):
            if options[name] <= 0:
                raise UsageError(
                    _("--%(name)s must be above 0, not %(value)s") % {"name": name.replace("_", "-"), "value": options[name]}
                )
        if options["once"]:
            return self._look(options["queue"], options["max_age"])
        watchdog = Watchdog(
            options["queue"],
            max_age=options["max_age"],
            interval=options["interval"],
            stop_timeout=options["stop_timeout"],
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, watchdog.stop)
        watchdog.watch()
        return Outcome({"queue": options["queue"], "restarts": watchdog.restarts}, [_("Stopped.")])

    def _look(self, queue: str, max_age: float) -> Outcome:
        state = queue_state(queue)
        stuck = state.stuck(max_age)
        line = _("Queue %(queue)s: oldest message %(age).0f s, %(busy)d workers at work.") % {
            "queue": queue,
            "age": state.oldest_seconds,
            "busy": state.busy_workers,
        }
        return Outcome({**asdict(state), "stuck": stuck}, [line], EXIT_FAILED if stuck else EXIT_DONE)
