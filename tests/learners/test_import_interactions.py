"""The import service: good rows go in once, bad rows are reported, and nothing else changes."""

from __future__ import annotations

import csv
import gzip
import io
import stat
from collections.abc import Callable
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from django.db import IntegrityError, connection
from django.test.utils import CaptureQueriesContext

from aivo_site.audit.models import AuditEvent
from learners import importing, intake
from learners.bulk_insert import insert_interactions
from learners.csv_rows import InteractionCsv
from learners.errors import ImportFileError
from learners.importing import ImportReport, import_interactions
from learners.models import ConsentEvent, EncoderState, Interaction, Learner, Organisation, Pool
from learners.registration import register_learner, register_organisation
from learners.simulator import ROW_COLUMNS, simulate_rows
from tests.learners.csv_files import file_of, packed
from tests.shared import SHARED, needs_logs

pytestmark = pytest.mark.django_db

LAST_ENCODED = datetime(2025, 3, 1, 10, 30, tzinfo=UTC)
GOOD = "kid-1,1,2025-03-01T09:30:00Z,fractions,p1,1"


def take(*lines: str, pool: str = Pool.FEDERATED, **options: Any) -> ImportReport:
    options.setdefault("consent", None)
    report = import_interactions(source=file_of(*lines), pool=pool, **options)
    assert report.rows_read == report.rows_imported + report.rows_duplicate + report.rows_rejected
    assert sum(report.rejected_by_reason.values()) == report.rows_rejected
    return report


def contents() -> list[tuple[Any, ...]]:
    return list(Interaction.objects.order_by("learner", "arrival").values_list())


def simulated(learners: int = 4, events: int = 40, seed: int = 0) -> io.BytesIO:
    text = io.StringIO()
    writer = csv.DictWriter(text, ROW_COLUMNS)
    writer.writeheader()
    writer.writerows(simulate_rows(seed=seed, learners=learners, events=events))
    return io.BytesIO(text.getvalue().encode())


def test_the_report_has_the_keys_of_the_contract() -> None:
    names = {field.name for field in fields(ImportReport)}
    assert names >= {
        "rows_read", "rows_imported", "rows_duplicate", "rows_rejected", "rejected_by_reason", "learners", "consented",
        "rejects_file", "seconds",
    }  # fmt: skip


def test_every_field_of_a_row_is_stored() -> None:
    header = ",".join((*ROW_COLUMNS, "event_id"))
    line = "kid-1,3,2025-03-01T09:30:00Z,math,fractions,p9,2.5,practice,0.5,900,1,2,s1,e1"
    import_interactions(source=file_of(line, header=header), pool=Pool.FEDERATED, consent=None)
    row = Interaction.objects.get()
    assert (row.learner.learner_id, row.learner.pool, row.event_id, row.seq) == ("kid-1", "FEDERATED", "e1", 3)
    assert row.occurred_at == datetime(2025, 3, 1, 9, 30, tzinfo=UTC)
    assert (row.subject, row.category, row.item_id, row.action, row.session_id) == ("math", "fractions", "p9", "practice", "s1")
    assert (row.difficulty, row.score, row.response_ms, row.hints, row.attempts) == (2.5, 0.5, 900, 1, 2)
    row.full_clean()


def test_stored_keys_and_times_are_what_the_models_read() -> None:
    take(GOOD)
    row = Interaction.objects.get()
    assert Interaction.objects.get(pk=row.pk) == row
    assert row.created_at == row.updated_at
    assert abs((datetime.now(UTC) - row.created_at).total_seconds()) < 60


def test_the_same_file_twice_changes_nothing() -> None:
    first = import_interactions(source=simulated(), pool=Pool.CURRICULUM, consent=None)
    before = (contents(), list(Learner.objects.values_list()), AuditEvent.objects.count())
    second = import_interactions(source=simulated(), pool=Pool.CURRICULUM, consent=None)
    assert (second.rows_imported, second.rows_duplicate, second.rows_rejected) == (0, first.rows_imported, 0)
    assert (contents(), list(Learner.objects.values_list()), AuditEvent.objects.count()) == before
    assert second.learners == first.learners == 4


def test_packed_and_plain_files_give_the_same_events() -> None:
    import_interactions(source=simulated(), pool=Pool.CURRICULUM, consent=None)
    again = import_interactions(source=packed(simulated()), pool=Pool.CURRICULUM, consent=None)
    assert again.rows_imported == 0


def test_batches_give_the_same_result_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = import_interactions(source=simulated(seed=1), pool=Pool.CURRICULUM, consent=None)
    monkeypatch.setattr(importing, "BATCH_ROWS", 7)
    cut = import_interactions(source=simulated(seed=2), pool=Pool.CURRICULUM, consent=None)
    again = import_interactions(source=simulated(seed=1), pool=Pool.CURRICULUM, consent=None)
    assert cut.rows_rejected == 0
    assert cut.learners == 4
    assert (again.rows_imported, again.rows_duplicate) == (0, whole.rows_imported)


@pytest.mark.parametrize("batch", [1, 2, 1000])
def test_the_same_event_within_one_file_counts_once(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(importing, "BATCH_ROWS", batch)
    report = take(GOOD, "kid-1,2,,fractions,p2,1", GOOD)
    assert (report.rows_imported, report.rows_duplicate) == (2, 1)


def test_two_answers_within_one_second_both_go_in_and_are_known_the_next_time() -> None:
    line = "kid-1,,2025-03-01T09:30:00Z,fractions,p1,1"
    assert take(line, line).rows_imported == 2
    assert take(line, line).rows_duplicate == 2
    assert take(line, line, line).rows_imported == 1


def test_good_rows_around_bad_ones_go_in() -> None:
    report = take(GOOD, "kid-1,2,,fractions,p2,1.2", "kid-1,3,,fractions,p3,", "kid-1,4,,fractions,p4,0")
    assert (report.rows_read, report.rows_imported) == (4, 2)
    assert report.rejected_by_reason == {"score_empty": 1, "score_out_of_range": 1}
    assert [reject.line for reject in report.first_rejects] == [3, 4]
    assert list(Interaction.objects.order_by("seq").values_list("seq", flat=True)) == [1, 4]


def test_a_learner_with_bad_rows_only_does_not_come_into_being() -> None:
    take("kid-1,1,,fractions,p1,7")
    assert not Learner.objects.exists()


# --- Refused rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 1000])
@pytest.mark.parametrize("dry_run", [False, True])
def test_an_id_that_differs_only_in_case_is_refused(monkeypatch: pytest.MonkeyPatch, batch: int, dry_run: bool) -> None:
    monkeypatch.setattr(importing, "BATCH_ROWS", batch)
    report = take(GOOD, "KID-1,2,,fractions,p2,1", "Kid-1,3,,fractions,p2,1", "kid-1,4,,fractions,p2,1", dry_run=dry_run)
    assert report.rejected_by_reason == {"learner_id_case_twin": 2}
    assert report.rows_imported == 2
    assert report.learners == 1


def test_an_id_that_differs_only_in_case_from_a_stored_one_is_refused(learner: Learner) -> None:
    assert take(GOOD.replace("kid", "kiD")).rejected_by_reason == {"learner_id_case_twin": 1}
    assert list(Learner.objects.all()) == [learner]


def test_rows_of_a_learner_of_another_pool_are_refused() -> None:
    take(GOOD, pool=Pool.CURRICULUM)
    report = take(GOOD, "kid-1,2,,fractions,p2,1", "kid-2,1,,fractions,p2,1", pool=Pool.EVALUATION)
    assert report.rejected_by_reason == {"learner_in_other_pool": 2}
    assert "CURRICULUM" in report.first_rejects[0].message
    assert dict(Learner.objects.values_list("learner_id", "pool")) == {"kid-1": "CURRICULUM", "kid-2": "EVALUATION"}
    assert Interaction.objects.count() == 2


def test_rows_of_a_learner_of_another_organisation_are_refused_where_one_is_named(learner: Learner) -> None:
    south = register_organisation(slug="south")
    report = take(GOOD, "kid-2,1,,fractions,p1,1", organisation=south)
    assert report.rejected_by_reason == {"learner_in_other_organisation": 1}
    assert Learner.objects.get(learner_id="kid-2").organisation == south
    assert take(GOOD).rows_imported == 1


def test_a_seq_that_another_event_has_is_refused() -> None:
    take(GOOD)
    report = take("kid-1,1,2025-03-01T09:30:00Z,decimals,p1,1", "kid-1,2,,a,p,1", "kid-1,2,,b,p,1")
    assert report.rejected_by_reason == {"seq_taken": 2}
    assert report.rows_imported == 1


def test_a_known_event_with_another_score_is_refused_and_not_passed_over() -> None:
    take(GOOD)
    report = take(GOOD[:-1] + "0")
    assert report.rejected_by_reason == {"event_id_taken": 1}
    assert Interaction.objects.get().score == 1.0


def test_an_event_id_of_the_file_decides_even_out_of_order() -> None:
    header = "learner_id,seq,category,score,event_id"
    import_interactions(source=file_of("kid-1,5,a,1,x", "kid-1,3,b,1,y", header=header), pool="FEDERATED", consent=None)
    again = file_of("kid-1,9,a,1,x", "kid-1,4,c,1,z", "kid-1,10,c,1,y", header=header)
    report = import_interactions(source=again, pool="FEDERATED", consent=None)
    assert (report.rows_imported, report.rows_duplicate) == (1, 1)
    assert report.rejected_by_reason == {"event_id_taken": 1}


def test_a_learner_whose_order_would_be_undecidable_is_kept_decidable() -> None:
    timed, placed = "kid-1,,2025-03-01T09:30:00Z,a,p,1", "kid-1,7,,a,p,1"
    assert take(timed, placed).rejected_by_reason == {"time_required": 1}
    assert take(placed.replace("kid-1", "kid-2"), timed.replace("kid-1", "kid-2")).rejected_by_reason == {"seq_required": 1}
    both = "kid-1,8,2025-03-01T09:31:00Z,a,p,1"
    assert take(both).rows_imported == 1


def test_arrival_goes_on_where_it_was_and_follows_the_file() -> None:
    take("kid-1,,2025-03-01T09:30:00Z,a,p1,1", "kid-1,,2025-03-01T09:30:00Z,a,p2,1")
    take("kid-1,,2025-03-01T09:30:00Z,a,p3,1")
    assert list(Interaction.objects.order_by("arrival").values_list("item_id", "arrival")) == [("p1", 1), ("p2", 2), ("p3", 3)]


# --- The rejects file -------------------------------------------------------------------------------------------------


def test_refused_rows_are_written_with_line_reason_message_and_text(tmp_path: Path) -> None:
    place = tmp_path / "rejects.csv"
    bad = 'kid-1,2,,"fractions, all",p2,1.2'
    report = take(GOOD, bad, "../x,1,,a,p,1", rejects_file=place)
    assert report.rejects_file == str(place)
    with place.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["line"], row["reason"], row["raw"]) for row in rows] == [
        ("3", "score_out_of_range", bad),
        ("4", "learner_id_bad_character", "../x,1,,a,p,1"),
    ]
    assert "score" in rows[0]["message"]
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [place]


def test_without_refused_rows_no_file_appears(tmp_path: Path) -> None:
    report = take(GOOD, rejects_file=tmp_path / "rejects.csv")
    assert report.rejects_file is None
    assert not list(tmp_path.iterdir())


def test_a_rejects_file_that_would_overwrite_the_input_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "log.csv"
    source.write_bytes(file_of(GOOD, "kid-1,2,,a,p,9").getvalue())
    with pytest.raises(ImportFileError, match="rejects_file") as caught:
        import_interactions(source=source, pool="FEDERATED", consent=None, rejects_file=source)
    assert caught.value.code == "bad_rejects_file"
    assert source.read_bytes() == file_of(GOOD, "kid-1,2,,a,p,9").getvalue()


def test_an_import_that_breaks_off_leaves_no_rejects_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "BATCH_ROWS", 2)

    def stop(done: int, total: int, message: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take("kid-1,1,,a,p,9", GOOD, GOOD, rejects_file=tmp_path / "rejects.csv", progress=stop)
    assert not list(tmp_path.iterdir())


# --- Whole files ------------------------------------------------------------------------------------------------------


def _cut(source: io.BytesIO) -> io.BytesIO:
    whole = gzip.compress(source.getvalue())
    return io.BytesIO(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (lambda: io.BytesIO(), "empty_file"),
        (lambda: _cut(simulated()), "gzip_cut_short"),
        (lambda: io.BytesIO(simulated().getvalue() + b"\xff\xfe"), "not_utf8"),
        (lambda: file_of(GOOD, header="learner_id,seq,category,score,mood"), "unknown_column"),
        (lambda: file_of(GOOD, header="learner_id,seq,category"), "missing_column"),
        (lambda: file_of(GOOD, header="learner_id,category,score"), "missing_column"),
    ],
)
def test_a_file_that_is_bad_as_a_whole_changes_nothing(source: Callable[[], io.BytesIO], code: str) -> None:
    with pytest.raises(ImportFileError) as caught:
        import_interactions(source=source(), pool="CURRICULUM", consent=None)
    assert caught.value.code == code
    for model in (Learner, Interaction, Organisation, AuditEvent):
        assert not model.objects.exists()


@pytest.mark.parametrize(("name", "code"), [("absent.csv", "file_not_found"), ("folder", "not_a_file")])
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, name: str, code: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ImportFileError, match=name) as caught:
        import_interactions(source=tmp_path / name, pool="CURRICULUM", consent=None)
    assert caught.value.code == code


def test_an_unknown_pool_is_refused_with_the_pools_that_exist() -> None:
    with pytest.raises(ImportFileError, match="CURRICULUM, FEDERATED, EVALUATION"):
        take(GOOD, pool="SWIMMING")


def test_a_header_without_rows_imports_nothing_and_is_no_error() -> None:
    assert take().rows_read == 0


# --- Dry run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [3, 5000])
def test_a_dry_run_gives_the_same_verdicts_and_changes_nothing(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(importing, "BATCH_ROWS", batch)
    take("kid-9,1,,a,p,1", pool=Pool.CURRICULUM)
    lines = (
        GOOD, "KID-1,2,,a,p,1", "kid-1,2,,a,p,1", "kid-2,1,,a,p,1", GOOD, "kid-2,1,,b,p,1", "kid-9,1,,a,p,1",
        "kid-9,2,,a,p,1", "kid-2,2,,a,p,5", "kid-9,1,,a,p,0",
    )  # fmt: skip
    before = (contents(), Learner.objects.count(), Organisation.objects.count(), AuditEvent.objects.count())
    dry = take(*lines, pool=Pool.CURRICULUM, dry_run=True)
    assert (contents(), Learner.objects.count(), Organisation.objects.count(), AuditEvent.objects.count()) == before
    real = take(*lines, pool=Pool.CURRICULUM)
    for name in ("rows_read", "rows_imported", "rows_duplicate", "rows_rejected", "rejected_by_reason", "learners"):
        assert getattr(dry, name) == getattr(real, name), name
    assert (dry.rows_imported, dry.rows_duplicate, dry.rows_rejected) == (4, 2, 4)


def test_a_dry_run_into_an_empty_database_creates_no_organisation() -> None:
    assert take(GOOD, dry_run=True).rows_imported == 1
    assert not Organisation.objects.exists()


# --- Interplay --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "stays"),
    [
        ("kid-1,11,2025-03-01T11:00:00Z,a,p,1", True),
        ("kid-1,9,2025-03-01T09:00:00Z,a,p,1", False),
        ("kid-1,,2025-03-01T12:00:00Z,a,p,1", False),
        ("kid-1,5,2025-03-01T10:00:00Z,a,p,1", True),
    ],
)
def test_an_event_that_sorts_before_the_last_encoded_one_drops_the_encoder_state(line: str, stays: bool) -> None:
    take("kid-1,5,2025-03-01T10:00:00Z,a,p,1", "kid-1,10,2025-03-01T10:30:00Z,a,p,1")
    learner = Learner.objects.get()
    EncoderState.objects.create(
        learner=learner, encoder_sha256="e", state={}, events=2, last_seq=10, last_occurred_at=LAST_ENCODED
    )
    take(line, "kid-2,1,,a,p,1")
    assert EncoderState.objects.exists() is stays


@pytest.mark.parametrize(("time", "stays"), [("10:30:00", True), ("10:29:59", False)])
def test_a_learner_ordered_by_time_keeps_its_encoder_state_by_time(time: str, stays: bool) -> None:
    take("kid-1,,2025-03-01T10:30:00Z,a,p,1")
    EncoderState.objects.create(
        learner=Learner.objects.get(), encoder_sha256="e", state={}, events=1, last_occurred_at=LAST_ENCODED
    )
    take(f"kid-1,,2025-03-01T{time}Z,b,p,1")
    assert EncoderState.objects.exists() is stays


def test_a_row_that_another_writer_added_in_between_becomes_a_duplicate(monkeypatch: pytest.MonkeyPatch) -> None:
    take(GOOD)
    insert = insert_interactions
    raced: list[bool] = []

    def insert_after_another(rows: Any) -> None:
        if not raced:
            raced.append(True)
            raise IntegrityError("another writer was faster")
        insert(rows)

    monkeypatch.setattr(intake, "insert_interactions", insert_after_another)
    report = take(GOOD, "kid-1,2,,a,p,1")
    assert raced
    assert (report.rows_imported, report.rows_duplicate) == (1, 1)


def test_a_computed_id_that_was_given_by_a_file_before_does_not_stop_the_import() -> None:
    computed = InteractionCsv(file_of("kid-1,9,,a,p,1"), now=datetime.now(UTC))
    (row,) = computed.rows()
    header = "learner_id,seq,category,item_id,score,event_id"
    given = file_of(f"kid-1,1,b,q,1,{row.event_id}", header=header)  # type: ignore[union-attr]
    import_interactions(source=given, pool="FEDERATED", consent=None)
    assert take("kid-1,9,,a,p,1", "kid-1,10,,a,p,1").rejected_by_reason == {"event_id_taken": 1}


def test_an_error_in_the_middle_keeps_whole_batches_and_a_second_run_completes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "BATCH_ROWS", 10)
    insert = insert_interactions
    calls: list[int] = []

    def insert_twice(rows: Any) -> None:
        calls.append(len(rows))
        if len(calls) == 3:
            raise OSError("disk full")
        insert(rows)

    monkeypatch.setattr(intake, "insert_interactions", insert_twice)
    with pytest.raises(OSError, match="disk full"):
        import_interactions(source=simulated(), pool="CURRICULUM", consent=None)
    assert Interaction.objects.count() == 20
    monkeypatch.setattr(intake, "insert_interactions", insert)
    report = import_interactions(source=simulated(), pool="CURRICULUM", consent=None)
    assert report.rows_duplicate == 20
    assert Interaction.objects.count() == report.rows_read


def test_statements_do_not_grow_with_the_rows_of_new_learners() -> None:
    def statements(source: io.BytesIO) -> int:
        with CaptureQueriesContext(connection) as queries:
            import_interactions(source=source, pool="CURRICULUM", consent=None)
        return len(queries)

    register_organisation(slug="default")
    assert statements(simulated(learners=2, events=20, seed=1)) == statements(simulated(learners=8, events=60, seed=2))


def test_the_audit_log_says_how_much_was_imported_and_names_nobody() -> None:
    take(GOOD, "kid-1,2,,a,p,9")
    event = AuditEvent.objects.get(action="interactions.imported")
    assert event.data["rows_imported"] == 1
    assert event.data["rows_rejected"] == 1
    assert "kid" not in str(event.data)


def test_progress_ends_at_the_size_of_the_file() -> None:
    seen: list[tuple[int, int]] = []
    source = simulated()
    import_interactions(
        source=source, pool="CURRICULUM", consent=None, progress=lambda done, total, message: seen.append((done, total))
    )
    assert seen[-1] == (len(source.getvalue()), len(source.getvalue()))


def test_an_import_gives_no_consent_unless_asked() -> None:
    report = take(GOOD)
    learner = Learner.objects.get()
    assert not learner.consent_training
    assert not learner.consent_contribution
    assert not ConsentEvent.objects.exists()
    assert report.consented == 0


def test_a_learner_registered_before_keeps_what_it_has(school: Organisation) -> None:
    before = register_learner(learner_id="kid-1", organisation=school, grade_band="3-5", profile={"needs": ["reading"]})
    report = take(GOOD)
    after = Learner.objects.get()
    assert (after.pk, after.grade_band, after.profile, after.organisation) == (before.pk, "3-5", {"needs": ["reading"]}, school)
    assert (report.learners, report.learners_created) == (1, 0)


@needs_logs
def test_real_logs_go_in_whole_and_a_second_time_not_at_all() -> None:
    source = SHARED / "data" / "sample_assist.csv"
    report = import_interactions(source=source, pool=Pool.FEDERATED, consent=None)
    assert (report.rows_read, report.rows_imported, report.rows_rejected, report.learners) == (480, 480, 0, 8)
    with source.open(newline="") as file:
        rows = {(row["learner_id"], int(row["seq"])): row for row in csv.DictReader(file)}
    for stored in Interaction.objects.select_related("learner"):
        row = rows[stored.learner.learner_id, stored.seq]
        assert (stored.category, stored.item_id, stored.score) == (row["category"], row["item_id"], float(row["score"]))
        assert stored.attempts == int(row["attempts"])
        time = stored.occurred_at.strftime("%Y-%m-%dT%H:%M:%SZ") if stored.occurred_at else ""
        assert time == row["occurred_at"]
    assert import_interactions(source=source, pool=Pool.FEDERATED, consent=None).rows_duplicate == 480
