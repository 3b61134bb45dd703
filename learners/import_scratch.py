"""What an import must remember of a whole file, kept in a temporary database of its own instead of in memory."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from types import TracebackType
from uuid import UUID

EventKey = tuple[UUID, str]


class ImportScratch:
    """A private SQLite file that the operating system removes; pages beyond 16 MB go to disk."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -16000;
            CREATE TABLE occurrence (key BLOB PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID;
            CREATE TABLE learner (key BLOB PRIMARY KEY, consented INTEGER NOT NULL) WITHOUT ROWID;
            CREATE TABLE event (learner BLOB, event_id TEXT, category TEXT, item_id TEXT, score REAL,
                                PRIMARY KEY (learner, event_id)) WITHOUT ROWID;
            CREATE TABLE place (learner BLOB, seq INTEGER, PRIMARY KEY (learner, seq)) WITHOUT ROWID;
            BEGIN;
            """
        )

    def __enter__(self) -> ImportScratch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._database.close()

    def count_occurrence(self, key: bytes) -> int:
        """How often ``key`` has been given, this time included."""
        statement = "INSERT INTO occurrence VALUES (?, 1) ON CONFLICT (key) DO UPDATE SET times = times + 1 RETURNING times"
        ((times,),) = self._database.execute(statement, (hashlib.blake2b(key, digest_size=16).digest(),)).fetchall()
        return int(times)

    def note_learners(self, learners: Iterable[tuple[UUID, bool]]) -> None:
        """Remember learners of the file by primary key, and whether each holds the consents asked for."""
        statement = "INSERT INTO learner VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET consented = excluded.consented"
        self._database.executemany(statement, [(key.bytes, int(consented)) for key, consented in learners])

    def learner_counts(self) -> tuple[int, int]:
        """Learners of the file, and those of them who hold the consents."""
        ((learners, consented),) = self._database.execute("SELECT count(*), coalesce(sum(consented), 0) FROM learner")
        return int(learners), int(consented)

    def remember_events(self, events: Iterable[tuple[UUID, str, int | None, str, str, float]]) -> None:
        """A dry run's accepted rows as (learner, event id, seq, category, item id, score): nothing else knows them."""
        rows = list(events)
        self._database.executemany(
            "INSERT INTO event VALUES (?, ?, ?, ?, ?)",
            [(key.bytes, event_id, category, item_id, score) for key, event_id, _, category, item_id, score in rows],
        )
        self._database.executemany(
            "INSERT INTO place VALUES (?, ?)", [(key.bytes, seq) for key, _, seq, *_ in rows if seq is not None]
        )

    def remembered_event(self, learner: UUID, event_id: str) -> tuple[str, str, float] | None:
        """Category, item id and score of an event that ``remember_events`` was given."""
        statement = "SELECT category, item_id, score FROM event WHERE learner = ? AND event_id = ?"
        row: tuple[str, str, float] | None = self._database.execute(statement, (learner.bytes, event_id)).fetchone()
        return row

    def remembers_place(self, learner: UUID, seq: int) -> bool:
        """Whether ``remember_events`` was given this ``seq`` of the learner."""
        statement = "SELECT 1 FROM place WHERE learner = ? AND seq = ?"
        return self._database.execute(statement, (learner.bytes, seq)).fetchone() is not None
