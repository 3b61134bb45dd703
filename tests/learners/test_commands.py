"""The learners' commands: what goes to which stream, and the exit code."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from learners.importing import import_interactions
from learners.models import ConsentEvent, Interaction, Learner, Pool
from learners.simulator import Simulator
from tests.learners.csv_files import GOOD, file_of

pytestmark = pytest.mark.django_db

BAD_FILES = (("a.csv", b"", "empty_file"), ("b.csv", b"x,y\n", "unknown_column"), ("c.csv", None, "file_not_found"))
CONTRACT = {
    "rows_read", "rows_imported", "rows_duplicate", "rows_rejected", "rejected_by_reason", "learners", "consented",
    "rejects_file", "seconds",
}  # fmt: skip


def run(*arguments: Any, code: int = 0) -> str:
    out = StringIO()
    try:
        call_command(*map(str, arguments), stdout=out, stderr=StringIO())
    except SystemExit as exit_:
        assert exit_.code == code
    else:
        assert code == 0
    return out.getvalue()


def run_json(*arguments: Any, code: int = 0) -> dict[str, Any]:
    text = run(*arguments, "--json", code=code)
    assert text.count("\n") == 1
    result: dict[str, Any] = json.loads(text)
    return result


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.csv"
    path.write_bytes(file_of(GOOD, "kid-1,2,,a,p,1.2", "kid-2,1,,a,p,0").getvalue())
    return path


def test_import_prints_one_object_with_the_keys_of_the_contract(log: Path) -> None:
    consent = ("--consent", "training,contribution", "--authority", "guardians, forms")
    result = run_json("import_interactions", log, "--pool", "federated", *consent)
    assert set(result) >= CONTRACT
    assert (result["rows_read"], result["rows_imported"], result["rows_rejected"]) == (3, 2, 1)
    assert result["rejected_by_reason"] == {"score_out_of_range": 1}
    assert [(one["line"], one["reason"]) for one in result["first_rejects"]] == [(3, "score_out_of_range")]
    assert "raw" not in result["first_rejects"][0]
    assert (result["learners"], result["consented"]) == (2, 2)
    assert result["rejects_file"] == f"{log}.rejects.csv"
    assert Path(result["rejects_file"]).is_file()
    assert set(Learner.objects.values_list("pool", flat=True)) == {Pool.FEDERATED}
    assert set(ConsentEvent.objects.values_list("authority", flat=True)) == {"guardians, forms"}


def test_import_without_consent_says_that_learners_stay_without(log: Path) -> None:
    text = run("import_interactions", log, "--pool", "curriculum")
    assert "no consent" in text
    assert "line 3: score must lie from 0 to 1" in text
    assert not Learner.objects.filter(consent_training=True).exists()


def test_import_says_who_had_withdrawn(log: Path) -> None:
    arguments = ("import_interactions", log, "--pool", "federated", "--consent", "training", "--authority", "forms")
    run(*arguments)
    run("record_consent", "kid-1", "--withdraw", "training", "--authority", "guardian")
    text = run(*arguments)
    assert "1 learners hold" in text
    assert "withdrew" in text


def test_a_dry_run_writes_neither_rows_nor_a_rejects_file_unless_that_is_named(log: Path, tmp_path: Path) -> None:
    result = run_json("import_interactions", log, "--pool", "federated", "--dry-run")
    assert (result["rows_imported"], result["rejects_file"]) == (2, None)
    assert list(tmp_path.iterdir()) == [log]
    assert not Learner.objects.exists()
    named = tmp_path / "named.csv"
    assert run_json("import_interactions", log, "--pool", "federated", "--dry-run", "--rejects-file", named)["rejects_file"]
    assert named.is_file()


def test_rejects_go_to_the_current_folder_where_the_input_folder_is_closed(
    log: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    tmp_path.chmod(0o500)
    try:
        result = run_json("import_interactions", log, "--pool", "federated")
    finally:
        tmp_path.chmod(0o700)
    assert Path(result["rejects_file"]).parent == here
    assert list(tmp_path.iterdir()) == [log]


def test_a_file_of_bad_rows_only_fails_and_one_without_rows_is_skipped(tmp_path: Path) -> None:
    bad, empty = tmp_path / "bad.csv", tmp_path / "empty.csv"
    bad.write_bytes(file_of("kid-1,1,,a,p,7").getvalue())
    empty.write_bytes(file_of().getvalue())
    assert run_json("import_interactions", bad, "--pool", "federated", code=1)["rows_rejected"] == 1
    assert run_json("import_interactions", empty, "--pool", "federated", code=3)["rows_read"] == 0


def test_a_file_that_is_bad_as_a_whole_fails_with_its_code(tmp_path: Path) -> None:
    for name, content, code in BAD_FILES:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        result = run_json("import_interactions", path, "--pool", "federated", code=1)
        assert result["error"]["code"] == code
        assert set(result) >= CONTRACT
    assert not Interaction.objects.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--pool", "federated", "--consent", "training"], "authority"),
        (["--pool", "federated", "--consent", "dancing", "--authority", "x"], "TRAINING"),
        (["--pool", "federated", "--consent", ",", "--authority", "x"], "at least one"),
        (["--pool", "federated", "--authority", "x"], "--consent"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_what_is_allowed(log: Path, arguments: list[str], says: str) -> None:
    with pytest.raises(CommandError, match=says) as caught:
        call_command("import_interactions", str(log), *arguments, stdout=StringIO(), stderr=StringIO())
    assert caught.value.returncode == 2
    assert not Learner.objects.exists()


@pytest.mark.parametrize(("arguments", "says"), [(["--pool", "swimming"], "curriculum"), ([], "--pool")])
def test_the_pool_must_be_named_and_be_one_of_three(log: Path, arguments: list[str], says: str) -> None:
    with pytest.raises(CommandError, match=says):
        call_command("import_interactions", str(log), *arguments, stdout=StringIO(), stderr=StringIO())
    assert not Learner.objects.exists()


def test_an_unknown_organisation_is_refused(log: Path) -> None:
    with pytest.raises(CommandError, match="nowhere") as refused:
        run("import_interactions", log, "--pool", "federated", "--organisation", "nowhere")
    assert refused.value.returncode == 2


def test_record_consent_gives_and_withdraws(learner: Learner) -> None:
    given = run_json("record_consent", "kid-1", "--give", "training,contribution", "--authority", "guardian")
    assert given["changed"] == ["training", "contribution"]
    assert (given["consent_training"], given["consent_external_transfer"]) == (True, False)
    again = run_json("record_consent", "kid-1", "--give", "training", "--authority", "guardian")
    assert again["changed"] == []
    gone = run_json("record_consent", "KID-1", "--withdraw", "all", "--authority", "guardian")
    assert not gone["consent_training"]
    learner.refresh_from_db()
    assert not learner.consent_contribution


def test_record_consent_refuses_unknown_learners_and_kinds(learner: Learner) -> None:
    with pytest.raises(CommandError, match="learner_id") as unknown:
        run("record_consent", "nobody", "--give", "training", "--authority", "guardian")
    assert unknown.value.returncode == 2
    with pytest.raises(CommandError, match="EXTERNAL_TRANSFER") as caught:
        call_command("record_consent", "kid-1", "--give", "dancing", "--authority", "guardian", stderr=StringIO())
    assert caught.value.returncode == 2
    assert not ConsentEvent.objects.exists()


@pytest.mark.parametrize("name", ["simulated.csv", "simulated.csv.gz"])
def test_simulated_learners_can_be_imported_as_they_are(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    result = run_json("simulate_learners", "--learners", 5, "--events", 20, "--seed", 3, "--out", out)
    assert (out.read_bytes()[:2] == b"\x1f\x8b") is name.endswith(".gz")
    report = import_interactions(source=out, pool="FEDERATED", consent=None)
    assert (report.rows_rejected, report.rows_imported, report.learners) == (0, result["rows"], 5)
    expected = list(Simulator(3, learners=5).rows(events=20))
    assert Interaction.objects.count() == len(expected)
    stored = Interaction.objects.get(learner__learner_id=expected[7]["learner_id"], seq=expected[7]["seq"])
    assert (stored.item_id, stored.score, stored.response_ms) == (
        expected[7]["item_id"],
        expected[7]["score"],
        expected[7]["response_ms"],
    )


def test_the_same_simulation_writes_the_same_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / "a.csv.gz", tmp_path / "b.csv.gz"]
    for path in paths:
        run("simulate_learners", "--learners", 3, "--events", 10, "--out", path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--learners", "0"], "learners"),
        (["--events", "1"], "events"),
        (["--seed", "-1"], "seed"),
        (["--out", "/nowhere-at-all/x.csv"], "--out"),
    ],
)
def test_a_simulation_out_of_bounds_is_wrong_usage(tmp_path: Path, arguments: list[str], says: str) -> None:
    with pytest.raises(CommandError, match=says) as caught:
        call_command("simulate_learners", "--out", str(tmp_path / "x.csv"), *arguments, stderr=StringIO())
    assert caught.value.returncode == 2
    assert not list(tmp_path.iterdir())
