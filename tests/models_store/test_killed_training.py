"""A main training whose process is killed goes on where it was, and gives one version."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.models_store.factories import events_of

ROOT = Path(__file__).resolve().parents[2]


def manage(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "manage.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=True)


def write_log(path: Path, learners: int) -> None:
    lines = ["learner_id,seq,category,item_id,score"]
    for index in range(learners):
        events = enumerate(events_of(index, 12), start=1)
        lines += [f"l-{index},{seq},{event.category},{event.item},{event.score}" for seq, event in events]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_kill_9_during_main_training_leaves_one_version_after_the_next_run(tmp_path: Path) -> None:
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ("DJANGO_SETTINGS_MODULE", "USE_FEDERATED_LEARNING")},
        "DATABASE_URL": f"sqlite:///{tmp_path / 'db.sqlite3'}",
        "AIVO_MAIN_MODEL_PATH": str(tmp_path / "main"),
        "AIVO_LEARNER_MODELS_PATH": str(tmp_path / "learners"),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "OMP_NUM_THREADS": "1",
    }
    manage(environment, "migrate", "--verbosity", "0")
    write_log(tmp_path / "log.csv", 16)
    consent = ("--consent", "contribution", "--authority", "test")
    manage(environment, "import_interactions", str(tmp_path / "log.csv"), "--pool", "curriculum", *consent)

    training = subprocess.Popen(
        [sys.executable, "manage.py", "train_main_model", "--epochs", "400", "--json"],
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("main/checkpoints/*.checkpoint")):
            assert training.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        training.send_signal(signal.SIGKILL)
        training.wait()
    assert versions(tmp_path) == [("aivo-main-v1", "TRAINING")]
    sound = json.loads(manage(environment, "verify_store", "--json").stdout)
    assert (sound["missing"], sound["corrupt"]) == (0, 0)

    result = json.loads(manage(environment, "train_main_model", "--epochs", "400", "--json").stdout)
    assert result["resumed_from"] >= 1
    assert versions(tmp_path) == [("aivo-main-v1", "ACTIVE")]
    again = json.loads(manage(environment, "train_main_model", "--epochs", "400", "--json").stdout)
    assert (again["created"], again["sha256"]) == (False, result["sha256"])
    sound = json.loads(manage(environment, "verify_store", "--json").stdout)
    assert (sound["missing"], sound["corrupt"], sound["active_pointer"]) == (0, 0, "ok")


def versions(folder: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(folder / "db.sqlite3") as database:
        return database.execute("select version, status from models_store_mainmodelversion").fetchall()
