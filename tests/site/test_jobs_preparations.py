"""What runs on a machine before the workers of a queue start there."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from aivo_site.jobs import preparations
from aivo_site.jobs.preparations import Preparation, prepare, register_preparation


@pytest.fixture(autouse=True)
def _own_preparations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparations, "_PREPARATIONS", {})


def _module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, body: str) -> str:
    (folder / f"{name}.py").write_text(body, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return name


def test_only_the_queues_own_preparations_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    body = (
        f"from pathlib import Path\npath = Path({str(mark)!r})\npath.write_text(path.read_text() + 'x' if path.exists() else 'x')"
    )
    register_preparation(Preparation("training", _module(tmp_path, monkeypatch, "prepared_once", body)))
    assert prepare("default")
    assert not mark.exists()
    assert prepare("training")
    assert mark.read_text() == "x"


def test_a_failing_preparation_is_reported_and_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mark = tmp_path / "mark"
    register_preparation(Preparation("training", _module(tmp_path, monkeypatch, "prepared_badly", "raise SystemExit('no room')")))
    register_preparation(
        Preparation("training", _module(tmp_path, monkeypatch, "prepared_well", f"open({str(mark)!r}, 'w').close()"))
    )
    with caplog.at_level(logging.WARNING):
        assert not prepare("training")
    assert mark.exists()
    assert "prepared_badly ended with 1" in caplog.text
    assert "no room" in caplog.text


def test_a_preparation_that_hangs_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(preparations, "_LONGEST_SECONDS", 0.2)
    register_preparation(Preparation("training", _module(tmp_path, monkeypatch, "prepared_never", "import time; time.sleep(60)")))
    with caplog.at_level(logging.WARNING):
        assert not prepare("training")
    assert "did not end" in caplog.text
