"""The columns of a row against their definitions, written as plain loops."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from aivo_core.encoding import COLUMN_GROUPS, SCALED_COLUMNS, Event, fit_encoder, group_of
from aivo_core.encoding.columns import INDEX
from tests.core.encoding_histories import make_histories

ENCODER = fit_encoder(make_histories(41, learners=12, events=40)).encoder
HISTORIES = make_histories(42, learners=4, events=45)


def q_after(last: Event) -> np.ndarray:
    item, slot = np.array([ENCODER.vocabulary.item(last.item)]), np.array([ENCODER.slot(last.category)])
    return ENCODER.transitions.forecast(item, slot).q[0].astype(float)


def per_category(past: list[Event]) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Mastery, trace, category ability (128,) and overall ability."""
    mastery, trace, ability = np.full(128, ENCODER.scale.mean), np.zeros(128), np.zeros(128)
    count, overall = np.zeros(128), 0.0
    for n, event in enumerate(past):
        slot = ENCODER.slot(event.category)
        p = ENCODER.scale.place(ENCODER.vocabulary.item(event.item), slot).mean
        b = -math.log(min(max(p, 0.02), 0.98) / (1 - min(max(p, 0.02), 0.98)))
        count[slot] += 1
        error = event.score - 1 / (1 + math.exp(-(overall + ability[slot] - b)))
        overall += 0.12 * (1 + 2 / (1 + n / 5)) * error
        ability[slot] += 0.25 / (1 + count[slot] / 10) * error
        mastery[slot] = 0.7 * mastery[slot] + 0.3 * event.score
        trace *= 0.6
        trace[slot] = 1.0
    return mastery, trace, ability, overall


def expected_columns(past: list[Event]) -> dict[str, float]:
    g = ENCODER.scale.mean
    slots = [ENCODER.slot(event.category) for event in past]
    places = [ENCODER.scale.place(ENCODER.vocabulary.item(e.item), s) for e, s in zip(past, slots, strict=True)]
    mastery, _, ability, overall = per_category(past)
    seen = np.isin(np.arange(128), slots)
    q, last, scores = q_after(past[-1]), slots[-1], [event.score for event in past]
    fast = slow = g
    attempts = response = None
    for event in past:
        fast += 0.2 * (event.score - fast)
        slow += 0.03 * (event.score - slow)
        if event.attempts is not None:
            cut = min(event.attempts, 10.0)
            attempts = cut if attempts is None else attempts + 0.1 * (cut - attempts)
        if event.response_ms is not None:
            response = event.response_ms if response is None else response + 0.1 * (event.response_ms - response)
    streak = 0
    for score in reversed(scores):
        if (score >= 0.5) != (scores[-1] >= 0.5):
            break
        streak += 1 if score >= 0.5 else -1
    run = next((n for n, slot in enumerate(reversed(slots)) if slot != last), len(slots))
    session, sessions = 1, 1
    for one, two in pairwise(past):
        new = one.seconds is not None and two.seconds is not None and two.seconds - one.seconds > 1800
        session, sessions = (1, sessions + 1) if new else (session + 1, sessions)
    known = len(past) > 1 and past[-1].seconds is not None and past[-2].seconds is not None
    gap = past[-1].seconds - past[-2].seconds if known else 0.0
    columns = {
        "score_mean_fast": fast,
        "score_mean_slow": slow,
        "history_length": math.log1p(len(past)) / 6,
        "streak": streak / 5,
        "share_of_slots_seen": seen.sum() / 128,
        "mean_mastery_seen": mastery[seen].mean(),
        "attempts_mean": math.log1p(attempts or 0.0) / 2,
        "response_time_mean": math.log1p(response or 0.0) / 12,
        "response_time_known": float(past[-1].response_ms is not None),
        "score_mean_last_20": float(np.mean(scores[-20:])),
        "distinct_item_share": len({event.item for event in past if event.item}) / len(past),
        "largest_category_share": max(slots.count(slot) for slot in slots) / len(past),
        "forecast_entropy": -np.sum(q * np.log(q)) / 4,
        "forecast_of_last_category": q[last],
        "expected_mastery": np.sum(q * mastery),
        "ability": overall,
        "session_length": math.log1p(session) / 4,
        "session_accuracy": float(np.mean(scores[-session:])),
        "session_index": math.log1p(sessions) / 4,
        "category_run": run / 10,
        "category_run_log": math.log1p(run) / 3,
        "seconds_between_last_two": math.log1p(gap) / 12,
        "seconds_between_known": float(known),
        "expected_seen": q[seen].sum(),
        "last_item_mean": places[-1].mean,
        "expected_category_ability": np.sum(q * ability),
        "last_category_mastery": mastery[last],
        "last_category_count": math.log1p(slots.count(last)) / 4,
        "last_attempts": min(past[-1].attempts or 0.0, 10.0) / 5,
        "time_known": float(past[-1].seconds is not None),
        "surprise": scores[-1] - places[-1].mean,
        "self_transition": ENCODER.transitions.category_next[last, last],
    }
    for index in range(8):
        own = [e.score for e in past if ENCODER.vocabulary.subject_slot(e.subject) == index]
        columns[f"subject_share_{index}"] = len(own) / len(past)
        columns[f"subject_accuracy_{index}"] = float(np.mean(own)) if own else g
    for lag in range(1, 6):
        there = len(past) >= lag
        columns[f"score_{lag}_back"] = scores[-lag] if there else g
        columns[f"decile_{lag}_back"] = places[-lag].decile / 9 if there else 0.5
        columns[f"same_category_{lag}_before_last"] = float(len(past) > lag and slots[-lag - 1] == last)
    return columns


@pytest.mark.parametrize("history", range(4))
def test_every_scaled_column_follows_its_definition(history: int) -> None:
    events = HISTORIES[history][1]
    samples, _ = ENCODER.encode(events)
    for row in (0, 1, 2, 3, 6, 17, 30, 43):
        expected = expected_columns(events[: row + 1])
        item, slot = ENCODER.vocabulary.item(events[row].item), ENCODER.slot(events[row].category)
        forecast = ENCODER.transitions.forecast(np.array([item]), np.array([slot]))
        expected["expected_item_mean"] = float(forecast.expected_mean[0])
        assert set(expected) == set(SCALED_COLUMNS)
        raw = np.array([expected[name] for name in SCALED_COLUMNS])
        scaled = np.clip((raw - ENCODER.scaler.mean) / ENCODER.scaler.deviation, -5, 5)
        # Columns that hardly vary have a tiny deviation, which magnifies float32's rounding of the sums over q.
        np.testing.assert_allclose(samples.first[row, 192:], scaled, rtol=1e-4, atol=2e-3)


def test_the_content_group_tells_recency_and_mastery_and_the_subject_group_the_forecast() -> None:
    events = HISTORIES[1][1]
    samples, _ = ENCODER.encode(events)
    for row in (0, 5, 40):
        mastery, trace, _, _ = per_category(events[: row + 1])
        seen = trace > 0
        np.testing.assert_allclose(samples.first[row, :128], trace + seen * (0.1 + 0.3 * mastery), rtol=1e-5, atol=1e-7)
        assert np.flatnonzero(samples.first[row, :128] > 1).tolist() == [ENCODER.slot(events[row].category)]
        np.testing.assert_allclose(samples.first[row, 128:192], q_after(events[row])[ENCODER.context_slots], rtol=1e-6)


def test_the_second_pass_replaces_the_forecast_by_certainty_and_nothing_else() -> None:
    events = HISTORIES[0][1]
    samples, _ = ENCODER.encode(events)
    for row in (0, 3, 20, 43):
        mastery, trace, ability, _ = per_category(events[: row + 1])
        slot, last = ENCODER.slot(events[row + 1].category), ENCODER.slot(events[row].category)
        known = {
            "forecast_entropy": 0.0,
            "forecast_of_last_category": float(slot == last),
            "expected_mastery": mastery[slot],
            "expected_seen": float(trace[slot] > 0),
            "expected_category_ability": ability[slot],
            "expected_item_mean": ENCODER.scale.category_mean[slot],
        }
        expected = samples.first[row].copy()
        expected[128:192] = ENCODER.context_slots == slot
        for name, value in known.items():
            column = INDEX[name]
            expected[192 + column] = np.clip((value - ENCODER.scaler.mean[column]) / ENCODER.scaler.deviation[column], -5, 5)
        np.testing.assert_allclose(samples.second[row], expected, rtol=1e-4, atol=1e-5)


def test_the_groups_cover_all_columns_once() -> None:
    columns = [column for start, stop in COLUMN_GROUPS.values() for column in range(start, stop)]
    assert columns == list(range(256))
    assert len(SCALED_COLUMNS) == len(set(SCALED_COLUMNS)) == 64
    assert [group_of(column) for column in (0, 127, 128, 191, 192, 223, 224, 255)] == [
        *["content"] * 2,
        *["subject"] * 2,
        *["learner"] * 2,
        *["session"] * 2,
    ]
    # The places that the recipe names.
    assert [192 + INDEX[n] for n in ("forecast_entropy", "expected_mastery", "ability")] == [204, 206, 207]
    assert [192 + INDEX[n] for n in ("expected_seen", "expected_category_ability", "expected_item_mean")] == [231, 233, 236]
    assert [192 + INDEX[n] for n in ("score_1_back", "decile_1_back", "same_category_1_before_last")] == [240, 245, 250]


def test_training_columns_are_standardised() -> None:
    histories = make_histories(43, learners=12, events=40)
    fitted = fit_encoder(histories)
    rows = np.concatenate([fitted.training_samples(key, events).first[:, 192:] for key, events in histories])
    unclipped = np.abs(rows).max(axis=0) < 5
    varies = fitted.encoder.scaler.deviation > 0.01
    np.testing.assert_allclose(rows[:, unclipped].mean(axis=0), 0.0, atol=1e-3)
    np.testing.assert_allclose(rows[:, unclipped & varies].std(axis=0), 1.0, atol=0.11)
