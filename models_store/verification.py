"""Is the store sound: does every file that a row points to exist with its checksum, and what lies there besides?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from models_store.errors import StoreError
from models_store.files import ALIASES, DEFAULT_MAX_BYTES, list_files, read_file, read_unverified
from models_store.garbage import GRACE
from models_store.models import MainModelVersion, VersionStatus
from models_store.references import FileReference, all_references, is_owned
from models_store.version_files import ACTIVE_POINTER, active_pointer, read_active_pointer

MAX_BYTES = 4 * DEFAULT_MAX_BYTES
POINTER_OK, POINTER_MISSING, POINTER_STALE = "ok", "missing", "stale"


@dataclass
class StoreReport:
    """What ``verify_store`` found.

    Attributes:
        files: files checked.
        missing, corrupt: ``alias:path`` of files that rows point to and that are not there, or are not what they were.
        orphaned: ``alias:path`` of files that no row points to: strangers, and leftovers that garbage collection is due to
            remove. waiting: leftovers of the last day, such as a tail that its learner's next one has replaced; a file whose
            row is about to be written may be among them.
        active_pointer: ``ok``, ``missing`` or ``stale``; None while there is neither an active version nor a pointer.
        problems: a sentence for each missing or damaged file and for the pointer.
    """

    files: int = 0
    missing: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    orphaned: list[str] = field(default_factory=list)
    waiting: int = 0
    active_pointer: str | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Counts under the command's keys, names and sentences beside them."""
        return {
            "files": self.files,
            "missing": len(self.missing),
            "corrupt": len(self.corrupt),
            "orphaned": len(self.orphaned),
            "active_pointer": self.active_pointer,
            "waiting": self.waiting,
            "missing_files": self.missing,
            "corrupt_files": self.corrupt,
            "orphaned_files": self.orphaned,
            "problems": self.problems,
        }


def verify_store(*, progress: Callable[[int, int, str], None] | None = None) -> StoreReport:
    """Check every file that a row points to; nothing is changed."""
    # Files are listed before rows are read: a file whose row commits in between is then not taken for an orphan.
    present = [(alias, found) for alias in ALIASES for found in list_files(alias=alias)]
    report = StoreReport()
    referenced: set[tuple[str, str]] = set()
    damaged: list[tuple[FileReference, StoreError]] = []
    for reference in all_references():
        key = (reference.alias, reference.path)
        if key in referenced:
            continue
        referenced.add(key)
        if not reference.required:
            continue
        report.files += 1
        error = _damage(reference)
        if error is not None:
            damaged.append((reference, error))
        if progress:
            progress(report.files, max(report.files, len(present)), reference.path)
    _report_damage(damaged, report)
    young = time.time() - GRACE.total_seconds()
    for alias, found in present:
        if (alias, found.path) in referenced:
            continue
        if found.modified >= young and (found.is_temporary or is_owned(alias, found.path)):
            report.waiting += 1
        else:
            report.orphaned.append(f"{alias}:{found.path}")
    _check_pointer(report)
    return report


def _damage(reference: FileReference) -> StoreError | None:
    try:
        if reference.sha256:
            read_file(alias=reference.alias, path=reference.path, sha256=reference.sha256, max_bytes=MAX_BYTES)
        else:
            read_unverified(alias=reference.alias, path=reference.path, max_bytes=MAX_BYTES)
    except StoreError as error:
        return error
    return None


def _report_damage(damaged: list[tuple[FileReference, StoreError]], report: StoreReport) -> None:
    """Report what rows still point to: a row may have moved on, and its old file been collected, while we were reading."""
    if not damaged:
        return
    still = set(all_references())
    for reference, error in damaged:
        if reference not in still:
            report.files -= 1
            continue
        (report.missing if error.code == "missing_file" else report.corrupt).append(f"{reference.alias}:{reference.path}")
        report.problems.append(str(error))


def _check_pointer(report: StoreReport) -> None:
    row = MainModelVersion.objects.filter(status=VersionStatus.ACTIVE).first()
    try:
        pointer = read_active_pointer()
    except StoreError as error:
        report.active_pointer = POINTER_STALE
        report.problems.append(str(error))
        return
    if row is None and pointer is None:
        return
    if row is not None and pointer == active_pointer(row):
        report.active_pointer = POINTER_OK
        return
    report.active_pointer = POINTER_MISSING if pointer is None else POINTER_STALE
    expected = row.version if row is not None else "no version"
    actual = pointer.get("version") if pointer is not None else None
    report.problems.append(f"{ACTIVE_POINTER} names {actual or 'nothing'}, the database says {expected}")
