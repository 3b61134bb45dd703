"""Baselines against their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivo_core.encoding import Event, FittedEncoder, fit_encoder
from models_store.baselines import Baselines, fit_baselines, logistic_regression
from models_store.metrics import EvaluationError, class_figures, success_figures
from tests.core.encoding_histories import Histories, make_histories

HISTORIES = make_histories(51, learners=16, events=40)
UNSEEN = make_histories(52, learners=6, events=40)


@pytest.fixture(scope="module")
def fitted() -> FittedEncoder:
    return fit_encoder(HISTORIES)


@pytest.fixture(scope="module")
def baselines(fitted: FittedEncoder) -> Baselines:
    return fit_baselines(fitted, HISTORIES)


def test_the_figures_have_the_contracts_names_and_heads(fitted: FittedEncoder, baselines: Baselines) -> None:
    cases = [(key, events, fitted.encoder.encode(events)[0].split_at(0.7)[1]) for key, events in UNSEEN]
    figures = baselines.evaluate(cases)
    assert {name: set(heads) for name, heads in figures.items()} == {
        "most_frequent": {"content", "path"},
        "repeat_last": {"content"},
        "markov_category": {"content"},
        "markov_item": {"content"},
        "item_mean": {"difficulty"},
        "elo": {"difficulty"},
    }
    assert set(figures["markov_item"]["content"]) == {"top1", "top5", "log_loss"}
    assert set(figures["elo"]["difficulty"]) == {"auc", "log_loss", "brier", "calibration_gap", "worst_bin"}
    assert set(figures["most_frequent"]["path"]) == {"top1", "log_loss"}


def test_content_baselines_are_what_their_names_say(fitted: FittedEncoder, baselines: Baselines) -> None:
    encoder = fitted.encoder
    events = UNSEEN[0][1]
    samples, _ = encoder.encode(events)
    part = samples.take(slice(10, 20))
    forecasts = baselines.content(events, part)
    slots = [encoder.slot(event.category) for event in events]
    steps = [(a.category, b.category) for _, own in HISTORIES for a, b in itertools.pairwise(own)]
    repeats = sum(a == b for a, b in steps)
    for row in range(len(part)):
        last = slots[row + 10]
        np.testing.assert_allclose(forecasts["most_frequent"][row], encoder.base_rates)
        np.testing.assert_allclose(forecasts["markov_category"][row], encoder.transitions.category_next[last])
        np.testing.assert_allclose(forecasts["markov_item"][row], part.content_prior[row])
        assert forecasts["repeat_last"][row].argmax() == last
        assert forecasts["repeat_last"][row, last] == pytest.approx((repeats + 1) / (len(steps) + 128))
    for values in forecasts.values():
        np.testing.assert_allclose(values.sum(axis=1), 1.0, rtol=1e-5)


def test_the_item_mean_is_the_tables_mean_of_the_coming_item(fitted: FittedEncoder, baselines: Baselines) -> None:
    encoder = fitted.encoder
    events = UNSEEN[1][1]
    samples, _ = encoder.encode(events)
    means = baselines.item_means(events, samples.take(slice(5, 8)))
    expected = [
        encoder.scale.place(encoder.vocabulary.item(event.item), encoder.slot(event.category)).mean for event in events[6:9]
    ]
    np.testing.assert_allclose(means, expected)


def test_elo_does_not_see_the_answer_that_it_forecasts(fitted: FittedEncoder, baselines: Baselines) -> None:
    events = UNSEEN[2][1]
    samples, _ = fitted.encoder.encode(events)
    before = baselines.elo(events, samples)
    flipped = [*events[:20], *[Event(e.category, e.item, e.subject, 1 - e.score, e.seconds) for e in events[20:]]]
    after = baselines.elo(flipped, fitted.encoder.encode(flipped)[0])
    np.testing.assert_array_equal(before[:20], after[:20])
    assert not np.array_equal(before[20:], after[20:])


def students(seed: int, learners: int) -> Histories:
    """Learners of very different ability on items of different difficulty (Rasch model)."""
    rng = np.random.default_rng(seed)
    difficulty = np.linspace(-2, 2, 30)
    histories: Histories = []
    for number in range(learners):
        ability = rng.normal(0, 1.5)
        items = rng.integers(0, 30, 60)
        right = rng.random(60) < 1 / (1 + np.exp(difficulty[items] - ability))
        histories.append((f"{seed}-{number}", [Event("c", f"i{i}", "s", float(r)) for i, r in zip(items, right, strict=True)]))
    return histories


def test_elo_beats_the_item_mean_where_learners_differ() -> None:
    train, test = students(1, 60), students(2, 30)
    fitted = fit_encoder(train)
    cases = [(key, events, fitted.encoder.encode(events)[0].split_at(0.5)[1]) for key, events in test]
    figures = fit_baselines(fitted, train).evaluate(cases)
    elo, item = figures["elo"]["difficulty"], figures["item_mean"]["difficulty"]
    assert elo["auc"] is not None
    assert item["auc"] is not None
    assert elo["auc"] > item["auc"] + 0.05
    assert elo["log_loss"] < item["log_loss"]  # type: ignore[operator]
    # With one category its rating and the learner's say the same: only their sum has a sign.
    coefficients = fit_baselines(fitted, train).elo_coefficients
    assert coefficients[1] + coefficients[2] > 0 > coefficients[3]


def test_evaluating_pools_samples_over_learners(fitted: FittedEncoder, baselines: Baselines) -> None:
    cases = [(key, events, fitted.encoder.encode(events)[0]) for key, events in UNSEEN[:3]]
    figures = baselines.evaluate(cases)
    label = np.concatenate([samples.content for _, _, samples in cases])
    prior = np.concatenate([samples.content_prior for _, _, samples in cases]).astype(float)
    assert figures["markov_item"]["content"] == class_figures(prior, label, 5)
    score = np.concatenate([samples.score for _, _, samples in cases])
    elo = np.concatenate([baselines.elo(events, samples) for _, events, samples in cases])
    assert figures["elo"]["difficulty"] == success_figures(elo, score)


def test_baselines_refuse_nothing_to_measure_and_foreign_samples(fitted: FittedEncoder, baselines: Baselines) -> None:
    key, events = UNSEEN[0]
    samples, _ = fitted.encoder.encode(events)
    for cases, code in (([], "no_samples"), ([(key, events[:5], samples)], "wrong_shape")):
        with pytest.raises(EvaluationError) as error:
            baselines.evaluate(cases)
        assert error.value.code == code
    with pytest.raises(EvaluationError):
        fit_baselines(fitted, [])


def test_logistic_regression_finds_the_coefficients_that_made_the_data() -> None:
    rng = np.random.default_rng(4)
    columns = np.column_stack([np.ones(40_000), rng.normal(size=(40_000, 2))])
    true = np.array([0.3, -1.2, 0.7])
    score = (rng.random(40_000) < 1 / (1 + np.exp(-columns @ true))).astype(float)
    np.testing.assert_allclose(logistic_regression(columns, score), true, atol=0.05)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(0, 1)), min_size=2, max_size=30))
def test_logistic_regression_ends_at_a_stationary_point(rows: list[tuple[float, float]]) -> None:
    x, score = np.array(rows).T
    columns = np.column_stack([np.ones(len(x)), x])
    found = logistic_regression(columns, score)
    assert np.all(np.isfinite(found))
    gradient = columns.T @ (score - 1 / (1 + np.exp(-columns @ found))) - 1e-6 * len(x) * found
    assert np.abs(gradient).max() < 1e-4 * len(x)


def test_a_separable_sample_stays_finite() -> None:
    columns = np.column_stack([np.ones(6), np.arange(6.0)])
    assert np.all(np.isfinite(logistic_regression(columns, np.array([0.0, 0, 0, 1, 1, 1]))))
