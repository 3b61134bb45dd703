"""The encoder's tables against plain loops, the rule of three learners, overflow and the difficulty scale."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivo_core.encoding import EncodingError, Event, FittedEncoder, fit_encoder
from aivo_core.encoding.fit import falling
from tests.core.encoding_histories import Histories, make_histories
from tests.core.encoding_oracle import ForecastOracle, item_mean


@pytest.fixture(scope="module")
def histories() -> Histories:
    return make_histories(1, learners=7, events=25, items_per_category=5)


@pytest.fixture(scope="module")
def fitted(histories: Histories) -> FittedEncoder:
    return fit_encoder(histories)


def test_the_forecast_equals_plain_loops_with_small_cells_given_to_their_fallback(
    histories: Histories, fitted: FittedEncoder
) -> None:
    encoder = fitted.encoder
    oracle = ForecastOracle(histories, encoder)
    assert fitted.report["suppressed"]["item_cells_suppressed"] > 0
    assert fitted.report["suppressed"]["category_cells_suppressed"] > 0
    np.testing.assert_allclose(encoder.base_rates, oracle.base_rates(), rtol=1e-12)
    seen = {(event.item, event.category) for _, events in histories for event in events}
    for item, category in sorted(seen):
        slot = encoder.slot(category)
        forecast = encoder.transitions.forecast(np.array([encoder.vocabulary.item(item)]), np.array([slot]))
        np.testing.assert_allclose(forecast.q[0], oracle.q(item, slot), rtol=2e-6)
        np.testing.assert_allclose(forecast.expected_mean[0], oracle.expected_mean(item, slot), rtol=1e-12)
        np.testing.assert_allclose(forecast.self_transition[0], oracle.category_row(slot)[slot], rtol=1e-6)


def test_item_means_equal_plain_loops(histories: Histories, fitted: FittedEncoder) -> None:
    encoder = fitted.encoder
    for item, category in {(event.item, event.category) for _, events in histories for event in events}:
        place = encoder.scale.place(encoder.vocabulary.item(item), encoder.slot(category))
        assert place.mean == pytest.approx(item_mean(histories, encoder, item, category), rel=1e-12)


def test_forecasts_are_distributions(fitted: FittedEncoder) -> None:
    encoder = fitted.encoder
    items = np.arange(len(encoder.vocabulary.items) + 1)
    for slot in (0, 3, 127):
        q = encoder.transitions.forecast(items, np.full(len(items), slot)).q
        assert np.all(q > 0)
        np.testing.assert_allclose(q.sum(axis=1), 1.0, rtol=1e-5)


def test_what_two_learners_did_cannot_be_read_out_of_any_table() -> None:
    """An item, and a step, that only two learners had leaves no trace except in totals."""
    common = make_histories(2, learners=8, timed=False)
    secret = Event("c0", "secret-item", "s0", 1.0)
    with_secret = [(key, [*events, secret, events[0]] if index < 2 else events) for index, (key, events) in enumerate(common)]
    encoder = fit_encoder(with_secret).encoder
    assert "secret-item" not in encoder.vocabulary.items
    assert encoder.level("secret-item", "c0") == encoder.level("never seen", "c0")
    kept = encoder.transitions.item_kept[: len(encoder.vocabulary.items)]
    for index, item in enumerate(encoder.vocabulary.items):
        for slot in np.flatnonzero(kept[index]):
            name = encoder.category(int(slot))
            behind = {
                key for key, events in with_secret for one, two in pairwise(events) if one.item == item and two.category == name
            }
            assert len(behind) >= 3


def test_levels_rise_with_difficulty_and_split_the_events_evenly() -> None:
    rng = np.random.default_rng(5)
    histories = [
        (f"l{n}", [Event("c", f"i{i}", "s", float(rng.random() < (i + 0.5) / 90)) for i in rng.permutation(90)])
        for n in range(60)
    ]
    encoder = fit_encoder(histories).encoder
    levels = np.array([encoder.level(f"i{i}", "c") for i in range(90)])
    assert levels.min() >= 0.5
    assert levels.max() <= 9.5
    counts = np.bincount(np.clip(np.ceil(levels - 0.5), 1, 9).astype(int), minlength=10)[1:]
    assert counts.min() >= 7
    assert np.corrcoef(levels, np.arange(90))[0, 1] < -0.95
    assert np.all(np.diff(encoder.success_by_level) <= 0)
    assert encoder.success_by_level[0] > 0.75
    assert encoder.success_by_level[-1] < 0.25


def test_level_is_exact_on_a_scale_with_two_items() -> None:
    events = [Event("c", "easy", "s", 1.0), Event("c", "hard", "s", 0.0)]
    encoder = fit_encoder((f"l{n}", events) for n in range(20)).encoder
    # Hardness .25 and .75: the mid-ranks of the upper and the lower half of all events.
    assert encoder.level("easy", "c") == pytest.approx(0.5 + 9 * 0.25)
    assert encoder.level("hard", "c") == pytest.approx(0.5 + 9 * 0.75)


def test_categories_beyond_127_share_the_last_slot_and_are_counted() -> None:
    rng = np.random.default_rng(7)
    frequent = [f"c{i:03d}" for i in range(127) for _ in range(3)]
    rare = [f"rare{i:02d}" for i in range(20)]
    histories = []
    for n in range(4):
        names = frequent + rare
        rng.shuffle(names)
        histories.append(
            (f"l{n}", [Event(name, f"{name}-i", f"s{hash_free(name)}", float(rng.random() < 0.5)) for name in names])
        )
    fitted = fit_encoder(histories)
    assert fitted.report["categories"] == 147
    assert fitted.report["overflow_categories"] == 20
    assert fitted.report["overflow_share"] == pytest.approx(20 / 401)
    assert {fitted.encoder.slot(name) for name in rare} == {127}
    assert sorted(fitted.encoder.slot(f"c{i:03d}") for i in range(127)) == list(range(127))
    samples, _ = fitted.encoder.encode(histories[0][1])
    expected = [127 if event.category in rare else int(event.category[1:]) for event in histories[0][1][1:]]
    assert samples.content.tolist() == expected
    assert len({fitted.encoder.vocabulary.subject_slot(f"s{i}") for i in range(12)}) == 8


def hash_free(name: str) -> int:
    """A number 0..11 from a name, the same in every process."""
    return sum(name.encode()) % 12


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.5, 50)), min_size=1, max_size=9))
def test_pooling_gives_a_falling_sequence_of_the_same_weighted_mean(pairs: list[tuple[float, float]]) -> None:
    rate, weight = np.array(pairs).T
    result = falling(rate, weight)
    assert np.all(np.diff(result) <= 1e-12)
    assert np.sum(result * weight) == pytest.approx(np.sum(rate * weight), abs=1e-9)
    np.testing.assert_allclose(falling(result, weight), result, atol=1e-12)


def test_a_fit_needs_three_learners_different_keys_and_a_step() -> None:
    events = [Event("c", "i", "s", 1.0), Event("c", "i", "s", 0.0)]
    with pytest.raises(EncodingError, match="at least 3 learners") as few:
        fit_encoder([("a", events), ("b", events)])
    assert few.value.code == "too_few_learners"
    with pytest.raises(EncodingError) as no_step:
        fit_encoder([(key, events[:1]) for key in "abcd"])
    assert no_step.value.code == "too_few_learners"
    with pytest.raises(EncodingError) as twice:
        fit_encoder([("a", events), ("a", events), ("b", events)])
    assert twice.value.code == "duplicate_learner"


def test_a_bad_event_in_a_fit_is_named_with_its_learner() -> None:
    histories = make_histories(3, learners=4)
    histories[2][1][5] = Event("c", "i", "s", 1.5)
    with pytest.raises(EncodingError, match=r"learner-002, event 5: score must lie in 0\.\.1") as error:
        fit_encoder(histories)
    assert error.value.code == "bad_event"


def test_a_fit_does_not_depend_on_the_order_of_learners() -> None:
    histories = make_histories(4)
    forward, backward = fit_encoder(histories).encoder, fit_encoder(histories[::-1]).encoder
    assert forward.sha256 == backward.sha256
