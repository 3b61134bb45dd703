"""The smallest noise for a target and the rounds that a budget lasts: reference values, proofs on both sides, refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from federation.privacy.calibration import MAX_ROUNDS, rounds_left, smallest_noise
from federation.privacy.composition import compose
from federation.privacy.release import AccountantError, Release
from tests.federation.privacy_vectors import ledger, release
from tests.shared import needs_vectors

few = settings(derandomize=True, max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TENTH = Release(z=1.0, q_num=1, q_den=10, sampling="poisson")
QUESTION: dict[str, Any] = {"epsilon": 8.0, "delta": 1e-5, "q_num": 1, "q_den": 10, "steps": 50, "sampling": "poisson"}


def refused(code: str) -> Any:
    return pytest.raises(AccountantError, check=lambda error: error.code == code)


def question(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "epsilon": case["target_epsilon"],
        "delta": case["delta"],
        "q_num": case["q_num"],
        "q_den": case["q_den"],
        "steps": case["T"],
        "sampling": "none" if case["q_num"] == case["q_den"] else "poisson",
    }


@needs_vectors
def test_the_smallest_noise_reproduces_the_reference_values() -> None:
    cases = ledger()["calibration"]
    assert len(cases) == 10
    for case in cases:
        found = smallest_noise(**question(case))
        low, high = case["exact_z_smallest_on_1e_4_grid"] - 1e-4, case["z_smallest_on_1e_4_grid"] + 1e-4
        assert low * (1 - 1e-12) <= found.z <= high * (1 + 1e-12), case["id"]
        assert found.composed.epsilon <= case["target_epsilon"] < found.epsilon_one_step_below, case["id"]


@needs_vectors
@pytest.mark.parametrize(
    "name", ["K10", "K3", "K7", *(pytest.param(f"K{case}", marks=pytest.mark.slow) for case in (1, 2, 4, 5, 6, 9))]
)
def test_the_smallest_noise_by_pld_reproduces_the_reference_values(name: str) -> None:
    case = next(case for case in ledger()["calibration"] if case["id"] == name)
    found = smallest_noise(**question(case), accountant="pld")
    assert found.z == pytest.approx(case["pld_z_smallest_on_1e_4_grid"], abs=1.0001e-4)
    assert found.composed.epsilon <= case["target_epsilon"] < found.epsilon_one_step_below
    assert found.composed.accountant == "pld"


@needs_vectors
def test_the_rounds_of_a_budget_reproduce_the_reference_values() -> None:
    cases = ledger()["max_steps"]
    assert len(cases) == 6
    for case in cases:
        found = rounds_left([], release(case), case["budget_epsilon"], case["delta"])
        assert case["max_steps"] <= found.rounds <= case["exact_max_steps"], case["id"]
        assert found.epsilon_then <= case["budget_epsilon"] < found.epsilon_one_more, case["id"]
        if found.rounds == case["max_steps"]:
            assert found.epsilon_then == pytest.approx(case["epsilon_at_max_steps"], rel=1e-6, abs=1e-12), case["id"]


@few
@given(
    target=st.floats(0.3, 20.0),
    percent=st.integers(1, 100),
    steps=st.integers(1, 200),
    delta=st.sampled_from([1e-3, 1e-6]),
)
def test_the_answer_meets_the_target_and_one_step_less_does_not(target: float, percent: int, steps: int, delta: float) -> None:
    kind = Release(z=1.0, q_num=percent, q_den=100, steps=steps, sampling="poisson")
    found = smallest_noise(epsilon=target, delta=delta, q_num=percent, q_den=100, steps=steps, sampling="poisson")
    assert found.z == round(found.z * 10_000) / 10_000
    assert compose([replace(kind, z=found.z)], delta).epsilon == found.composed.epsilon <= target
    assert compose([replace(kind, z=found.z - 1e-4)], delta).epsilon > target
    assert compose([replace(kind, z=found.z - 1e-4)], delta).epsilon == pytest.approx(found.epsilon_one_step_below, rel=1e-9)


@few
@given(past=st.integers(0, 60), cap=st.floats(1.0, 12.0), percent=st.integers(1, 30))
def test_the_forecast_is_what_composition_says(past: int, cap: float, percent: int) -> None:
    history = [replace(TENTH, steps=past), Release(z=9.0)]
    following = Release(z=1.3, q_num=percent, q_den=100, steps=2, sampling="poisson")
    found = rounds_left(history, following, cap, 1e-5)
    assert found.epsilon_now == compose(history, 1e-5).epsilon

    def after(rounds: int) -> float:
        return compose([*history, replace(following, steps=2 * rounds)], 1e-5).epsilon

    assert found.epsilon_then == pytest.approx(after(found.rounds), rel=1e-9)
    assert found.epsilon_one_more == pytest.approx(after(found.rounds + 1), rel=1e-9)
    assert found.epsilon_one_more > cap
    assert found.epsilon_then <= cap or (found.rounds == 0 and found.epsilon_now > cap)


def test_more_rounds_need_more_noise_and_a_past_leaves_less() -> None:
    fresh = smallest_noise(**QUESTION)
    assert smallest_noise(**{**QUESTION, "steps": 100}).z > fresh.z
    assert smallest_noise(**{**QUESTION, "epsilon": 4.0}).z > fresh.z
    later = smallest_noise(**QUESTION, past=[replace(TENTH, z=1.5, steps=30)])
    assert later.z > fresh.z
    assert later.composed.epsilon <= 8.0 < later.epsilon_one_step_below
    assert len(later.composed.releases) == 2


def test_calibration_under_replace_one_gives_twice_the_noise() -> None:
    everyone: dict[str, Any] = {"epsilon": 2.0, "delta": 1e-5, "q_num": 1, "q_den": 1, "steps": 10}
    once, twice = smallest_noise(**everyone), smallest_noise(**everyone, adjacency="replace_one")
    assert twice.z == pytest.approx(2 * once.z, abs=2e-4)


def test_fixed_size_cohorts_are_calibrated_under_their_own_adjacency() -> None:
    found = smallest_noise(**{**QUESTION, "steps": 5, "adjacency": "replace_one", "sampling": "fixed_size"})
    assert found.composed.epsilon <= 8.0 < found.epsilon_one_step_below
    assert found.z > smallest_noise(**{**QUESTION, "steps": 5}).z


def test_a_target_that_next_to_no_noise_meets_has_an_answer_too() -> None:
    found = smallest_noise(epsilon=1e6, delta=1e-3, q_num=1, q_den=1, steps=1)
    assert compose([Release(z=found.z)], 1e-3).epsilon <= 1e6 < found.epsilon_one_step_below


def test_a_forecast_beyond_all_need_is_cut_off() -> None:
    faint = Release(z=1e6, q_num=1, q_den=10**6, sampling="poisson")
    found = rounds_left([], faint, 1.0, 1e-5)
    assert found.rounds == MAX_ROUNDS
    assert found.epsilon_then <= 1.0


def test_a_budget_that_is_spent_lasts_no_round() -> None:
    found = rounds_left([Release(z=1.0, steps=50)], TENTH, 8.0, 1e-5)
    assert found.rounds == 0
    assert found.epsilon_then == found.epsilon_now > 8.0
    assert found.epsilon_one_more > found.epsilon_now


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"epsilon": 0.0}, "bad_input"),
        ({"epsilon": -1.0}, "bad_input"),
        ({"epsilon": math.nan}, "bad_input"),
        ({"epsilon": math.inf}, "bad_input"),
        ({"delta": 0.0}, "bad_input"),
        ({"delta": 1.0}, "bad_input"),
        ({"q_num": 0}, "bad_input"),
        ({"q_num": 11}, "bad_input"),
        ({"steps": 0}, "bad_input"),
        ({"accountant": "moments"}, "bad_input"),
        ({"sampling": "fixed_size"}, "unsupported"),
        ({"adjacency": "replace_one"}, "unsupported"),
        ({"past": [Release(z=0.5, steps=50)]}, "unreachable"),
        ({"past": [Release(z=5.0, unit="training_sample")]}, "unsupported"),
        ({"epsilon": 1e-9, "delta": 1e-12, "q_num": 10, "sampling": "none"}, "unreachable"),
    ],
)
def test_a_calibration_without_an_answer_is_refused(changes: dict[str, Any], code: str) -> None:
    with refused(code):
        smallest_noise(**{**QUESTION, **changes})


def test_pld_that_cannot_hold_the_answer_is_refused_rather_than_replaced() -> None:
    with refused("pld_infeasible"):
        smallest_noise(**{**QUESTION, "delta": 1e-30}, accountant="pld")


@pytest.mark.parametrize(
    ("past", "following", "cap", "delta", "code"),
    [
        ([], replace(TENTH, q_num=0), 8.0, 1e-5, "bad_input"),
        ([], replace(TENTH, steps=0), 8.0, 1e-5, "bad_input"),
        ([], TENTH, 0.0, 1e-5, "bad_input"),
        ([], TENTH, math.nan, 1e-5, "bad_input"),
        ([], TENTH, 8.0, 0.0, "bad_input"),
        ([Release(z=1.0, adjacency="replace_one")], TENTH, 8.0, 1e-5, "unsupported"),
        ([Release(z=1.0, unit="training_sample")], TENTH, 8.0, 1e-5, "unsupported"),
    ],
)
def test_a_forecast_without_an_answer_is_refused(
    past: list[Release], following: Release, cap: float, delta: float, code: str
) -> None:
    with refused(code):
        rounds_left(past, following, cap, delta)


def test_answers_are_plain_json() -> None:
    calibrated = json.loads(json.dumps(smallest_noise(**QUESTION).to_json()))
    assert calibrated["composed"]["releases"][0]["z"] == calibrated["z"]
    forecast = json.loads(json.dumps(rounds_left([], TENTH, 8.0, 1e-5).to_json()))
    assert forecast["rounds"] == 102
