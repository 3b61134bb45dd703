"""Nothing of the event to be predicted, nor of what comes later, may be in its row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from aivo_core.encoding import EncodingError, Event, FittedEncoder, fit_encoder
from aivo_core.encoding.columns import INDEX, SCALED_START
from aivo_core.encoding.counts import fold_of
from aivo_core.samples import Samples
from tests.core.encoding_histories import Histories, make_histories
from tests.core.encoding_oracle import ForecastOracle, item_mean


@pytest.fixture(scope="module")
def histories() -> Histories:
    return make_histories(11, learners=9, events=20, categories=5)


@pytest.fixture(scope="module")
def fitted(histories: Histories) -> FittedEncoder:
    return fit_encoder(histories)


@pytest.mark.parametrize("t", [1, 2, 7, 18])
def test_a_prediction_row_does_not_change_with_its_own_event_or_later_ones(fitted: FittedEncoder, t: int) -> None:
    events = make_histories(99, learners=1)[0][1][:20]
    original, _ = fitted.encoder.encode(events)
    future = [Event("another", "never-seen", "other", 1.0 - event.score, 1e9 + n, 7.0, 3.0) for n, event in enumerate(events[t:])]
    changed, _ = fitted.encoder.encode([*events[:t], *future])
    assert original.first[:t].tobytes() == changed.first[:t].tobytes()
    assert original.content_prior[:t].tobytes() == changed.content_prior[:t].tobytes()
    assert original.first[t:].tobytes() != changed.first[t:].tobytes()


def test_the_second_pass_knows_the_category_of_its_event_and_nothing_else(fitted: FittedEncoder) -> None:
    events = make_histories(98, learners=1)[0][1][:12]
    last = Event("c2", "c2-i1", "s2", 1.0, None, 900.0, 2.0)
    events[-1] = last
    samples, _ = fitted.encoder.encode(events)
    other = replace(last, item="never-seen", subject="x", score=1.0 - last.score, seconds=None, response_ms=1.0, attempts=9.0)
    changed, _ = fitted.encoder.encode([*events[:-1], other])
    assert samples.second.tobytes() == changed.second.tobytes()
    assert samples.level[-1] != changed.level[-1]


def test_a_training_row_equals_a_row_from_tables_refitted_without_its_own_step(
    histories: Histories, fitted: FittedEncoder
) -> None:
    encoder = fitted.encoder
    for key, events in histories[::3]:
        samples = fitted.training_samples(key, events)
        for row in range(0, len(samples), 4):
            last, own = events[row], events[row + 1]
            slot = encoder.slot(last.category)
            oracle = ForecastOracle(histories, encoder, left_out=(key, row + 1), excused=key, without_fold=fold_of(key))
            q = oracle.q(last.item, slot)
            np.testing.assert_allclose(samples.content_prior[row], q, rtol=3e-6)
            np.testing.assert_allclose(samples.first[row, 128:192], q[encoder.context_slots], rtol=3e-6)
            raw = samples.first[row, SCALED_START:] * encoder.scaler.deviation + encoder.scaler.mean
            assert raw[INDEX["expected_item_mean"]] == pytest.approx(oracle.expected_mean(last.item, slot), abs=1e-5)
            assert raw[INDEX["forecast_entropy"]] == pytest.approx(-np.sum(q * np.log(q)) / 4, abs=1e-4)
            mean = item_mean(histories, encoder, own.item, own.category, without_fold=fold_of(key))
            scale = fitted.training_scale(key)
            assert samples.level[row] == pytest.approx(0.5 + 9 * float(scale.hardness(mean)), abs=1e-5)
        np.testing.assert_array_equal(samples.path, encoder.encode(events)[0].path)


def test_the_scales_of_training_rows_do_not_know_their_learners_scores() -> None:
    histories = make_histories(12, learners=9, events=20)
    key, events = histories[4]
    flipped = [(k, [replace(e, score=1.0 - e.score) for e in own] if k == key else own) for k, own in histories]
    one, two = fit_encoder(histories), fit_encoder(flipped)
    before = one.training_samples(key, events)
    after = two.training_samples(key, dict(flipped)[key])
    np.testing.assert_array_equal(before.level, after.level)
    assert one.encoder.sha256 != two.encoder.sha256


def log_loss_of_prior(parts: list[Samples]) -> float:
    own = [part.content_prior[np.arange(len(part)), part.content] for part in parts]
    return float(-np.log(np.concatenate(own)).mean())


def check_prior_is_no_better_than_chance(make: Callable[[str, list[Event]], Samples], histories: Histories) -> None:
    """For categories that are pure noise, no table may forecast them better than their true rates do."""
    parts = [make(key, events) for key, events in histories]
    labels = np.concatenate([part.content for part in parts])
    rates = np.bincount(labels) / len(labels)
    entropy = -np.sum(rates[rates > 0] * np.log(rates[rates > 0]))
    assert log_loss_of_prior(parts) >= entropy - 0.01


def permuted() -> Histories:
    """Histories whose categories were permuted across all learners; items still tell them apart, so that leaks show."""
    histories = make_histories(13, learners=10, events=40, categories=8, items_per_category=2, timed=False)
    rng = np.random.default_rng(0)
    names = [event.category for _, events in histories for event in events]
    rng.shuffle(names)
    left = iter(names)
    return [
        (key, [replace(event, category=next(left), item=f"p{rng.integers(25)}") for event in events]) for key, events in histories
    ]


def test_permuted_labels_leave_training_rows_at_chance_level() -> None:
    histories = permuted()
    fitted = fit_encoder(histories)
    check_prior_is_no_better_than_chance(fitted.training_samples, histories)


def test_a_leaky_table_is_noticed_by_the_same_check() -> None:
    histories = permuted()
    encoder = fit_encoder(histories).encoder
    with pytest.raises(AssertionError):
        check_prior_is_no_better_than_chance(lambda _, events: encoder.encode(events)[0], histories)


def test_nothing_in_training_rows_tells_permuted_labels_apart() -> None:
    """A ridge regression on all columns finds nothing about scores that were drawn by lot."""
    rng = np.random.default_rng(3)
    histories = [
        (key, [replace(event, score=float(rng.random() < 0.5), item=f"p{rng.integers(150)}") for event in events])
        for key, events in make_histories(14, learners=60, events=40, timed=False)
    ]
    fitted = fit_encoder(histories)
    parts = [fitted.training_samples(key, events) for key, events in histories]
    train, test = parts[:40], parts[40:]
    x = np.concatenate([part.second for part in train]).astype(np.float64)
    y = np.concatenate([part.score for part in train]) - 0.5
    weights = np.linalg.solve(x.T @ x + 30 * np.eye(x.shape[1]), x.T @ y)
    guess = np.concatenate([part.second for part in test]) @ weights > 0
    right = np.concatenate([part.score for part in test]) > 0.5
    assert abs(np.mean(guess == right) - 0.5) < 0.06


def test_the_level_of_an_event_is_no_input_of_its_row(fitted: FittedEncoder) -> None:
    """Two items of one category at different levels give the same rows before them."""
    encoder = fitted.encoder
    events = make_histories(97, learners=1)[0][1][:6]
    levels, rows = set(), set()
    for item in [name for name in encoder.vocabulary.items if name.startswith("c2-")]:
        samples, _ = encoder.encode([*events, Event("c2", item, "s2", 1.0)])
        levels.add(float(samples.level[-1]))
        rows.add(samples.first[-1].tobytes() + samples.second[-1].tobytes())
    assert len(levels) > 1
    assert len(rows) == 1


def test_training_rows_exist_only_for_the_histories_of_the_fit(histories: Histories, fitted: FittedEncoder) -> None:
    key, events = histories[0]
    for name, own in (("stranger", events), (key, events[:-1]), (key, histories[1][1])):
        with pytest.raises(EncodingError) as error:
            fitted.training_samples(name, own)
        assert error.value.code == "unknown_learner"
