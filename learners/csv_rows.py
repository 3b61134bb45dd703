"""The canonical CSV of interactions: its columns, and a verdict on every row.

The header may hold the columns in any order. ``learner_id``, ``category``, ``score`` and at least one of ``seq`` and
``occurred_at`` are required; a column that is not listed here is refused, because a misspelt one would be lost in silence.
An empty field means that the source does not say.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import BinaryIO

from django.utils.translation import gettext as _

from learners import csv_fields as fields
from learners.csv_fields import BadField
from learners.csv_records import BAD_QUOTING, LINE_TOO_LONG, RAW_KEPT, RECORD_LIMIT, Record, read_records, verify_readable
from learners.errors import ImportFileError

COLUMNS = (
    "learner_id", "seq", "occurred_at", "subject", "category", "item_id", "difficulty", "action", "score",
    "response_ms", "hints", "attempts", "session_id", "event_id",
)  # fmt: skip
REQUIRED_COLUMNS = ("learner_id", "category", "score")
ORDER_COLUMNS = ("seq", "occurred_at")

CLOCK_SKEW = timedelta(minutes=5)
"""How far ahead of this machine's clock a time may lie."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

OccurrenceCounter = Callable[[bytes], int]
"""Counts how often a key has been given to it, this time included."""


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """One valid row. ``occurred_at`` is in UTC; texts that the source does not give are empty, numbers None.

    ``event_id`` is the file's own, else ``computed_event_id``; ``own_event_id`` tells which.
    """

    line: int
    raw: str
    learner_id: str
    event_id: str
    own_event_id: bool
    seq: int | None
    occurred_at: datetime | None
    subject: str
    category: str
    item_id: str
    difficulty: float | None
    action: str
    score: float
    response_ms: int | None
    hints: int | None
    attempts: int | None
    session_id: str


@dataclass(frozen=True, slots=True)
class Reject:
    """One refused row: its line (counted from 1, the header included), a stable reason, a sentence, and its text, cut."""

    line: int
    reason: str
    message: str
    raw: str


def computed_event_id(
    *, learner_id: str, seq: int | None, occurred_at: datetime | None, item_id: str, category: str, occurrence: int
) -> str:
    """32 hex digits of SHA-256 over learner, place (``seq``, else the time in UTC), item, category and occurrence number.

    With ``seq`` the occurrence number is always 1: a learner has one event per ``seq``. Without, it counts the file's rows
    that are otherwise the same, so that two answers within one second stay two events.
    """
    return _digest(_identity(learner_id, seq, occurred_at, item_id, category), occurrence)


class InteractionCsv:
    """A file of the canonical CSV, verified to its end before the first row is given out.

    Args:
        source: binary, seekable; plain or gzip.
        now: the clock that times are compared with; aware.
        count_occurrence: see ``computed_event_id``; by default counted in memory.

    Raises:
        ImportFileError: as ``verify_readable``; ``header_too_long``, ``unknown_column``, ``duplicate_column``,
            ``missing_column``.
    """

    def __init__(self, source: BinaryIO, *, now: datetime, count_occurrence: OccurrenceCounter | None = None) -> None:
        self._source = source
        self._latest = now + CLOCK_SKEW
        self._count = count_occurrence or _count_in_memory()
        self.size = verify_readable(source)
        self.columns = _header(next(read_records(source), None))
        self._place = {name: self.columns.index(name) if name in self.columns else -1 for name in COLUMNS}
        self._known_id: str | None = None

    def rows(self) -> Iterator[ParsedRow | Reject]:
        """Yield one verdict per record after the header, in file order; memory does not grow with the file."""
        records = read_records(self._source)
        next(records)
        for record in records:
            try:
                yield self._row(record)
            except BadField as bad:
                yield Reject(record.line, bad.reason, bad.message, record.raw[:RAW_KEPT])

    def _row(self, record: Record) -> ParsedRow:
        self._check_record(record)
        values = [*record.fields, ""]  # place -1: a column that the file does not have
        place = self._place
        learner_id = values[place["learner_id"]]
        if learner_id != self._known_id:
            fields.check_learner_id(learner_id)
            self._known_id = learner_id
        seq = fields.whole_number("seq", values[place["seq"]], fields.MAX_SEQ)
        occurred_at = fields.time_of(values[place["occurred_at"]], self._latest)
        if seq is None and occurred_at is None:
            raise BadField("order_missing", _("seq or occurred_at must be given."))
        category = fields.text("category", values[place["category"]], 200)
        if not category.strip():
            raise BadField("category_empty", _("category must not be empty."))
        item_id = fields.text("item_id", values[place["item_id"]], 200)
        own = fields.event_id(values[place["event_id"]])
        return ParsedRow(
            line=record.line,
            raw=record.raw,
            learner_id=learner_id,
            event_id=own or self._event_id(learner_id, seq, occurred_at, item_id, category),
            own_event_id=bool(own),
            seq=seq,
            occurred_at=occurred_at,
            subject=fields.text("subject", values[place["subject"]], 100),
            category=category,
            item_id=item_id,
            difficulty=fields.real_number("difficulty", values[place["difficulty"]]),
            action=fields.text("action", values[place["action"]], 32),
            score=fields.score(values[place["score"]]),
            response_ms=fields.milliseconds("response_ms", values[place["response_ms"]]),
            hints=fields.whole_number("hints", values[place["hints"]], fields.MAX_COUNT),
            attempts=fields.whole_number("attempts", values[place["attempts"]], fields.MAX_COUNT),
            session_id=fields.text("session_id", values[place["session_id"]], 64),
        )

    def _check_record(self, record: Record) -> None:
        if record.problem == LINE_TOO_LONG:
            raise BadField(LINE_TOO_LONG, _("The line is longer than %(limit)d bytes.") % {"limit": RECORD_LIMIT})
        if record.problem == BAD_QUOTING:
            raise BadField(BAD_QUOTING, _("A quoted field does not end, or goes on after its closing quote."))
        control = _CONTROL.search(record.raw)
        if control is not None:
            raise _control_character(control.group())
        if len(record.fields) != len(self.columns):
            numbers = {"found": len(record.fields), "expected": len(self.columns)}
            raise BadField("wrong_field_count", _("The row has %(found)d fields, the header %(expected)d.") % numbers)

    def _event_id(self, learner_id: str, seq: int | None, occurred_at: datetime | None, item_id: str, category: str) -> str:
        identity = _identity(learner_id, seq, occurred_at, item_id, category)
        return _digest(identity, 1 if seq is not None else self._count(identity))


def _identity(learner_id: str, seq: int | None, occurred_at: datetime | None, item_id: str, category: str) -> bytes:
    if seq is not None:
        position = f"seq {seq}"
    elif occurred_at is not None:
        position = f"at {occurred_at.astimezone(UTC).isoformat()}"
    else:
        raise ValueError("an event needs seq or occurred_at")
    return "\x1f".join((learner_id, position, item_id, category)).encode()


def _digest(identity: bytes, occurrence: int) -> str:
    return hashlib.sha256(identity + b"\x1f%d" % occurrence).hexdigest()[:32]


def _count_in_memory() -> OccurrenceCounter:
    seen: Counter[bytes] = Counter()

    def count(key: bytes) -> int:
        seen[key] += 1
        return seen[key]

    return count


def _control_character(character: str) -> BadField:
    if character == "\x00":
        return BadField("nul_character", _("The row holds a NUL character."))
    code = f"U+{ord(character):04X}"
    return BadField("control_character", _("The row holds the control character %(code)s.") % {"code": code})


def _header(record: Record | None) -> tuple[str, ...]:
    if record is None:
        raise ImportFileError(_("The file is empty: it needs a header line."), code="empty_file")
    if record.problem:
        raise ImportFileError(_("The header line is too long or its quotes do not close."), code="header_too_long")
    names = tuple(record.fields)
    allowed = ", ".join(COLUMNS)
    for name in names:
        if name not in COLUMNS:
            message = _("Column %(name)r is unknown; allowed, separated by commas: %(allowed)s.")
            raise ImportFileError(message % {"name": name[:80], "allowed": allowed}, code="unknown_column")
        if names.count(name) > 1:
            message = _("Column %(name)r stands more than once in the header.")
            raise ImportFileError(message % {"name": name}, code="duplicate_column")
    for name in REQUIRED_COLUMNS:
        if name not in names:
            message = _("Column %(name)r is missing; required: %(required)s, and seq or occurred_at.")
            required = ", ".join(REQUIRED_COLUMNS)
            raise ImportFileError(message % {"name": name, "required": required}, code="missing_column")
    if not set(ORDER_COLUMNS) & set(names):
        raise ImportFileError(_("Column 'seq' or 'occurred_at' is missing: at least one is required."), code="missing_column")
    return names
