"""Importing interactions from the canonical CSV.

The file is read twice. The first pass only proves that it can be read to its end (gzip whole, UTF-8 throughout, header
right); a file that fails is refused and nothing has changed. The second pass takes rows in batches, each a short
transaction: a bad row costs that row alone, and importing the same file again changes nothing. Memory does not grow with
the file, except in a dry run, which keeps about 300 bytes per learner.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from django.utils import timezone
from django.utils.translation import gettext as _

from aivo_site.audit import services as audit
from learners.consents import ConsentGiven
from learners.csv_records import RAW_KEPT
from learners.csv_rows import InteractionCsv, ParsedRow, Reject
from learners.errors import ImportFileError
from learners.import_scratch import ImportScratch
from learners.intake import BATCH_ROWS, InteractionIntake, Outcome
from learners.models import Organisation, Pool
from learners.registration import DEFAULT_ORGANISATION, register_organisation
from learners.rejects import RejectsFile

Progress = Callable[[int, int, str], None]

_FIRST_REJECTS = 5


@dataclass
class ImportReport:
    """What an import did; ``rows_read = rows_imported + rows_duplicate + rows_rejected``.

    Attributes:
        rows_read: records after the header, empty lines not counted.
        rejected_by_reason: stable reason -> rows.
        learners: learners of the file with at least one accepted or known row.
        consented: those of them who hold every consent that was asked for (none asked for: any consent); 0 in a dry run.
        rejects_file: where the refused rows are, or None.
        seconds: wall time, both passes.
        learners_created: how many were new; 0 in a dry run.
        first_rejects: the first five refused rows.
        dry_run: nothing was written.
    """

    rows_read: int = 0
    rows_imported: int = 0
    rows_duplicate: int = 0
    rows_rejected: int = 0
    rejected_by_reason: dict[str, int] = field(default_factory=dict)
    learners: int = 0
    consented: int = 0
    rejects_file: str | None = None
    seconds: float = 0.0
    learners_created: int = 0
    first_rejects: list[Reject] = field(default_factory=list)
    dry_run: bool = False


def import_interactions(
    *,
    source: Path | str | BinaryIO,
    pool: str,
    organisation: Organisation | None = None,
    consent: ConsentGiven | None,
    dry_run: bool = False,
    rejects_file: Path | None = None,
    progress: Progress | None = None,
    actor: str = "import_interactions",
) -> ImportReport:
    """Import a file of interactions into a pool; see the module's text for what happens to bad files and bad rows.

    Args:
        source: path, or a binary file that can seek; plain or gzip, told by its first bytes.
        pool: a ``Pool``; rows of learners of another pool are refused.
        organisation: of new learners, and then rows of learners of another one are refused. None: new learners get the
            organisation ``default``, known learners keep theirs.
        consent: given to all learners of the file, except where it was withdrawn since; None: new learners have no consent.
        dry_run: give every verdict and write nothing to the database.
        rejects_file: CSV for the refused rows, written if there are any; None: they are only counted.
        progress: called with bytes read, bytes in all, and a text.
        actor: for the audit log.

    Raises:
        ImportFileError: the file as a whole cannot be used (its ``code`` says why), or ``unknown_pool``,
            ``bad_rejects_file``. Nothing has changed.
    """
    started = time.monotonic()
    if pool not in Pool.values:
        message = _("Pool %(pool)r is unknown; allowed: %(allowed)s.")
        raise ImportFileError(message % {"pool": str(pool)[:40], "allowed": ", ".join(Pool.values)}, code="unknown_pool")
    _check_rejects_place(rejects_file, source)
    with _opened(source) as file, ImportScratch() as scratch, RejectsFile(rejects_file) as rejects:
        table = InteractionCsv(file, now=timezone.now(), count_occurrence=scratch.count_occurrence)
        intake = InteractionIntake(
            pool=pool,
            organisation=organisation or _default_organisation(dry_run=dry_run),
            strict_organisation=organisation is not None,
            consent=consent,
            scratch=scratch,
            dry_run=dry_run,
        )
        report = ImportReport(dry_run=dry_run)
        _Run(table, file, intake, rejects, report, progress).all_batches()
        report.rejects_file = rejects.written
        report.learners, report.consented = scratch.learner_counts()
        report.learners_created = intake.learners_created
    if report.rows_imported or intake.consent_events:
        _record_in_audit_log(report, pool, intake.consent_events, actor, dry_run=dry_run)
    report.seconds = round(time.monotonic() - started, 3)
    return report


class _Run:
    """One pass over the rows: batches in, counts and rejects out."""

    def __init__(
        self,
        table: InteractionCsv,
        file: BinaryIO,
        intake: InteractionIntake,
        rejects: RejectsFile,
        report: ImportReport,
        progress: Progress | None,
    ) -> None:
        self._table = table
        self._file = file
        self._intake = intake
        self._rejects = rejects
        self._report = report
        self._progress = progress
        self._reasons: Counter[str] = Counter()
        self._bytes = _length(file)

    def all_batches(self) -> None:
        batch: list[ParsedRow | Reject] = []
        for row in self._table.rows():
            batch.append(row)
            if len(batch) == BATCH_ROWS:
                self._take(batch)
                batch.clear()
        self._take(batch)
        self._report.rejected_by_reason = dict(sorted(self._reasons.items()))

    def _take(self, batch: list[ParsedRow | Reject]) -> None:
        report = self._report
        rows = [row for row in batch if isinstance(row, ParsedRow)]
        verdicts = dict(zip((row.line for row in rows), self._intake.take(rows), strict=True)) if rows else {}
        for row in batch:
            report.rows_read += 1
            if isinstance(row, Reject):
                self._reject(row)
                continue
            verdict = verdicts[row.line]
            if verdict.outcome is Outcome.IMPORTED:
                report.rows_imported += 1
            elif verdict.outcome is Outcome.DUPLICATE:
                report.rows_duplicate += 1
            else:
                self._reject(Reject(row.line, verdict.reason, verdict.message, row.raw[:RAW_KEPT]))
        if self._progress is not None:
            self._progress(self._file.tell(), self._bytes, _("%(rows)d rows") % {"rows": report.rows_read})

    def _reject(self, reject: Reject) -> None:
        self._report.rows_rejected += 1
        self._reasons[reject.reason] += 1
        if len(self._report.first_rejects) < _FIRST_REJECTS:
            self._report.first_rejects.append(reject)
        self._rejects.add(reject)


@contextmanager
def _opened(source: Path | str | BinaryIO) -> Iterator[BinaryIO]:
    if not isinstance(source, (str, Path)):
        if not source.seekable():
            raise ImportFileError(_("The file is read twice, so it must be able to seek."), code="not_seekable")
        yield source
        return
    path = Path(source)
    if not path.exists():
        raise ImportFileError(_("The file %(name)s does not exist.") % {"name": path.name}, code="file_not_found")
    if not path.is_file():
        raise ImportFileError(_("%(name)s is not a regular file.") % {"name": path.name}, code="not_a_file")
    try:
        file = path.open("rb")
    except OSError as error:
        message = _("The file %(name)s cannot be read: %(why)s.") % {"name": path.name, "why": error.strerror}
        raise ImportFileError(message, code="file_not_readable") from error
    with file:
        yield file


def _check_rejects_place(rejects_file: Path | None, source: Path | str | BinaryIO) -> None:
    if rejects_file is None:
        return
    if not rejects_file.parent.is_dir() or rejects_file.is_dir():
        message = _("rejects_file must be a file name in a folder that exists, not %(path)s.") % {"path": rejects_file}
        raise ImportFileError(message, code="bad_rejects_file")
    if isinstance(source, (str, Path)) and rejects_file.exists() and rejects_file.samefile(source):
        raise ImportFileError(_("rejects_file must not be the imported file itself."), code="bad_rejects_file")


def _default_organisation(*, dry_run: bool) -> Organisation:
    if dry_run:
        stored: Organisation | None = Organisation.objects.filter(slug=DEFAULT_ORGANISATION).first()
        return stored or Organisation(slug=DEFAULT_ORGANISATION)
    return register_organisation(slug=DEFAULT_ORGANISATION, name=_("Default organisation"))


def _length(file: BinaryIO) -> int:
    place = file.tell()
    length = file.seek(0, 2)
    file.seek(place)
    return length


def _record_in_audit_log(report: ImportReport, pool: str, consents: int, actor: str, *, dry_run: bool) -> None:
    if dry_run:
        return
    audit.record(
        action="interactions.imported",
        actor=actor,
        data={
            "pool": pool,
            "rows_imported": report.rows_imported,
            "rows_duplicate": report.rows_duplicate,
            "rows_rejected": report.rows_rejected,
            "learners": report.learners,
            "learners_created": report.learners_created,
            "consent_events": consents,
        },
    )
