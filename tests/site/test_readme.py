"""What the README says is run: its sequence of commands, word for word, on simulated logs."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from learners.simulator import ROW_COLUMNS, Simulator

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def _commands() -> list[list[str]]:
    block = README.split("## On real logs", 1)[1].split("```", 2)[1]
    return [shlex.split(line) for line in block.splitlines() if line.startswith("python manage.py")]


def _write_logs(folder: Path) -> None:
    simulator = Simulator(7, learners=64, prefix="readme")
    for name, indices in {"main": range(50), "federated": range(50, 64)}.items():
        with (folder / f"{name}.csv.gz").open("w", newline="") as file:
            writer = csv.DictWriter(file, ROW_COLUMNS)
            writer.writeheader()
            writer.writerows(simulator.rows(events=110, indices=indices))


@pytest.mark.slow
def test_the_sequence_of_the_readme_runs_from_an_empty_folder_to_a_round(tmp_path: Path) -> None:
    _write_logs(tmp_path)
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("AIVO_", "DJANGO_"))},
        "SECRET_KEY": "readme-test-only-0123456789-abcdefghijklmnopqrstuvwxyz",
        "HTTPS": "false",
        "DATABASE_URL": f"sqlite:///{tmp_path / 'db.sqlite3'}",
        "AIVO_MAIN_MODEL_PATH": str(tmp_path / "main-aivo"),
        "AIVO_LEARNER_MODELS_PATH": str(tmp_path / "learners"),
        "OMP_NUM_THREADS": "1",
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "manage.py", *arguments], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False
        )

    assert run("migrate", "--verbosity", "0").returncode == 0
    commands = _commands()
    assert len(commands) >= 9
    results: dict[str, dict[str, object]] = {}
    for _python, _manage, name, *arguments in commands:
        there = [argument.replace("LOGS/", f"{tmp_path}/") for argument in arguments]
        done = run(name, *there, "--json")
        assert done.returncode == 0, (name, done.returncode, done.stdout[-2000:], done.stderr[-4000:])
        results[name] = json.loads(done.stdout)
    assert results["train_main_model"]["version"] == "aivo-main-v1"
    assert results["run_federated_aggregation"]["state"] in {"PROMOTED", "REJECTED"}
    assert results["federation_status"]["active_version"] in {"aivo-main-v1", "aivo-main-v2"}


def test_the_two_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"`?make ([a-z-]+)", README))
    assert {"run", "test", "demo"} <= named <= targets


def test_every_document_that_the_readme_names_exists() -> None:
    for target in re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (REPOSITORY / target).exists(), target
