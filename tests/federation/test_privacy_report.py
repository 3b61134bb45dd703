"""privacy_report and privacy_period, and what an epsilon is said to mean."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from federation import ledger, privacy_periods, privacy_reporting
from federation.models import PrivacyPeriod
from federation.privacy.accountant import epsilon
from federation.privacy.composition import compose
from federation.privacy.release import Release
from federation.privacy.self_test import Check, SelfTest
from federation.privacy.statements import UNNOISED, statement_of
from tests.federation.rounds_world import make_world, person, set_policy
from tests.federation.test_ledger import alter, begin, charge
from tests.learners.test_commands import run, run_json

pytestmark = pytest.mark.django_db


def test_an_installation_without_privacy_says_so() -> None:
    result = run_json("privacy_report")
    names = ("epsilon_federation", "epsilon_learner_max", "delta", "forecast", "self_test", "verified")
    assert result["entries"] == 0 and all(result[name] is None for name in names)
    assert len(result["unnoised"]) == len(UNNOISED) >= 7
    assert "no round is differentially private" in run("privacy_report")


def test_the_report_says_what_was_spent_for_whom_and_how_long_the_budget_lasts() -> None:
    set_policy(differential_privacy=True, clip_norm=0.5, noise_multiplier=1.0, sampling="poisson")
    period = begin(rate=Fraction(1, 10), epsilon_cap=4.0)
    person("early")
    for _ in range(3):
        charge(period)

    result = run_json("privacy_report", "--verify", "--forecast")

    spent = epsilon(z=1.0, q_num=1, q_den=10, steps=3, delta=period.delta, sampling="poisson").epsilon
    assert result["entries"] == 3 and result["verified"] is True and result["delta"] == period.delta
    assert result["epsilon_federation"] == result["epsilon_learner_max"] == pytest.approx(spent)
    assert 0 < result["epsilon_pld"] < spent < result["epsilon_seeing_cohort"]
    assert [entry["epsilon_total"] for entry in result["history"]][-1] == pytest.approx(spent)
    rounds = result["forecast"]["rounds"]
    after = [
        epsilon(z=1.0, q_num=1, q_den=10, steps=3 + n, delta=period.delta, sampling="poisson").epsilon
        for n in (rounds, rounds + 1)
    ]
    assert after[0] <= 4.0 < after[1]
    public, seeing = result["statements"]
    assert "do not know who took part" in public["against"] and "whether or not they know" in seeing["against"]
    assert seeing["epsilon"] == result["epsilon_seeing_cohort"]
    text = run("privacy_report", "--verify", "--forecast")
    assert f"lasts {rounds} more rounds" in text and "verifies" in text and public["text"] in text and UNNOISED[0].what in text


def test_an_altered_entry_makes_the_command_fail_and_is_named() -> None:
    period = begin()
    charge(period)
    alter(1, "noise_multiplier", 50.0)
    result = run_json("privacy_report", "--verify", code=1)
    assert result["verified"] is False and "entry 1" in result["verification"]["problems"][0]["message"]


def test_a_failed_self_test_makes_the_command_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = Check("noise_spread", "spread", 1.0, 0.9, 1.1), Check("noise_once", "draws", 2.0, 1.0, 1.0)
    monkeypatch.setattr(privacy_reporting, "self_test", lambda: SelfTest((good,)))
    assert run_json("privacy_report", "--self-test")["self_test"]["failed"] == 0
    monkeypatch.setattr(privacy_reporting, "self_test", lambda: SelfTest((good, bad)))
    result = run_json("privacy_report", "--self-test", code=1)
    assert result["self_test"]["failed"] == 1 and len(result["self_test"]["checks"]) == 2


def test_calibration_gives_the_least_noise_for_each_target() -> None:
    begin(population=500, rate=Fraction(1, 5), planned_rounds=20)
    for arguments, rate, rounds, delta in (
        ((), Fraction(1, 5), 20, None),
        (("--rounds", "5", "--rate", "1", "--population", "100"), Fraction(1), 5, 1e-5),
    ):
        found = run_json("privacy_report", "--calibrate", "1", "8", *arguments)["calibration"]
        for entry, target in zip(found, (1.0, 8.0), strict=True):
            limit = PrivacyPeriod.objects.get().delta if delta is None else delta
            settings: dict[str, Any] = {
                "q_num": rate.numerator, "q_den": rate.denominator, "steps": rounds, "delta": limit,
                "sampling": "none" if rate == 1 else "poisson",
            }  # fmt: skip
            z = entry["noise_multiplier"]
            assert epsilon(z=z, **settings).epsilon <= target < epsilon(z=z - 1e-4, **settings).epsilon


def test_a_period_is_begun_and_ended_by_command() -> None:
    make_world(learners=3, evaluators=0)
    begun = run_json(
        "privacy_period", "begin", "--population", "40", "--rate", "0.25", "--epsilon-cap", "8", "--reason", "a school year"
    )
    assert (begun["period"], begun["rate"], begun["expected_cohort"], begun["ended_at"]) == (1, "1/4", 10.0, None)
    period = PrivacyPeriod.objects.get()
    assert (period.q_num, period.q_den, period.epsilon_cap, period.meaning) == (1, 4, 8.0, "a school year")
    assert run_json("privacy_period", "end", "--reason", "it is over")["ended_at"]
    assert privacy_periods.current_period() is None


def test_a_statement_has_every_part_and_never_promises_more() -> None:
    composed = compose([Release(z=1.0, steps=3)], 1e-5)
    told = statement_of(composed, population=1000)
    assert told.epsilon == composed.epsilon and f"{composed.epsilon:.4g}" in told.text and "3 releases" in told.text
    assert "learner" in told.unit and "add or remove one" in told.adjacency and told.sampling == "everyone takes part"
    assert "1/N = 0.001" in told.delta and "RDP" in told.accountant and "dp-accounting" in told.accountant
    assert "not hold against whoever can read this server" in told.text
    sample = statement_of(compose([Release(z=1.0, q_num=1, q_den=9, sampling="poisson", unit="training_sample")], 1e-5))
    assert "training sample" in sample.unit and "neither an interaction nor a learner" in sample.unit
    replaced = statement_of(compose([Release(z=1.0, adjacency="replace_one")], 1e-5))
    assert "replace one" in replaced.adjacency and "stood in their place" in replaced.text
    assert statement_of(compose([], 1e-5)).sampling == "nothing was released"
    fallback = compose([Release(z=1.0, q_num=1, q_den=9, sampling="fixed_size", adjacency="replace_one")], 1e-5, "pld")
    assert "PLD was asked for" in statement_of(fallback).accountant
    assert ledger.CENTRAL.unit == "learner"


def test_the_status_of_the_federation_says_what_the_open_period_has_spent() -> None:
    assert run_json("federation_status")["privacy"] is None
    period = begin(epsilon_cap=8.0)
    row = charge(period)
    found = run_json("federation_status")["privacy"]
    assert (found["period"], found["entries"], found["epsilon_cap"], found["delta"]) == (1, 1, 8.0, period.delta)
    assert found["epsilon"] == row.epsilon_total


def test_there_is_a_forecast_only_of_a_policy_that_goes_with_the_period() -> None:
    begin(epsilon_cap=4.0)
    assert run_json("privacy_report")["forecast"] is None
    set_policy(differential_privacy=True, clip_norm=0.5, noise_multiplier=9.0, sampling="poisson")
    found = run_json("privacy_report", "--forecast")["forecast"]
    assert found["rounds"] is None and "sampling must be none" in found["text"]
    set_policy(sampling="none")
    assert run_json("privacy_report")["forecast"]["rounds"] > 1


def test_where_the_tighter_accountant_cannot_answer_the_report_says_so() -> None:
    period = begin()
    charge(period, 1e-3)
    result = run_json("privacy_report")
    assert result["epsilon_pld"] is None and "rdp" in result["epsilon_pld_fallback"]
    assert privacy_reporting.privacy_report(with_pld=False)["epsilon_pld_fallback"] is None
