"""A short training on real interaction logs: on learners it never saw the model beats what needs no network."""

from __future__ import annotations

import gzip
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command

from tests.shared import SHARED, needs_logs

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.slow, needs_logs]

LEARNERS = 180


def run(*arguments: str) -> dict[str, Any]:
    out = StringIO()
    call_command(*arguments, "--json", stdout=out, stderr=StringIO())
    result: dict[str, Any] = json.loads(out.getvalue())
    return result


def write_part(path: Path) -> None:
    """The first learners of the curriculum log."""
    seen: set[str] = set()
    with gzip.open(SHARED / "data" / "assist17_main.csv.gz", "rt") as source, path.open("w") as part:
        header = next(source)
        part.write(header)
        column = header.split(",").index("learner_id")
        for line in source:
            seen.add(line.split(",")[column])
            if len(seen) > LEARNERS:
                break
            part.write(line)


def test_a_short_training_on_real_logs_beats_every_baseline(tmp_path: Path) -> None:
    write_part(tmp_path / "part.csv")
    consent = ("--consent", "training,contribution", "--authority", "test")
    run("import_interactions", str(tmp_path / "part.csv"), "--pool", "curriculum", *consent)
    assert run("prepare_curriculum_data")["learners"]["EVALUATION"] == 18
    result = run("train_main_model", "--epochs", "7")
    metrics, baselines = result["metrics"], result["baselines"]
    mixed = metrics["content_mixed"]
    for name in ("most_frequent", "repeat_last", "markov_category", "markov_item"):
        assert mixed["top1"] > baselines[name]["content"]["top1"], name
        assert mixed["log_loss"] < baselines[name]["content"]["log_loss"], name
    assert metrics["path"]["top1"] > baselines["most_frequent"]["path"]["top1"] + 0.2
    difficulty = metrics["difficulty"]
    assert difficulty["auc"] > baselines["item_mean"]["difficulty"]["auc"] + 0.03
    assert difficulty["log_loss"] < baselines["item_mean"]["difficulty"]["log_loss"]
    assert difficulty["calibration_gap"] < 0.06
