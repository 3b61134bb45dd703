"""The file of refused rows."""

from __future__ import annotations

import csv
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from learners.csv_rows import Reject

HEADER = ("line", "reason", "message", "raw")


class RejectsFile:
    """A CSV of line number, reason, message and raw text, readable by its owner only.

    It appears under its name complete, when the block ends without an error, and only if there was a reject. ``path`` None:
    nothing is written anywhere.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._writer: Any = None

    def __enter__(self) -> RejectsFile:
        return self

    def add(self, reject: Reject) -> None:
        """Append one row.

        Raises:
            OSError: the folder cannot be written.
        """
        if self._path is None:
            return
        if self._file is None:
            self._file = tempfile.NamedTemporaryFile(  # noqa: SIM115 - closed and renamed by __exit__
                "w", encoding="utf-8", newline="", dir=self._path.parent, prefix=f".{self._path.name}.", delete=False
            )
            self._writer = csv.writer(self._file)
            self._writer.writerow(HEADER)
        self._writer.writerow((reject.line, reject.reason, reject.message, reject.raw))

    @property
    def written(self) -> str | None:
        """Where the file is, or will be when the block ends; None where there was no reject."""
        return None if self._file is None else str(self._path)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is None or self._path is None:
            return
        temporary = Path(self._file.name)
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
            if kind is None:
                temporary.replace(self._path)
                _sync_folder(self._path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
