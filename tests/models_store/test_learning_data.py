"""Samples of learners: through the version's encoder, and gathered into one block."""

from __future__ import annotations

import numpy as np
import pytest

from aivo_core.samples import Samples, concatenate
from learners.models import Learner
from models_store import forecasting, store
from models_store.learning_data import gather, learner_samples
from tests.models_store.factories import SMALL, add_events, events_of, make_learner, make_version, random_tail, small_fit
from tests.synthetic_samples import make_samples


def equal(a: Samples, b: Samples) -> bool:
    names = ("first", "second", "content", "path", "level", "score", "position", "content_prior")
    return a.events == b.events and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


def test_gathering_gives_what_concatenation_gives() -> None:
    parts = [make_samples(SMALL, n, n) for n in (3, 1, 7)]
    assert equal(gather(iter(parts), 11), concatenate(parts))


@pytest.mark.parametrize("count", [10, 12])
def test_gathering_another_number_than_said_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="samples"):
        gather(iter([make_samples(SMALL, n, n) for n in (3, 8)]), count)
    with pytest.raises(ValueError, match="0 samples"):
        gather(iter([]), 1)


@pytest.mark.django_db(transaction=True)
def test_each_learner_comes_with_all_own_samples_and_one_without_events_with_none() -> None:
    loaded = store.load_version(make_version())
    for index, learner_id in enumerate(("a", "b")):
        add_events(make_learner(learner_id), events_of(index, 10))
    make_learner("c")
    found = {learner.learner_id: samples for learner, samples in learner_samples(learners=Learner.objects.all(), loaded=loaded)}
    assert {key: len(samples) for key, samples in found.items()} == {"a": 9, "b": 9, "c": 0}


@pytest.mark.django_db(transaction=True)
def test_forecasts_do_not_depend_on_batches_nor_on_keeping_the_trunks_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = store.load_version(make_version())
    samples, _ = small_fit().encoder.encode(events_of(60, 40))
    tail = random_tail(SMALL, 3)
    whole = forecasting.forecast(loaded, tail, samples)
    monkeypatch.setattr(forecasting, "BATCH_SAMPLES", 7)
    kept = forecasting.forecast_tail(loaded, tail, forecasting.trunk_activations(loaded, samples))
    for name in ("content", "path", "difficulty_first", "difficulty_second"):
        np.testing.assert_allclose(getattr(forecasting.forecast(loaded, tail, samples), name), getattr(whole, name), atol=1e-6)
        np.testing.assert_allclose(getattr(kept, name), getattr(whole, name), atol=1e-6)


@pytest.mark.django_db(transaction=True)
def test_a_forecast_of_no_samples_has_no_rows() -> None:
    loaded = store.load_version(make_version())
    samples, _ = small_fit().encoder.encode(events_of(60, 1))
    assert len(forecasting.forecast(loaded, loaded.tail, samples)) == 0
