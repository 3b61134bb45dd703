"""One state, however the events come: in bulk, one by one, or resumed from JSON."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivo_core.encoding import EncoderState, EncodingError, Event, encoder, fit_encoder
from aivo_core.samples import Samples, concatenate
from tests.core.encoding_histories import make_histories

FITTED = fit_encoder(make_histories(21, learners=10, events=40)).encoder
OTHER = fit_encoder(make_histories(22, learners=10, events=40)).encoder

EVENTS = st.builds(
    Event,
    category=st.sampled_from(["c0", "c1", "c2", "c5", "unseen", ""]),
    item=st.sampled_from(["c0-i0", "c0-i1", "c1-i0", "c2-i2", "unseen", ""]),
    subject=st.sampled_from(["s0", "s1", "unseen", ""]),
    score=st.floats(0, 1),
    seconds=st.none() | st.floats(-1e9, 1e10),
    response_ms=st.none() | st.floats(0, 1e12),
    attempts=st.none() | st.floats(0, 1e6),
)


def assert_same_samples(one: Samples, two: Samples) -> None:
    assert one.events == two.events
    for name in ("first", "second", "content", "path", "level", "score", "position", "content_prior"):
        left, right = getattr(one, name), getattr(two, name)
        assert left.dtype == right.dtype, name
        assert left.shape == right.shape, name
        assert left.tobytes() == right.tobytes(), name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(EVENTS, min_size=1, max_size=30), st.data())
def test_streaming_equals_batch_equals_resuming_bit_for_bit(events: list[Event], data: st.DataObject) -> None:
    whole, final = FITTED.encode(events)
    parts, state = [], None
    for event in events:
        part, state = FITTED.encode([event], state)
        parts.append(part)
    assert state is not None
    assert state == final
    streamed = concatenate(parts)
    assert_same_samples(whole, Samples(**{**vars(streamed), "events": len(events)}))

    cut = data.draw(st.integers(0, len(events)))
    early, middle = FITTED.encode(events[:cut])
    resumed = EncoderState.from_json(json.loads(json.dumps(middle.to_json())))
    assert resumed == middle
    late, end = FITTED.encode(events[cut:], resumed)
    assert end == final
    joined = concatenate([early, late])
    assert_same_samples(whole, Samples(**{**vars(joined), "events": len(events)}))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(EVENTS, min_size=2, max_size=20))
def test_a_prediction_is_the_row_that_the_next_event_gets(events: list[Event]) -> None:
    samples, _ = FITTED.encode(events)
    _, state = FITTED.encode(events[:-1])
    prediction = FITTED.prediction(state)
    assert prediction.first.tobytes() == samples.first[-1].tobytes()
    assert prediction.content_prior.tobytes() == samples.content_prior[-1].tobytes()
    second = FITTED.second_pass(prediction, state, FITTED.slot(events[-1].category))
    assert second.tobytes() == samples.second[-1].tobytes()
    assert FITTED.second_pass(prediction.first, state, int(samples.content[-1])).tobytes() == second.tobytes()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(EVENTS, min_size=2, max_size=20))
def test_rows_are_finite_and_bounded_whatever_happens(events: list[Event]) -> None:
    samples, _ = FITTED.encode(events)
    assert len(samples) == len(events) - 1
    assert samples.position.tolist() == list(range(1, len(events)))
    for rows in (samples.first, samples.second):
        assert rows.dtype == np.float32
        assert np.all(np.isfinite(rows))
        assert np.abs(rows[:, 192:]).max() <= 5.0
    assert samples.first[:, :192].min() >= 0.0
    assert samples.first[:, :128].max() <= 1.4 + 1e-6
    assert np.all((samples.path >= 0) & (samples.path < 24))
    assert np.all((samples.level >= 0.5) & (samples.level <= 9.5))


def test_chunks_of_a_long_history_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    events = make_histories(23, learners=1, events=90)[0][1]
    whole, end = FITTED.encode(events)
    monkeypatch.setattr(encoder, "CHUNK", 7)
    chunked, same_end = FITTED.encode(events)
    assert_same_samples(whole, chunked)
    assert end == same_end


def test_encoding_leaves_the_given_state_as_it_was() -> None:
    events = make_histories(24, learners=1)[0][1]
    _, state = FITTED.encode(events[:10])
    before = copy.deepcopy(state)
    FITTED.encode(events[10:], state)
    FITTED.prediction(state)
    assert state == before


def test_no_event_gives_no_sample_and_no_prediction() -> None:
    samples, state = FITTED.encode([])
    assert len(samples) == 0
    assert samples.first.shape == (0, 256)
    with pytest.raises(EncodingError) as error:
        FITTED.prediction(state)
    assert error.value.code == "no_events"
    assert FITTED.base_rates.sum() == pytest.approx(1.0)
    assert FITTED.success_by_level.shape == (9,)


def test_a_state_of_another_encoder_is_refused() -> None:
    events = make_histories(25, learners=1)[0][1]
    _, state = FITTED.encode(events)
    for act in (lambda: OTHER.encode(events, state), lambda: OTHER.prediction(state)):
        with pytest.raises(EncodingError, match="replay") as error:
            act()
        assert error.value.code == "different_encoder"


def test_unseen_names_never_fail_and_stand_at_the_mean() -> None:
    assert FITTED.slot("never seen") == 127
    assert FITTED.category(127) is None
    assert FITTED.level("never seen", "never seen") == FITTED.level("", "also never seen")
    samples, _ = FITTED.encode([Event("x", "y", "z", 0.5), Event("x", "y", "z", 0.5), Event("v", "", "", 1.0)])
    assert samples.content.tolist() == [127, 127]


@pytest.mark.parametrize("score", [1.2, -0.1, float("nan"), float("inf"), None, "1"])
def test_scores_outside_the_range_are_refused_by_name(score: Any) -> None:
    with pytest.raises(EncodingError, match="event 1: score") as error:
        FITTED.encode([Event("c0", "", "", 1.0), Event("c0", "", "", score)])
    assert error.value.code == "bad_event"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seconds", float("nan")),
        ("response_ms", -1.0),
        ("response_ms", float("inf")),
        ("attempts", float("nan")),
        ("attempts", "3"),
    ],
)
def test_other_fields_that_are_no_numbers_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(EncodingError, match=field) as error:
        FITTED.encode([Event("c0", "", "", 1.0, **{field: value})])
    assert error.value.code == "bad_event"


@pytest.mark.parametrize("slot", [-1, 128])
def test_a_slot_outside_the_range_is_refused(slot: int) -> None:
    _, state = FITTED.encode([Event("c0", "", "", 1.0)])
    with pytest.raises(EncodingError, match=r"0\.\.127"):
        FITTED.second_pass(FITTED.prediction(state), state, slot)


DAMAGES: dict[str, Any] = {
    "missing field": lambda data: data.pop("run"),
    "unknown field": lambda data: data.update(extra=1),
    "other format": lambda data: data.update(format=99),
    "short window": lambda data: data["recent_scores"].pop(),
    "not finite": lambda data: data.update(overall_ability=float("nan")),
    "events against counts": lambda data: data.update(events=3),
    "slot out of range": lambda data: data["categories"].update({"128": [1, 0, 0.5, 0.0]}),
    "text for a number": lambda data: data.update(streak="many"),
    "no snapshot": lambda data: data.update(snapshot=[]),
    "list for a mapping": lambda data: data.update(categories=[1]),
    "category after the end": lambda data: next(iter(data["categories"].values())).__setitem__(1, 10_000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused(damage: str) -> None:
    _, state = FITTED.encode(make_histories(26, learners=1)[0][1])
    data = json.loads(json.dumps(state.to_json()))
    DAMAGES[damage](data)
    with pytest.raises(EncodingError) as error:
        EncoderState.from_json(data)
    assert error.value.code == "bad_state"


def test_a_state_stays_small() -> None:
    _, state = FITTED.encode(make_histories(27, learners=1, events=600)[0][1])
    assert len(json.dumps(state.to_json())) < 10_000
