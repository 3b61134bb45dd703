"""The common ground of the product's commands: flags, exit codes, and what goes to which stream.

Standard output carries the result: a short text, or with ``--json`` exactly one object. Progress and messages go to
standard error. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 skipped with a reason.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils.translation import gettext as _

from aivo_site.errors import DomainError, Skipped, UsageError

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_SKIPPED = 0, 1, 2, 3


@dataclass(frozen=True)
class Outcome:
    """What a command did: its JSON object, the lines a person reads, and the exit code."""

    result: Mapping[str, Any]
    lines: list[str] = field(default_factory=list)
    exit_code: int = EXIT_DONE


class ProgressBar:
    """A bar on a terminal, nothing elsewhere; usable wherever a service takes ``progress(done, total, message)``."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._last = 0.0

    def __call__(self, done: int, total: int, message: str = "") -> None:
        now = time.monotonic()
        if not self._enabled or (done < total and now - self._last < 0.1):
            return
        self._last = now
        share = done / total if total else 1.0
        bar = "#" * int(30 * share)
        end = "\n" if done >= total else ""
        print(f"\r[{bar:<30}] {done}/{total} {message[:60]:<60}", end=end, file=sys.stderr, flush=True)


class AivoCommand(BaseCommand):
    """Base of every command: subclasses declare ``result_keys`` and implement ``perform``.

    Attributes:
        result_keys: keys of the JSON object; those that ``perform`` does not give are null.
        example: one line shown by ``--help``.
    """

    result_keys: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[str] = ""

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        epilog = _("Example: python manage.py %(example)s") % {"example": self.example or subcommand}
        kwargs.setdefault("formatter_class", RawDescriptionHelpFormatter)
        return super().create_parser(prog_name, subcommand, epilog=epilog, **kwargs)

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true", help=_("print exactly one JSON object on standard output"))

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:  # noqa: ARG002
        """Do the work through one service call.

        Raises:
            DomainError: refused; ``UsageError`` and ``Skipped`` choose their own exit codes.
        """
        raise AssertionError(f"{type(self).__name__} does not say what it performs")

    def handle(self, *_args: Any, **options: Any) -> None:
        as_json = bool(options["json"])
        try:
            outcome = self.perform(options, ProgressBar(enabled=not as_json or sys.stderr.isatty()))
        except (DomainError, ValueError, FileNotFoundError) as error:
            code = getattr(error, "code", "file_not_found" if isinstance(error, FileNotFoundError) else None)
            if not isinstance(code, str):
                raise
            self._finish_refused(error, code, as_json=as_json)
            return
        self._finish(outcome, as_json=as_json)

    def _finish(self, outcome: Outcome, *, as_json: bool) -> None:
        if as_json:
            self.stdout.write(self._object(outcome.result))
        else:
            for line in outcome.lines:
                self.stdout.write(line)
        if outcome.exit_code != EXIT_DONE:
            raise SystemExit(outcome.exit_code)

    def _finish_refused(self, error: Exception, code: str, *, as_json: bool) -> None:
        exit_code = _exit_code(error)
        if exit_code == EXIT_USAGE:
            raise CommandError(str(error), returncode=EXIT_USAGE)
        if as_json:
            partial = getattr(error, "result", {})
            self.stdout.write(self._object({**partial, "error": {"code": code, "message": str(error)}}))
        self.stderr.write(str(error))
        raise SystemExit(exit_code)

    def _object(self, result: Mapping[str, Any]) -> str:
        full: dict[str, Any] = dict.fromkeys(self.result_keys)
        full.update(result)
        return json.dumps(full, default=_plain, allow_nan=False)


def _exit_code(error: Exception) -> int:
    if isinstance(error, UsageError):
        return EXIT_USAGE
    return EXIT_SKIPPED if isinstance(error, Skipped) else EXIT_FAILED


def _plain(value: object) -> object:
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form")
