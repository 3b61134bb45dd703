"""Removal of files that no row points to: left behind by what was interrupted, or by what has moved on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from models_store.errors import StoreError
from models_store.files import ALIASES, delete_file, list_files
from models_store.local_files import FoundFile
from models_store.references import all_references, is_owned
from models_store.versions import refresh_active_pointer

GRACE = timedelta(days=1)
"""A file younger than this may be of a write that is still going on, its row not yet committed."""


@dataclass
class GarbageReport:
    """What ``collect_garbage`` did.

    Attributes:
        removed: ``alias:path`` of files removed (or, in a dry run, to be removed).
        bytes: their size together.
        kept_recent: unreferenced files too young to be removed.
        unknown: ``alias:path`` of files that are none of the store's own kinds: reported, never removed.
        pointer_repaired: whether ``ACTIVE.json`` did not say what the database says and was written again.
    """

    removed: list[str] = field(default_factory=list)
    bytes: int = 0
    kept_recent: int = 0
    unknown: list[str] = field(default_factory=list)
    pointer_repaired: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "removed": len(self.removed),
            "bytes": self.bytes,
            "kept_recent": self.kept_recent,
            "unknown": self.unknown,
            "pointer_repaired": self.pointer_repaired,
        }


def collect_garbage(*, older_than: timedelta = GRACE, dry_run: bool = False) -> GarbageReport:
    """Remove unreferenced files of the store's own kinds, and temporary ones, last changed longer ago than ``older_than``.

    Raises:
        StoreError: ``bad_file`` for a negative ``older_than``.
    """
    if older_than < timedelta(0):
        raise StoreError("older_than must not be negative", code="bad_file")
    limit = time.time() - older_than.total_seconds()
    # Files first, rows afterwards: whatever got its row in the meantime is seen.
    present = [(alias, found) for alias in ALIASES for found in list_files(alias=alias)]
    referenced = {(reference.alias, reference.path) for reference in all_references()}
    report = GarbageReport()
    for alias, found in present:
        if (alias, found.path) not in referenced:
            _judge(alias, found, limit, report, dry_run=dry_run)
    if not dry_run:
        report.pointer_repaired = refresh_active_pointer()
    return report


def _judge(alias: str, found: FoundFile, limit: float, report: GarbageReport, *, dry_run: bool) -> None:
    if not found.is_temporary and not is_owned(alias, found.path):
        report.unknown.append(f"{alias}:{found.path}")
        return
    if found.modified >= limit:
        report.kept_recent += 1
        return
    if dry_run or delete_file(alias=alias, path=found.path, older_than=limit):
        report.removed.append(f"{alias}:{found.path}")
        report.bytes += found.size
