"""Commands that are jobs: run here, or left to a worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from django.core.management.base import CommandParser
from django.utils.translation import gettext as _

from aivo_site.commands import EXIT_DONE, AivoCommand, Outcome, ProgressBar
from aivo_site.jobs.services import enqueue, run_inline


class JobCommand(AivoCommand):
    """Base of such commands: subclasses name the kind, make its parameters from the options and describe its result."""

    kind: ClassVar[str] = ""

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        where = parser.add_mutually_exclusive_group()
        where.add_argument("--inline", action="store_true", help=_("do the work in this process (the default)"))
        where.add_argument("--background", action="store_true", help=_("leave the work to a worker and return at once"))

    def params(self, options: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """The job's parameters.

        Raises:
            UsageError: an option's value is outside its range.
        """
        raise AssertionError(f"{type(self).__name__} does not say its parameters")

    def lines(self, result: Mapping[str, Any]) -> list[str]:  # noqa: ARG002
        """What a person reads of the result."""
        raise AssertionError(f"{type(self).__name__} does not describe its result")

    def exit_code(self, result: Mapping[str, Any]) -> int:  # noqa: ARG002
        return EXIT_DONE

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:
        params = self.params(options)
        if options["background"]:
            job = enqueue(kind=self.kind, params=params)
            return Outcome({"job": job.id}, [_("Job %(id)s waits for a worker.") % {"id": job.id}])
        job = run_inline(kind=self.kind, params=params, progress=progress)
        result: dict[str, Any] = {**(job.result or {}), "job": job.id}
        return Outcome(result, self.lines(result), self.exit_code(result))
