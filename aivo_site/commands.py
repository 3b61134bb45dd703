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
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import numpy as np
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils.functional import Promise
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
            # What a library prints must not mix with the result.
            with redirect_stdout(sys.stderr):
                outcome = self.perform(options, ProgressBar(enabled=True))
            text = self._object(outcome.result) if as_json else "\n".join(outcome.lines)
        except Exception as error:  # noqa: BLE001 - each is either told or raised again
            self._finish_refused(error, as_json=as_json)
            return
        if text:
            self.stdout.write(text)
        if outcome.exit_code != EXIT_DONE:
            raise SystemExit(outcome.exit_code)

    def _finish_refused(self, error: Exception, *, as_json: bool) -> None:
        """Say why: an expected refusal in words, a fault of the program by its traceback (exit 1 as well)."""
        if isinstance(error, CommandError):
            raise error
        code = _refusal_code(error)
        exit_code = _exit_code(error)
        if exit_code == EXIT_USAGE:
            raise CommandError(str(error), returncode=EXIT_USAGE) from error
        if as_json:
            partial = getattr(error, "result", None) or {}
            told = {"code": code or "unexpected_error", "message": str(error) or type(error).__name__}
            self.stdout.write(self._object({**partial, "error": told}))
        if code is None:
            raise error
        self.stderr.write(str(error))
        raise SystemExit(exit_code)

    def _object(self, result: Mapping[str, Any]) -> str:
        full: dict[str, Any] = dict.fromkeys(self.result_keys)
        full.update(result)
        return json.dumps(full, default=_plain, allow_nan=False)


def _refusal_code(error: Exception) -> str | None:
    """The stable code of an expected refusal; None for a fault of the program."""
    if isinstance(error, FileNotFoundError):
        return "file_not_found"
    code = getattr(error, "code", None) if isinstance(error, DomainError | ValueError) else None
    return code if isinstance(code, str) else None


def _exit_code(error: Exception) -> int:
    if isinstance(error, UsageError):
        return EXIT_USAGE
    return EXIT_SKIPPED if isinstance(error, Skipped) else EXIT_FAILED


def _plain(value: object) -> object:
    if isinstance(value, UUID | Path | Promise):
        return str(value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")
