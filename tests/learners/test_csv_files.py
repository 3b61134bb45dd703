"""Whole files: what is read, what is refused as a whole, and how one damaged record costs that record only."""

from __future__ import annotations

import gzip
import io
import tracemalloc

import pytest

from learners.csv_records import RECORD_LIMIT, read_records, verify_readable
from learners.csv_rows import COLUMNS, ParsedRow, Reject
from learners.errors import ImportFileError
from tests.learners.csv_files import GOOD, HEADER, file_of, packed, read, reasons

SECOND = "kid-1,2,2025-03-01T09:31:00Z,fractions,p2,0"


def refusal(source: io.BytesIO) -> ImportFileError:
    with pytest.raises(ImportFileError) as caught:
        read(source)
    return caught.value


def test_gzip_is_recognised_by_its_content() -> None:
    assert read(packed(file_of(GOOD, SECOND))) == read(file_of(GOOD, SECOND))


def test_several_gzip_members_in_one_file_are_read_on() -> None:
    parts = gzip.compress(f"{HEADER}\n{GOOD}\n".encode()) + gzip.compress(f"{SECOND}\n".encode())
    assert len(read(io.BytesIO(parts))) == 2


def test_a_byte_order_mark_is_not_part_of_the_first_column() -> None:
    marked = io.BytesIO(b"\xef\xbb\xbf" + file_of(GOOD).getvalue())
    assert reasons(marked) == ["good"]


def test_windows_line_ends_are_read_like_others() -> None:
    windows = [row for row in read(file_of(GOOD, SECOND, end="\r\n")) if isinstance(row, ParsedRow)]
    assert windows == read(file_of(GOOD, SECOND))


def test_a_last_line_without_end_counts_and_empty_lines_do_not() -> None:
    assert reasons(io.BytesIO(f"{HEADER}\n\n{GOOD}\n\n{SECOND}".encode())) == ["good", "good"]


def test_a_quoted_field_may_hold_commas_quotes_and_line_breaks() -> None:
    quoted = 'kid-1,1,2025-03-01T09:30:00Z,"fractions, ""proper""\nand others",p1,1'
    first, second = read(file_of(quoted, SECOND))
    assert isinstance(first, ParsedRow)
    assert first.category == 'fractions, "proper"\nand others'
    assert isinstance(second, ParsedRow)
    assert second.line == 4


def test_quoted_line_breaks_of_windows_files_become_plain_ones() -> None:
    (row,) = read(file_of('kid-1,1,,"two\r\nlines",p1,1', end="\r\n"))
    assert isinstance(row, ParsedRow)
    assert row.category == "two\nlines"


def test_a_quote_that_never_closes_costs_its_own_line_only() -> None:
    broken = 'kid-1,1,2025-03-01T09:30:00Z,"fractions,p1,1'
    assert reasons(file_of(broken, SECOND, GOOD)) == ["bad_quoting", "good", "good"]


def test_a_quote_inside_an_unquoted_field_is_read_as_a_character() -> None:
    first, second = read(file_of('kid-1,1,,5" pipes,p1,1', SECOND))
    assert isinstance(first, ParsedRow)
    assert first.category == '5" pipes'
    assert isinstance(second, ParsedRow)


def test_text_after_a_closing_quote_is_refused() -> None:
    assert reasons(file_of('kid-1,1,,"fractions"x,p1,1', SECOND)) == ["bad_quoting", "good"]


def test_a_line_of_ten_megabytes_is_a_refused_row_and_the_others_go_in() -> None:
    source = file_of(GOOD, "kid-1,9,," + "x" * 10_000_000 + ",p1,1", SECOND)
    good, long, after = read(source)
    assert isinstance(long, Reject)
    assert (long.line, long.reason) == (3, "line_too_long")
    assert len(long.raw) <= 500
    assert isinstance(good, ParsedRow)
    assert isinstance(after, ParsedRow)
    assert after.line == 4


def test_a_long_line_is_read_past_in_bounded_memory() -> None:
    source = packed(file_of("x" * 30_000_000, GOOD))
    tracemalloc.start()
    try:
        verify_readable(source)
        records = list(read_records(source))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [record.problem for record in records] == ["", "line_too_long", ""]
    assert peak < 16_000_000


def test_memory_does_not_grow_with_the_file() -> None:
    def peak(rows: int) -> int:
        source = packed(file_of(*(f"kid-1,{seq},,fractions,p1,1" for seq in range(rows))))
        tracemalloc.start()
        try:
            verify_readable(source)
            for _ in read_records(source):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(60_000) < 1.3 * peak(15_000)


def test_a_line_just_at_the_limit_is_still_a_row_of_its_own() -> None:
    line = "x" * (RECORD_LIMIT - 1)
    assert reasons(file_of(line, GOOD)) == ["wrong_field_count", "good"]


def test_an_empty_file_is_refused() -> None:
    assert refusal(io.BytesIO(b"")).code == "empty_file"
    assert refusal(io.BytesIO(b"\n\n")).code == "empty_file"
    assert refusal(io.BytesIO(gzip.compress(b""))).code == "empty_file"


def test_a_gzip_file_that_is_cut_short_is_refused_before_any_row_is_given() -> None:
    whole = packed(file_of(*(f"kid-1,{seq},,fractions,p{seq},1" for seq in range(2_000)))).getvalue()
    for length in (5, len(whole) // 2, len(whole) - 4):
        assert refusal(io.BytesIO(whole[:length])).code == "gzip_cut_short"


def test_a_gzip_file_with_a_changed_byte_is_refused() -> None:
    whole = bytearray(packed(file_of(*(f"kid-1,{seq},,fractions,p{seq},1" for seq in range(2_000)))).getvalue())
    whole[-6] ^= 0x40  # the checksum
    assert refusal(io.BytesIO(bytes(whole))).code == "gzip_damaged"
    whole[-6] ^= 0x40
    whole[len(whole) // 2] ^= 0xFF
    assert refusal(io.BytesIO(bytes(whole))).code == "gzip_damaged"


def test_a_file_that_is_not_utf8_is_refused_with_the_line() -> None:
    error = refusal(io.BytesIO(f"{HEADER}\n{GOOD}\nkid-2,1,,Brüche,p1,1\n".encode("latin-1")))
    assert error.code == "not_utf8"
    assert "3" in str(error)
    assert refusal(io.BytesIO(f"{HEADER}\n{GOOD}\n".encode("utf-16"))).code == "not_utf8"
    assert refusal(io.BytesIO(file_of(GOOD).getvalue() + "ü".encode()[:1])).code == "not_utf8"


def test_an_unknown_column_is_refused_with_the_allowed_ones() -> None:
    error = refusal(file_of("1", header=f"{HEADER},shoe_size"))
    assert error.code == "unknown_column"
    assert "shoe_size" in str(error)
    assert all(name in str(error) for name in COLUMNS)


def test_a_header_with_another_separator_is_refused_as_unknown() -> None:
    error = refusal(file_of(GOOD, header=HEADER.replace(",", ";")))
    assert error.code == "unknown_column"
    assert "comma" in str(error)


def test_a_file_without_header_is_refused() -> None:
    assert refusal(file_of(GOOD, header=None)).code == "unknown_column"


def test_a_column_that_stands_twice_is_refused() -> None:
    error = refusal(file_of("a", header=f"{HEADER},score"))
    assert error.code == "duplicate_column"
    assert "score" in str(error)


@pytest.mark.parametrize("name", ["learner_id", "category", "score"])
def test_a_missing_required_column_is_named(name: str) -> None:
    header = ",".join(column for column in HEADER.split(",") if column != name)
    error = refusal(file_of("a", header=header))
    assert error.code == "missing_column"
    assert f"'{name}'" in str(error)


def test_a_file_with_neither_seq_nor_time_is_refused() -> None:
    error = refusal(file_of("kid-1,fractions,1", header="learner_id,category,score"))
    assert error.code == "missing_column"
    assert "seq" in str(error)
    assert "occurred_at" in str(error)


def test_a_header_that_is_too_long_is_refused() -> None:
    assert refusal(file_of(GOOD, header="x" * 100_000)).code == "header_too_long"


def test_columns_may_stand_in_any_order() -> None:
    (row,) = read(file_of("0.5,7,kid-1,fractions", header="score,seq,learner_id,category"))
    assert isinstance(row, ParsedRow)
    assert (row.learner_id, row.seq, row.category, row.score) == ("kid-1", 7, "fractions", 0.5)
    assert (row.occurred_at, row.item_id, row.attempts) == (None, "", None)
