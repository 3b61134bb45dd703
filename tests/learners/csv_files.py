"""Small CSV files for the tests of the import."""

from __future__ import annotations

import gzip
import io
from datetime import UTC, datetime

from learners.csv_rows import InteractionCsv, ParsedRow, Reject

NOW = datetime(2025, 6, 1, 12, 0, tzinfo=UTC)
HEADER = "learner_id,seq,occurred_at,category,item_id,score"
GOOD = "kid-1,1,2025-03-01T09:30:00Z,fractions,p1,1"


def file_of(*lines: str, header: str | None = HEADER, end: str = "\n") -> io.BytesIO:
    rows = lines if header is None else (header, *lines)
    return io.BytesIO("".join(row + end for row in rows).encode())


def packed(source: io.BytesIO) -> io.BytesIO:
    return io.BytesIO(gzip.compress(source.getvalue(), mtime=0))


def read(source: io.BytesIO, now: datetime = NOW) -> list[ParsedRow | Reject]:
    return list(InteractionCsv(source, now=now).rows())


def reasons(source: io.BytesIO) -> list[str]:
    """One word per row: its reason, or "good"."""
    return [row.reason if isinstance(row, Reject) else "good" for row in read(source)]
