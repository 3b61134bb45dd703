"""collect_garbage: remove files that no row points to."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, ClassVar

from django.core.management.base import CommandParser
from django.utils.translation import gettext as _

from aivo_site.commands import AivoCommand, Outcome, ProgressBar
from aivo_site.errors import UsageError
from models_store.garbage import GRACE, collect_garbage


class Command(AivoCommand):
    help = "Remove files that no row has pointed to for a day: left behind by what was interrupted or has moved on."
    example: ClassVar[str] = "collect_garbage --dry-run"
    result_keys: ClassVar[tuple[str, ...]] = ("removed", "bytes", "kept_recent", "unknown", "pointer_repaired", "dry_run")

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        hours = GRACE.total_seconds() / 3600
        parser.add_argument("--older-than-hours", type=float, default=hours, help=_("only files last changed before (24)"))
        parser.add_argument("--dry-run", action="store_true", help=_("say what would be removed, and remove nothing"))

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:  # noqa: ARG002
        hours = options["older_than_hours"]
        if not 0.0 <= hours < 1e6:
            raise UsageError(_("--older-than-hours must be 0 or more, not %(hours)s") % {"hours": hours})
        report = collect_garbage(older_than=timedelta(hours=hours), dry_run=options["dry_run"])
        result = {**report.to_json(), "dry_run": options["dry_run"]}
        removed = _("to be removed") if options["dry_run"] else _("removed")
        lines = [f"{len(report.removed)} {removed} ({report.bytes} bytes)", *report.removed]
        if report.unknown:
            lines.append(_("not of this store, left alone: %(names)s") % {"names": ", ".join(report.unknown)})
        return Outcome(result, lines)
