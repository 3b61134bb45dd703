"""Single rows: what each field may hold, and the reason with which anything else is refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learners.csv_rows import COLUMNS, ParsedRow, Reject, computed_event_id
from tests.learners.csv_files import NOW, file_of, read

ROW = {"learner_id": "kid-1", "seq": "1", "occurred_at": "", "category": "fractions", "item_id": "p1", "score": "1"}


def row_of(**values: str) -> ParsedRow | Reject:
    fields = {**ROW, **values}
    (row,) = read(file_of(",".join(fields.values()), header=",".join(fields)))
    return row


def good(**values: str) -> ParsedRow:
    row = row_of(**values)
    assert isinstance(row, ParsedRow), row
    return row


def refused(**values: str) -> Reject:
    row = row_of(**values)
    assert isinstance(row, Reject), row
    return row


@pytest.mark.parametrize(
    ("learner_id", "reason"),
    [
        ("", "learner_id_empty"),
        ("../etc", "learner_id_bad_character"),
        ("a/b", "learner_id_bad_character"),
        ("a b", "learner_id_bad_character"),
        (" kid", "learner_id_bad_character"),
        (".hidden", "learner_id_bad_start"),
        ("-rf", "learner_id_bad_start"),
        ("a" * 65, "learner_id_too_long"),
        ("kіd-1", "learner_id_not_ascii"),
        ("kid１", "learner_id_not_ascii"),
    ],
)
def test_an_id_outside_the_pattern_is_refused_with_its_own_reason(learner_id: str, reason: str) -> None:
    reject = refused(learner_id=learner_id)
    assert reject.reason == reason
    assert "learner_id" in reject.message
    assert "A-Z a-z 0-9" in reject.message


def test_a_look_alike_letter_is_named() -> None:
    assert "CYRILLIC SMALL LETTER BYELORUSSIAN-UKRAINIAN I" in refused(learner_id="kіd-1").message


@pytest.mark.parametrize("learner_id", ["a" * 64, "A.b_c-9", "0"])
def test_an_id_of_the_pattern_is_taken(learner_id: str) -> None:
    assert good(learner_id=learner_id).learner_id == learner_id


def test_a_refused_id_does_not_pass_because_the_row_before_had_it() -> None:
    rows = read(file_of("../x,1,,c,p,1", "../x,2,,c,p,1"))
    assert [row.reason for row in rows if isinstance(row, Reject)] == ["learner_id_bad_character"] * 2


@pytest.mark.parametrize("field", ["learner_id", "category", "item_id"])
def test_a_nul_character_is_refused_anywhere(field: str) -> None:
    assert refused(**{field: "a\x00b"}).reason == "nul_character"


def test_other_control_characters_are_refused() -> None:
    reject = refused(category="frac\x1b[31mtions")
    assert reject.reason == "control_character"
    assert "U+001B" in reject.message


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        ("1.2", "score_out_of_range"),
        ("-1", "score_out_of_range"),
        ("1e9", "score_out_of_range"),
        ("NaN", "score_not_a_number"),
        ("inf", "score_not_a_number"),
        ("right", "score_not_a_number"),
        ("１", "score_not_a_number"),
        ("0_1", "score_not_a_number"),
        ("", "score_empty"),
    ],
)
def test_a_score_that_is_no_number_from_0_to_1_is_refused(score: str, reason: str) -> None:
    reject = refused(score=score)
    assert reject.reason == reason
    assert "0 to 1" in reject.message


@given(st.floats(0, 1))
def test_every_number_from_0_to_1_is_a_score(value: float) -> None:
    assert good(score=repr(value)).score == value


def test_a_decimal_comma_does_not_pass_as_a_number() -> None:
    assert refused(score='"0,5"').reason == "score_not_a_number"


@pytest.mark.parametrize(
    ("time", "reason"),
    [
        ("2025-03-01T09:30:00", "time_without_zone"),
        ("2025-03-01", "time_without_zone"),
        ("yesterday", "time_not_iso8601"),
        ("2025-02-30T09:30:00Z", "time_not_iso8601"),
        ("0001-01-01T00:00:00+10:00", "time_not_iso8601"),
        ("1740821400", "time_not_iso8601"),
        ("2025-06-01T12:06:00Z", "time_in_future"),
        ("9999-12-31T23:59:59Z", "time_in_future"),
    ],
)
def test_a_time_that_is_naive_malformed_or_to_come_is_refused(time: str, reason: str) -> None:
    reject = refused(occurred_at=time)
    assert reject.reason == reason
    assert "occurred_at" in reject.message
    assert "allowed" in reject.message


def test_a_clock_that_is_a_little_ahead_is_no_future() -> None:
    ahead = NOW + timedelta(minutes=4)
    assert good(occurred_at=ahead.isoformat()).occurred_at == ahead


def test_long_ago_is_fine_and_times_are_kept_in_utc() -> None:
    assert good(occurred_at="1970-01-01T00:00:00Z").occurred_at == datetime(1970, 1, 1, tzinfo=UTC)
    time = good(occurred_at="2025-03-01T09:30:00.25+02:00").occurred_at
    assert time == datetime(2025, 3, 1, 7, 30, 0, 250_000, tzinfo=UTC)
    assert time.tzinfo is UTC


def test_a_row_with_neither_seq_nor_time_is_refused() -> None:
    assert refused(seq="").reason == "order_missing"


@pytest.mark.parametrize("field", ["seq", "hints", "attempts"])
@pytest.mark.parametrize("value", ["-1", "1.5", "x", "1e3", "NaN", "１"])
def test_a_count_that_is_no_whole_number_from_0_is_refused(field: str, value: str) -> None:
    assert refused(**{field: value}).reason == f"{field}_not_a_whole_number"


@pytest.mark.parametrize(
    ("field", "value"), [("seq", str(2**63)), ("hints", str(2**31)), ("attempts", str(2**31)), ("response_ms", str(2**31))]
)
def test_a_number_beyond_what_the_database_holds_is_refused(field: str, value: str) -> None:
    assert refused(**{field: value}).reason == f"{field}_out_of_range"


def test_numbers_as_table_programs_write_them_are_taken() -> None:
    row = good(seq="0", hints="3.0", attempts="2.00", response_ms="1234.6", difficulty="-0.25")
    assert (row.seq, row.hints, row.attempts, row.response_ms, row.difficulty) == (0, 3, 2, 1235, -0.25)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("response_ms", "-1", "response_ms_out_of_range"),
        ("response_ms", "fast", "response_ms_not_a_number"),
        ("difficulty", "hard", "difficulty_not_a_number"),
        ("difficulty", "inf", "difficulty_not_a_number"),
        ("category", "", "category_empty"),
        ("category", "  ", "category_empty"),
        ("category", "x" * 201, "category_too_long"),
        ("item_id", "x" * 201, "item_id_too_long"),
        ("subject", "x" * 101, "subject_too_long"),
        ("action", "x" * 33, "action_too_long"),
        ("session_id", "x" * 65, "session_id_too_long"),
        ("event_id", "x" * 65, "event_id_not_allowed"),
        ("event_id", "a b", "event_id_not_allowed"),
    ],
)
def test_any_other_field_out_of_bounds_is_refused_by_name(field: str, value: str, reason: str) -> None:
    reject = refused(**{field: value})
    assert reject.reason == reason
    assert field in reject.message


def test_a_row_with_too_few_or_too_many_fields_is_refused() -> None:
    rows = read(file_of("kid-1,1,,fractions,p1", "kid-1,1,,fractions,p1,1,9"))
    assert [row.reason for row in rows if isinstance(row, Reject)] == ["wrong_field_count"] * 2


def test_an_event_id_of_the_file_is_kept_and_an_empty_one_is_computed() -> None:
    assert good(event_id="evt:1/a").event_id == "evt:1/a"
    assert good(event_id="evt:1/a").own_event_id
    computed = good(event_id="")
    assert not computed.own_event_id
    assert computed.event_id == computed_event_id(
        learner_id="kid-1", seq=1, occurred_at=None, item_id="p1", category="fractions", occurrence=1
    )
    assert len(computed.event_id) == 32


def test_the_computed_event_id_hangs_on_the_moment_and_not_on_how_it_is_written() -> None:
    utc = datetime(2025, 3, 1, 9, 30, tzinfo=UTC)
    same = utc.astimezone(timezone(timedelta(hours=5)))
    known = {"learner_id": "a", "seq": None, "item_id": "p", "category": "c"}
    assert computed_event_id(occurred_at=utc, occurrence=1, **known) == computed_event_id(  # type: ignore[arg-type]
        occurred_at=same, occurrence=1, **known  # type: ignore[arg-type]
    )  # fmt: skip


def test_two_answers_within_one_second_stay_two_events() -> None:
    line = "kid-1,,2025-03-01T09:30:00Z,fractions,p1,1"
    first, second = (row for row in read(file_of(line, line)) if isinstance(row, ParsedRow))
    assert first.event_id != second.event_id


def test_with_seq_the_same_line_twice_is_the_same_event() -> None:
    line = "kid-1,4,2025-03-01T09:30:00Z,fractions,p1,1"
    first, second = (row for row in read(file_of(line, line)) if isinstance(row, ParsedRow))
    assert first.event_id == second.event_id


def test_every_column_arrives_in_its_field() -> None:
    values = {
        "learner_id": "kid-1", "seq": "3", "occurred_at": "2025-03-01T09:30:00Z", "subject": "math", "category": "fractions",
        "item_id": "p9", "difficulty": "2.5", "action": "practice", "score": "0.5", "response_ms": "900", "hints": "1",
        "attempts": "2", "session_id": "s1", "event_id": "e1",
    }  # fmt: skip
    assert tuple(values) == COLUMNS
    row = good(**values)
    assert (row.subject, row.item_id, row.action, row.session_id) == ("math", "p9", "practice", "s1")
    assert (row.difficulty, row.response_ms, row.hints, row.attempts, row.score) == (2.5, 900, 1, 2, 0.5)
