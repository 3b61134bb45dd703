"""The encoder on real logs."""

from __future__ import annotations

import csv
import gzip
from datetime import datetime
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from aivo_core.encoding import Event, fit_encoder
from models_store.baselines import fit_baselines
from tests.shared import SHARED, needs_logs

pytestmark = needs_logs


def open_log(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def read_log(name: str) -> dict[str, list[Event]]:
    histories: dict[str, list[Event]] = {}
    with open_log(SHARED / "data" / name) as file:
        for row in csv.DictReader(file):
            moment = row["occurred_at"]
            event = Event(
                category=row["category"],
                item=row["item_id"],
                subject=row["subject"],
                score=float(row["score"]),
                seconds=datetime.fromisoformat(moment).timestamp() if moment else None,
                response_ms=float(row["response_ms"]) if row["response_ms"] else None,
                attempts=float(row["attempts"]) if row["attempts"] else None,
            )
            histories.setdefault(row["learner_id"], []).append(event)
    return histories


def test_a_real_history_streams_to_the_same_rows() -> None:
    histories = read_log("sample_assist.csv")
    keys = sorted(histories)
    encoder = fit_encoder((key, histories[key]) for key in keys[:6]).encoder
    for key in keys[6:]:
        whole, end = encoder.encode(histories[key])
        assert np.all(np.isfinite(whole.first))
        state = None
        for index, event in enumerate(histories[key]):
            if state is not None:
                assert encoder.prediction(state).first.tobytes() == whole.first[index - 1].tobytes()
            _, state = encoder.encode([event], state)
        assert state == end


def test_more_categories_than_slots_overflow_into_the_last_slot() -> None:
    histories = read_log("algebra05_main.csv.gz")
    fitted = fit_encoder(histories.items())
    assert fitted.report["categories"] == 240
    assert fitted.report["overflow_categories"] == 113
    events = [event for own in histories.values() for event in own]
    overflow = sum(fitted.encoder.slot(event.category) == 127 for event in events)
    assert 0.0 < fitted.report["overflow_share"] == pytest.approx(overflow / len(events))
    longest = max(histories, key=lambda key: len(histories[key]))
    samples = fitted.training_samples(longest, histories[longest])
    assert len(samples) == 7020
    assert np.all(np.isfinite(samples.first))
    assert np.all(np.isfinite(samples.second))


def test_baselines_on_learners_they_never_saw_reach_the_measured_figures() -> None:
    """Measured on these logs with other code: item mean .719 / .606, Elo .801 / .526."""
    train, test = read_log("stats15_main.csv.gz"), read_log("stats15_federated.csv.gz")
    fitted = fit_encoder(train.items())
    cases = [(key, events, fitted.encoder.encode(events)[0].split_at(0.7)[1]) for key, events in test.items()]
    figures = fit_baselines(fitted, train.items()).evaluate(cases)
    item, elo = figures["item_mean"]["difficulty"], figures["elo"]["difficulty"]
    assert (item["auc"], item["log_loss"]) == pytest.approx((0.719, 0.606), abs=0.004)
    assert (elo["auc"], elo["log_loss"]) == pytest.approx((0.801, 0.526), abs=0.004)
