"""What serves a learner: decided on held-out samples, measured on later ones, never the other way round."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivo_core.network import FloatArray
from aivo_core.samples import Samples
from federation.serving_decision import (
    BLENDS,
    LaterPart,
    ServedEvaluation,
    choose_blend,
    evaluate_served,
    kept_evaluation,
    split_for_choice,
)
from models_store.evaluation import EvaluationError, learner_losses
from models_store.forecasting import forecast
from models_store.models import ServingChoice
from models_store.version_files import LoadedVersion
from tests.models_store.factories import SMALL, small_fit
from tests.synthetic_samples import make_samples, make_weights

WEIGHTS = make_weights(SMALL, 3)
BASE = LoadedVersion(
    version="aivo-main-v1",
    spec=SMALL,
    weights=WEIGHTS,
    tail=SMALL.flatten_tail(WEIGHTS),
    encoder=small_fit().encoder,
    content_mix=0.1,
    manifest={"files": {"weights.safetensors": {"sha256": "serving decision"}}},
)


def samples(n: int, seed: int = 0) -> Samples:
    return make_samples(SMALL, n, seed)


def biased(change: float, classes: int = 8) -> FloatArray:
    """Main with the bias of the first content classes moved; every label of ``samples`` is among the first eight."""
    moved = SMALL.unflatten_tail(BASE.tail.copy())
    moved["content_output/bias"][:classes] += np.float32(change)
    return SMALL.flatten_tail(moved)


BETTER, WORSE, TOO_FAR = biased(2.0), biased(-2.0), biased(14.0, classes=1)


def loss(some_tail: FloatArray, some: Samples) -> float:
    return learner_losses("k", forecast(BASE, some_tail, some), some, BASE.content_mix).total


@given(st.integers(min_value=0, max_value=300))
@settings(max_examples=60, deadline=None)
def test_the_latest_fifth_chooses_and_the_rest_trains(n: int) -> None:
    whole = samples(n) if n else samples(1).take(slice(0, 0))
    fit, held_out = split_for_choice(whole)
    assert len(held_out) == -(-n // 5)
    assert np.array_equal(np.concatenate([fit.position, held_out.position]), whole.position)


def test_a_tail_that_is_worse_on_the_held_out_samples_is_not_served() -> None:
    choice = choose_blend(BASE, key="k", tail=WORSE, held_out=samples(40))
    assert (choice.blend, choice.serving_choice) == (0.0, ServingChoice.MAIN)


def test_a_tail_that_is_better_is_served_whole() -> None:
    choice = choose_blend(BASE, key="k", tail=BETTER, held_out=samples(40))
    assert (choice.blend, choice.serving_choice) == (1.0, ServingChoice.PERSONAL)


def test_a_tail_that_goes_too_far_is_blended() -> None:
    choice = choose_blend(BASE, key="k", tail=TOO_FAR, held_out=samples(40))
    assert choice.blend in BLENDS[1:-1]
    assert choice.serving_choice == ServingChoice.BLEND


def test_the_chosen_blend_has_the_least_total_loss_of_all() -> None:
    held_out = samples(40)
    choice = choose_blend(BASE, key="k", tail=TOO_FAR, held_out=held_out)
    by_hand = {value: loss((BASE.tail + value * (TOO_FAR - BASE.tail)).astype(np.float32), held_out) for value in BLENDS}
    assert {value: entry.total for value, entry in choice.losses.items()} == pytest.approx(by_hand, rel=1e-5)
    assert choice.losses[choice.blend].total == min(entry.total for entry in choice.losses.values())


def test_of_equal_losses_main_is_taken() -> None:
    assert choose_blend(BASE, key="k", tail=BASE.tail, held_out=samples(20)).blend == 0.0


@pytest.mark.parametrize("own", [None, BETTER])
def test_where_nothing_can_choose_main_serves(own: FloatArray | None) -> None:
    held_out = samples(20).take(slice(0, 0)) if own is not None else samples(20)
    choice = choose_blend(BASE, key="k", tail=own, held_out=held_out)
    assert (choice.blend, choice.samples, choice.own, choice.main) == (0.0, 0, None, None)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    broken = BASE.tail.copy()
    broken[:] = np.inf
    with np.errstate(all="ignore"), pytest.raises(EvaluationError):
        choose_blend(BASE, key="k", tail=broken, held_out=samples(20))


def test_main_served_and_own_are_measured_apart() -> None:
    later = samples(30, seed=5)
    evaluation = evaluate_served(LaterPart.of(BASE, "k", later), tail=BETTER, served=biased(0.5))
    assert evaluation is not None
    assert evaluation.main.total == pytest.approx(loss(BASE.tail, later))
    assert evaluation.served.total == pytest.approx(loss(biased(0.5), later))
    assert evaluation.personal.total == pytest.approx(loss(BETTER, later))
    assert evaluation.improvement == pytest.approx(1.0 - evaluation.served.total / evaluation.main.total)
    assert evaluation.improvement > 0.0


def test_without_later_samples_nothing_is_measured() -> None:
    empty = samples(3).take(slice(0, 0))
    assert evaluate_served(LaterPart.of(BASE, "k", empty), tail=BETTER, served=biased(0.5)) is None


def test_an_evaluation_comes_back_from_the_evidence_as_it_was() -> None:
    evaluation = evaluate_served(LaterPart.of(BASE, "k", samples(30)), tail=BETTER, served=biased(0.5))
    assert evaluation is not None
    kept = json.loads(json.dumps({"evaluation": evaluation.to_json()}))
    assert kept_evaluation("k", kept) == evaluation
    assert kept_evaluation("k", {}) is None
    assert kept_evaluation("k", {"evaluation": None}) is None


def test_evidence_that_cannot_be_read_is_refused_and_not_guessed() -> None:
    with pytest.raises(EvaluationError) as caught:
        kept_evaluation("k", {"evaluation": {"main": {"total": 1.0}}})
    assert caught.value.code == "bad_evidence"


def test_the_evidence_keeps_no_learner() -> None:
    evaluation = evaluate_served(LaterPart.of(BASE, "a-learner", samples(30)), tail=BETTER, served=biased(0.5))
    assert evaluation is not None
    assert "a-learner" not in json.dumps(evaluation.to_json())
    assert isinstance(evaluation, ServedEvaluation)
