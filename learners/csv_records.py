"""Cutting a byte stream into CSV records, strictly and in bounded memory.

One damaged record costs that record only: a line over the limit is read past in pieces, and a quote that never closes is
given up after the limit, whereupon reading goes on with the line after the one that opened it.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from django.utils.translation import gettext as _

from learners.errors import ImportFileError

GZIP_MAGIC = b"\x1f\x8b"
UTF8_MARK = codecs.BOM_UTF8
RECORD_LIMIT = 65_536
"""Longest line and longest quoted record, in bytes and in characters; a valid row has under 2,000."""

RAW_KEPT = 500
"""Characters of a refused record that are kept."""

_PIECE = 1 << 20

LINE_TOO_LONG = "line_too_long"
BAD_QUOTING = "bad_quoting"


@dataclass(frozen=True, slots=True)
class Record:
    """One record: where it begins (line counted from 1), its text, and its fields or the reason why it has none."""

    line: int
    raw: str
    fields: list[str]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    text: str
    too_long: bool = False


def open_stream(source: BinaryIO) -> BinaryIO:
    """The text bytes of ``source`` from its beginning; gzip is recognised by its first two bytes, not by a name."""
    source.seek(0)
    magic = source.read(2)
    source.seek(0)
    if magic != GZIP_MAGIC:
        return source
    return io.BufferedReader(gzip.GzipFile(fileobj=source, mode="rb"), _PIECE)


def verify_readable(source: BinaryIO) -> int:
    """Read the whole of ``source`` once, keeping nothing, so that a file that breaks off later is refused before any write.

    Returns:
        Size in bytes, unpacked, a byte-order mark included.

    Raises:
        ImportFileError: ``empty_file``, ``gzip_cut_short``, ``gzip_damaged`` or ``not_utf8``.
    """
    stream = open_stream(source)
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    size, lines = 0, 1
    try:
        while piece := stream.read(_PIECE):
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                bad_line = lines + error.object[: error.start].count(b"\n")
                raise _not_utf8(bad_line) from error
            size += len(piece)
            lines += piece.count(b"\n")
    except EOFError as error:
        raise ImportFileError(_("The gzip file is cut short; nothing was imported."), code="gzip_cut_short") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ImportFileError(_("The gzip file is damaged; nothing was imported."), code="gzip_damaged") from error
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(lines) from error
    if size == 0:
        raise ImportFileError(_("The file is empty: it needs a header line."), code="empty_file")
    return size


def read_records(source: BinaryIO) -> Iterator[Record]:
    """Yield the records of a stream that ``verify_readable`` accepted; the first is the header. Empty lines are skipped."""
    lines = _Lines(open_stream(source))
    while (line := lines.take()) is not None:
        if line.too_long:
            yield Record(line.number, line.text[:RAW_KEPT], [], LINE_TOO_LONG)
        elif '"' in line.text:
            yield _quoted_record(line, lines)
        elif line.text:
            yield Record(line.number, line.text, line.text.split(","))


def _quoted_record(first: _Line, lines: _Lines) -> Record:
    """A record with quotes: possibly over several lines; lines that turn out not to belong to it are given back."""
    text, taken, alone = first.text, [], first.text
    quotes = text.count('"')
    while quotes % 2 and len(text) <= RECORD_LIMIT:
        line = lines.take()
        if line is None:
            break
        taken.append(line)
        if line.too_long:
            break
        text += "\n" + line.text
        quotes += line.text.count('"')
    fields = _split_quoted(text) if len(text) <= RECORD_LIMIT else None
    if fields is not None and not (taken and taken[-1].too_long):
        return Record(first.number, text, fields)
    lines.give_back(taken)
    fields = _split_quoted(alone) if taken else None
    if fields is not None:
        return Record(first.number, alone, fields)
    return Record(first.number, alone[:RAW_KEPT], [], BAD_QUOTING)


def _split_quoted(text: str) -> list[str] | None:
    """Fields of exactly one record, or None where the quoting is broken."""
    try:
        rows = list(csv.reader([text], strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None


class _Lines:
    """Lines without their ends, one at a time; lines that were taken too many can be given back."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._number = 0
        self._waiting: deque[_Line] = deque()

    def take(self) -> _Line | None:
        if self._waiting:
            return self._waiting.popleft()
        data = self._stream.readline(RECORD_LIMIT + 1)
        if not data:
            return None
        self._number += 1
        if self._number == 1 and data.startswith(UTF8_MARK):
            data = data[len(UTF8_MARK) :]
        if len(data) > RECORD_LIMIT and not data.endswith(b"\n"):
            self._skip_rest()
            return _Line(self._number, data[: 4 * RAW_KEPT].decode("utf-8", "replace"), too_long=True)
        return _Line(self._number, data.decode("utf-8").removesuffix("\n").removesuffix("\r"))

    def give_back(self, lines: list[_Line]) -> None:
        self._waiting.extendleft(reversed(lines))

    def _skip_rest(self) -> None:
        while (piece := self._stream.readline(RECORD_LIMIT)) and not piece.endswith(b"\n"):
            pass


def _not_utf8(line: int) -> ImportFileError:
    message = _("Line %(line)d is not UTF-8; save the file as UTF-8. Nothing was imported.") % {"line": line}
    return ImportFileError(message, code="not_utf8")
