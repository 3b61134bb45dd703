"""The environment reader: types, defaults, and typing errors that stop the start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured

from aivo_site import environment
from aivo_site.environment import read_environment
from aivo_site.first_start import write_dotenv

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of its own in the role of the checkout, and an environment without the product's names."""
    monkeypatch.setattr(environment, "BASE_DIR", tmp_path)
    for name in environment.NAMES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_what_is_unset_has_the_documented_default(elsewhere: Path) -> None:
    values = read_environment()
    assert values.use_federated_learning is False
    assert values.https is True
    assert values.debug is False
    assert values.main_model_path == elsewhere / "models/main-aivo"
    assert values.database_url == f"sqlite:///{elsewhere / 'db.sqlite3'}"
    assert values.q_broker == "orm"


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "ON"])
def test_yes_has_several_spellings(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("USE_FEDERATED_LEARNING", text)
    assert read_environment().use_federated_learning is True


@pytest.mark.parametrize(("text", "expected"), [("", None), (" 3 ", 3), ("1024", 1024)])
def test_the_engines_threads_are_a_number_or_the_machines_cores(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: int | None
) -> None:
    monkeypatch.setenv("AIVO_ENGINE_THREADS", text)
    assert read_environment().engine_threads == expected


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "1025", "9" * 40, "²"])
def test_an_impossible_number_of_threads_stops_the_start(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("AIVO_ENGINE_THREADS", text)
    with pytest.raises(ImproperlyConfigured, match="AIVO_ENGINE_THREADS"):
        read_environment()


def test_the_engines_memory_is_a_number_of_megabytes_or_unbounded(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_environment().engine_memory_mb is None
    monkeypatch.setenv("AIVO_ENGINE_MEMORY_MB", "2048")
    assert read_environment().engine_memory_mb == 2048
    monkeypatch.setenv("AIVO_ENGINE_MEMORY_MB", "0")
    with pytest.raises(ImproperlyConfigured, match="AIVO_ENGINE_MEMORY_MB must be a whole number from 1 to 1000000"):
        read_environment()


@pytest.mark.parametrize("name", ["USE_FEDERATED_LEARNING", "DEBUG", "HTTPS"])
@pytest.mark.parametrize("text", ["ture", "2", '"true', "enabled"])
def test_a_misspelt_boolean_stops_the_start(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ImproperlyConfigured, match=name):
        read_environment()


def test_an_unknown_name_in_the_file_stops_the_start(elsewhere: Path) -> None:
    (elsewhere / ".env").write_text("# comment\nSECRET_KEY=x\nUSE_FEDERATED_LERNING=true\n")
    with pytest.raises(ImproperlyConfigured, match=r"line 3: unknown name USE_FEDERATED_LERNING"):
        read_environment()


def test_an_unknown_name_of_ours_in_the_environment_stops_the_start(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIVO_MAIN_MODELS_PATH", "elsewhere")
    with pytest.raises(ImproperlyConfigured, match="AIVO_MAIN_MODELS_PATH"):
        read_environment()


def test_the_environment_wins_over_the_file(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / ".env").write_text("AIVO_TIME_ZONE=Europe/Berlin\nQ_BROKER=redis\n")
    monkeypatch.setenv("AIVO_TIME_ZONE", "America/Denver")
    monkeypatch.setenv("Q_BROKER", "orm")
    values = read_environment()
    assert (values.time_zone, values.q_broker) == ("America/Denver", "orm")


def test_the_example_file_names_exactly_what_is_read() -> None:
    lines = (REPOSITORY / ".env.example").read_text().splitlines()
    named = {
        line.removeprefix("# ").split("=")[0]
        for line in lines
        if "=" in line and " " not in line.removeprefix("# ").split("=")[0]
    }
    assert named == environment.NAMES


def test_the_first_start_writes_a_private_key_once(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    assert write_dotenv(path) is True
    first = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(next(line for line in first.splitlines() if line.startswith("SECRET_KEY=")).split("=", 1)[1]) >= 50
    assert write_dotenv(path) is False
    assert path.read_text() == first


def test_nothing_starts_without_a_secret_key(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in environment.NAMES}
    kept["SECRET_KEY"] = ""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "manage.py"), "check"],
        env=kept,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert "SECRET_KEY is not set" in done.stderr
