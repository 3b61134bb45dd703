"""Import interactions from a canonical CSV file."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from django.core.management.base import CommandParser
from django.utils.translation import gettext as _

from aivo_site.commands import EXIT_DONE, EXIT_FAILED, EXIT_SKIPPED, AivoCommand, Outcome, ProgressBar
from aivo_site.errors import UsageError
from learners.consents import ConsentGiven, known_kind
from learners.errors import ConsentError
from learners.importing import ImportReport, import_interactions
from learners.models import Pool
from learners.registration import find_organisation


class Command(AivoCommand):
    help = _("Import interactions from a CSV file, plain or gzip; bad rows are reported, good rows go in.")
    example = (
        "import_interactions logs.csv.gz --pool federated --consent training,contribution "
        '--authority "guardians, signed forms of 2025-09"'
    )
    result_keys = (
        "rows_read", "rows_imported", "rows_duplicate", "rows_rejected", "rejected_by_reason", "learners", "consented",
        "rejects_file", "seconds", "learners_created", "first_rejects", "dry_run",
    )  # fmt: skip

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("file", type=Path, help=_("canonical CSV; gzip is recognised by content"))
        parser.add_argument("--pool", required=True, choices=[pool.lower() for pool in Pool.values])
        parser.add_argument("--organisation", metavar="SLUG", help=_("of new learners; rows of other organisations are refused"))
        parser.add_argument("--consent", metavar="KINDS", help=_("comma separated: training, contribution, external_transfer"))
        parser.add_argument("--authority", default="", help=_("who decided for the learners, and how; needed with --consent"))
        parser.add_argument("--dry-run", action="store_true", help=_("report what would happen and change nothing"))
        parser.add_argument("--rejects-file", type=Path, help=_("default: the input's name with .rejects.csv beside it"))

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:
        report = import_interactions(
            source=options["file"],
            pool=options["pool"].upper(),
            organisation=find_organisation(slug=options["organisation"]) if options["organisation"] else None,
            consent=_consent(options["consent"], options["authority"]),
            dry_run=options["dry_run"],
            rejects_file=options["rejects_file"] or _rejects_place(options["file"], dry_run=options["dry_run"]),
            progress=progress,
        )
        return Outcome(_result(report), _lines(report, options["consent"]), _exit_code(report))


def _consent(kinds: str | None, authority: str) -> ConsentGiven | None:
    if kinds is None:
        if authority:
            raise UsageError(_("--authority says who gave the consents named by --consent; name them."))
        return None
    try:
        names = tuple(known_kind(name.strip()) for name in kinds.split(",") if name.strip())
        return ConsentGiven(names, authority, "import_interactions")
    except ConsentError as error:
        raise UsageError(f"--consent, --authority: {error}", code=error.code) from error


def _rejects_place(file: Path, *, dry_run: bool) -> Path | None:
    """Beside the input, or in the current folder where that one cannot be written; a dry run writes none unasked."""
    if dry_run:
        return None
    folder = file.parent if _open_to_writing(file.parent) else Path.cwd()
    return folder / f"{file.name}.rejects.csv"


def _open_to_writing(folder: Path) -> bool:
    """A folder without any write bit is meant to stay as it is, even where the superuser could write."""
    return folder.is_dir() and os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


def _result(report: ImportReport) -> dict[str, Any]:
    """The report without the text of refused rows: what is printed ends up in logs."""
    shown = [{"line": one.line, "reason": one.reason, "message": one.message} for one in report.first_rejects]
    return {**asdict(report), "first_rejects": shown}


def _exit_code(report: ImportReport) -> int:
    """Failed where every row was refused; skipped where there was no row."""
    if report.rows_read == 0:
        return EXIT_SKIPPED
    return EXIT_FAILED if report.rows_rejected == report.rows_read else EXIT_DONE


def _lines(report: ImportReport, consent: str | None) -> list[str]:
    lines = [_("Dry run: nothing was written.")] if report.dry_run else []
    if report.rows_read == 0:
        return [*lines, _("Nothing to import: the file has a header and no rows.")]
    lines += [
        _("%(read)d rows read: %(imported)d imported, %(duplicate)d known already, %(rejected)d refused (%(seconds).1f s)")
        % {
            "read": report.rows_read,
            "imported": report.rows_imported,
            "duplicate": report.rows_duplicate,
            "rejected": report.rows_rejected,
            "seconds": report.seconds,
        },
        _("%(learners)d learners, %(created)d of them new") % {"learners": report.learners, "created": report.learners_created},
    ]
    lines += [f"  {reason}: {count}" for reason, count in report.rejected_by_reason.items()]
    for reject in report.first_rejects:
        lines.append(_("  line %(line)d: %(message)s") % {"line": reject.line, "message": reject.message})
    if report.rejects_file:
        lines.append(_("Refused rows: %(path)s") % {"path": report.rejects_file})
    if report.dry_run:
        return lines
    if consent is None:
        lines.append(_("No --consent was given: new learners have no consent, and nothing is trained on them without it."))
    else:
        lines.append(_("%(count)d learners hold the consents %(kinds)s") % {"count": report.consented, "kinds": consent})
        if report.consented < report.learners:
            lines.append(_("The others withdrew theirs earlier; record_consent can give it again."))
    return lines
