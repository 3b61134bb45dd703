"""Privacy figures: the reference values, the directions they must move in, and no figure where there is none."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from federation.privacy.accountant import AccountantError, EpsilonResult, epsilon, sample_level_epsilon
from tests.shared import SHARED, needs_vectors

PLD_EVERY_RUN = ("T1", "T4", "T11", "A1", "F1", "M1-1", "M4-1", "L2", "G1", "D2", "P1", "P4")
"""Rows whose PLD value is recomputed in each run; the slow test recomputes them all."""

few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
multipliers = st.floats(0.5, 8.0)
rates = st.integers(1, 50)
step_counts = st.integers(1, 500)
deltas = st.sampled_from([1e-3, 1e-5, 1e-8])


def rows(name: str) -> list[dict[str, str]]:
    with (SHARED / "vectors" / name).open(newline="") as lines:
        return list(csv.DictReader(lines))


def setting(row: dict[str, str]) -> dict[str, Any]:
    q_num, q_den = int(row["q_num"]), int(row["q_den"])
    return {
        "z": float(row["z"]),
        "q_num": q_num,
        "q_den": q_den,
        "steps": int(row["T"]),
        "delta": float(row["delta"]),
        "sampling": "none" if q_num == q_den else "poisson",
    }


def refused(code: str) -> Any:
    return pytest.raises(AccountantError, check=lambda error: error.code == code)


# --- reference values -------------------------------------------------------------------------------------------------


@needs_vectors
def test_rdp_lies_between_the_exact_value_and_the_reference_librarys_bound() -> None:
    settings_seen = rows("privacy.csv")
    assert len(settings_seen) == 52
    for row in settings_seen:
        result = epsilon(**setting(row))
        assert float(row["exact_rdp_epsilon"]) * (1 - 1e-6) <= result.epsilon <= float(row["rdp_epsilon"]) * (1 + 1e-6), row["id"]
        assert result.order == pytest.approx(float(row["rdp_order"])), row["id"]


def check_pld(row: dict[str, str]) -> None:
    reference = float(row["pld_epsilon"])
    result = epsilon(**setting(row), accountant="pld")
    assert result.epsilon == pytest.approx(reference, rel=1e-3, abs=2e-4 if reference < 0.1 else 0.0), row["id"]
    assert result.order is None


@needs_vectors
def test_pld_reproduces_reference_values() -> None:
    chosen = [row for row in rows("privacy.csv") if row["id"] in PLD_EVERY_RUN]
    assert len(chosen) == len(PLD_EVERY_RUN)
    for row in chosen:
        check_pld(row)


@needs_vectors
@pytest.mark.slow
def test_pld_reproduces_all_reference_values() -> None:
    chosen = [row for row in rows("privacy.csv") if row["pld_epsilon"]]
    assert len(chosen) == 48
    for row in chosen:
        check_pld(row)


@needs_vectors
def test_fixed_size_cohorts_are_charged_with_twice_the_clipping_norm() -> None:
    by_id = {row["id"]: row for row in rows("privacy_other.csv")}
    for case in range(1, 11):
        row = by_id[f"C{case}-WOR-2C"]
        given_values = json.loads(row["params_json"])
        result = epsilon(
            z=given_values["z"],
            q_num=given_values["cohort"],
            q_den=given_values["population"],
            steps=given_values["T"],
            delta=float(row["delta"]),
            adjacency="replace_one",
            sampling="fixed_size",
        )
        assert result.epsilon == pytest.approx(float(row["value"]), rel=1e-3), row["id"]
        assert result.epsilon > 2.0 * float(by_id[f"C{case}-WOR"]["value"])
        assert result.epsilon > 2.0 * float(by_id[f"C{case}-POI-RDP"]["value"])


@needs_vectors
def test_poisson_cohorts_of_the_same_rate_reproduce_their_rows() -> None:
    chosen = [row for row in rows("privacy_other.csv") if "-POI-" in row["id"]]
    assert len(chosen) == 20
    for row in chosen:
        given_values = json.loads(row["params_json"])
        accountant = "rdp" if row["accountant"] == "RDP" else "pld"
        if accountant == "pld" and row["id"] not in ("C6-POI-PLD", "C7-POI-PLD", "C8-POI-PLD"):
            continue
        result = epsilon(
            z=given_values["z"],
            q_num=given_values["cohort"],
            q_den=given_values["population"],
            steps=given_values["T"],
            delta=float(row["delta"]),
            accountant=accountant,
            sampling="poisson",
        )
        assert result.epsilon == pytest.approx(float(row["value"]), rel=1e-3), row["id"]


@needs_vectors
@pytest.mark.parametrize(
    ("name", "accountant", "adjacency", "sampling"),
    [
        pytest.param("R1-PLD-REPLACE", "pld", "replace_one", "none", marks=pytest.mark.slow),
        pytest.param("R1-PLD-ADD", "pld", "add_or_remove_one", "none", marks=pytest.mark.slow),
        ("R1-RDP-REPLACE-2C", "rdp", "replace_one", "none"),
        ("R2-PLD-REPLACE", "pld", "replace_one", "poisson"),
        ("R2-PLD-ADD", "pld", "add_or_remove_one", "poisson"),
        ("R3-PLD-REPLACE", "pld", "replace_one", "none"),
        ("R3-PLD-ADD", "pld", "add_or_remove_one", "none"),
        ("R3-RDP-REPLACE-2C", "rdp", "replace_one", "none"),
    ],
)
def test_replace_one_means_the_same_to_both_accountants(name: str, accountant: Any, adjacency: Any, sampling: Any) -> None:
    row = next(row for row in rows("privacy_other.csv") if row["id"] == name)
    given_values = json.loads(row["params_json"])
    result = epsilon(
        z=given_values["z"],
        q_num=given_values["q_num"],
        q_den=given_values["q_den"],
        steps=given_values["T"],
        delta=float(row["delta"]),
        accountant=accountant,
        adjacency=adjacency,
        sampling=sampling,
    )
    assert result.epsilon == pytest.approx(float(row["value"]), rel=1e-3), name


@needs_vectors
def test_a_single_gaussian_release_reproduces_its_zcdp_row() -> None:
    row = next(row for row in rows("privacy_other.csv") if row["id"] == "B-ZCDP-PLD")
    result = epsilon(
        z=json.loads(row["params_json"])["z"], q_num=1, q_den=1, steps=1, delta=float(row["delta"]), accountant="pld"
    )
    assert result.epsilon == pytest.approx(float(row["value"]), rel=1e-3)


def test_the_figures_of_a_school_are_the_known_ones() -> None:
    everyone = epsilon(z=1.0, q_num=1, q_den=1, steps=50, delta=1e-5)
    assert everyone.epsilon == pytest.approx(57.30, abs=0.01)
    some = epsilon(z=1.1, q_num=20, q_den=200, steps=40, delta=200**-1.1, sampling="poisson")
    assert some.epsilon == pytest.approx(2.62, abs=0.01)
    local = epsilon(z=1.0, q_num=1, q_den=1, steps=50, delta=1e-5, adjacency="replace_one")
    assert local.epsilon == pytest.approx(166.04, abs=0.01)


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_nothing_released_costs_nothing(accountant: Any) -> None:
    assert epsilon(z=1.0, q_num=0, q_den=1, steps=10, delta=1e-5, accountant=accountant, sampling="poisson").epsilon == 0.0
    assert epsilon(z=1.0, q_num=1, q_den=10, steps=0, delta=1e-5, accountant=accountant, sampling="poisson").epsilon == 0.0
    assert epsilon(z=1.0, q_num=1, q_den=1, steps=0, delta=1e-5, accountant=accountant).epsilon == 0.0


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
@pytest.mark.parametrize(("q_num", "steps"), [(1, 1), (1, 10), (10, 1), (0, 10), (1, 0)])
def test_no_noise_has_no_figure(accountant: Any, q_num: int, steps: int) -> None:
    with refused("no_noise"):
        epsilon(z=0.0, q_num=q_num, q_den=10, steps=steps, delta=1e-5, accountant=accountant, sampling="poisson")


GOOD: dict[str, Any] = {"z": 1.0, "q_num": 1, "q_den": 10, "steps": 5, "delta": 1e-5, "sampling": "poisson"}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"z": -1.0}, "z"),
        ({"z": float("nan")}, "z"),
        ({"z": float("inf")}, "z"),
        ({"z": "1"}, "z"),
        ({"z": True}, "z"),
        ({"q_num": -1}, "q_num"),
        ({"q_num": 11}, "q_num"),
        ({"q_num": 0.5}, "q_num"),
        ({"q_den": 0}, "q_den"),
        ({"q_den": 10.0}, "q_den"),
        ({"steps": -1}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"steps": True}, "steps"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"delta": -1e-5}, "delta"),
        ({"delta": float("nan")}, "delta"),
        ({"accountant": "moments"}, "accountant"),
        ({"adjacency": "neighbours"}, "adjacency"),
        ({"sampling": "shuffle"}, "sampling"),
        ({"sampling": "none"}, "sampling none means q = 1"),
    ],
)
def test_bad_input_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(AccountantError, match=field) as error:
        epsilon(**{**GOOD, **changes})
    assert error.value.code == "bad_input"


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": "fixed_size"},
        {"sampling": "fixed_size", "adjacency": "replace_one", "accountant": "pld"},
        {"adjacency": "replace_one"},
    ],
)
def test_a_combination_without_an_accountant_is_refused(changes: dict[str, Any]) -> None:
    with refused("unsupported"):
        epsilon(**{**GOOD, **changes})


def test_pld_refuses_what_it_cannot_hold_and_rdp_answers_it() -> None:
    large = {"z": 1.0, "q_num": 1, "q_den": 1, "steps": 10**6, "delta": 1e-6}
    with refused("pld_infeasible"):
        epsilon(**large, accountant="pld")  # type: ignore[arg-type]
    assert math.isfinite(epsilon(**large).epsilon)  # type: ignore[arg-type]


def test_a_rate_of_one_is_everyone_whatever_the_sampling_is_called() -> None:
    everyone = epsilon(z=2.0, q_num=1, q_den=1, steps=10, delta=1e-5)
    called_poisson = epsilon(z=2.0, q_num=7, q_den=7, steps=10, delta=1e-5, sampling="poisson")
    assert called_poisson.sampling == everyone.sampling == "none"
    assert called_poisson.epsilon == everyone.epsilon
    replaced = epsilon(z=2.0, q_num=1, q_den=1, steps=10, delta=1e-5, adjacency="replace_one")
    called_fixed = epsilon(z=2.0, q_num=7, q_den=7, steps=10, delta=1e-5, adjacency="replace_one", sampling="fixed_size")
    assert called_fixed.epsilon == replaced.epsilon > everyone.epsilon


def test_a_result_carries_all_that_recomputes_it() -> None:
    result = epsilon(**GOOD)
    stored = json.loads(json.dumps(result.to_json()))
    assert EpsilonResult(**stored) == result
    assert stored["accountant_version"].startswith("dp-accounting ")
    assert stored["conversion"]
    again = epsilon(**{name: stored[name] for name in (*GOOD, "accountant", "adjacency")})
    assert again == result


def test_importing_the_accountant_loads_no_accounting_library() -> None:
    code = "import sys, federation.privacy.accountant; sys.exit('dp_accounting' in sys.modules or 'django' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- directions -------------------------------------------------------------------------------------------------------


def value(z: float, percent: int, steps: int, delta: float, accountant: Any = "rdp") -> float:
    return epsilon(z=z, q_num=percent, q_den=100, steps=steps, delta=delta, accountant=accountant, sampling="poisson").epsilon


@few
@given(z=multipliers, percent=rates, steps=step_counts, delta=deltas)
def test_less_noise_a_higher_rate_more_steps_and_a_smaller_delta_cost_more(
    z: float, percent: int, steps: int, delta: float
) -> None:
    cost = value(z, percent, steps, delta)
    assert cost > 0.0
    assert value(z * 0.8, percent, steps, delta) > cost
    assert value(z, percent + 50, steps, delta) > cost
    assert value(z, percent, steps * 2, delta) > cost
    assert value(z, percent, steps, delta / 10) > cost


@settings(few, max_examples=4)
@given(z=st.floats(0.8, 4.0), percent=rates, steps=st.integers(1, 100), delta=deltas)
def test_the_two_accountants_bound_the_same_thing(z: float, percent: int, steps: int, delta: float) -> None:
    tight, loose = value(z, percent, steps, delta, "pld"), value(z, percent, steps, delta)
    assert tight <= loose * (1 + 1e-3) + 2e-4


@few
@given(z=multipliers, percent=rates, steps=st.integers(2, 200), delta=deltas)
def test_steps_compose_below_the_sum_of_their_costs(z: float, percent: int, steps: int, delta: float) -> None:
    single = epsilon(z=z, q_num=percent, q_den=100, steps=1, delta=delta, sampling="poisson").epsilon
    assert value(z, percent, steps, delta) <= steps * single * (1 + 1e-9)


@few
@given(z=multipliers, steps=st.integers(1, 100), delta=deltas)
def test_many_releases_to_everyone_cost_as_much_as_one_with_less_noise(z: float, steps: int, delta: float) -> None:
    many = epsilon(z=z, q_num=1, q_den=1, steps=steps, delta=delta).epsilon
    one = epsilon(z=z / math.sqrt(steps), q_num=1, q_den=1, steps=1, delta=delta).epsilon
    assert many == pytest.approx(one, rel=1e-9)


@few
@given(z=multipliers, steps=step_counts, delta=deltas)
def test_replace_one_is_add_or_remove_one_at_half_the_noise(z: float, steps: int, delta: float) -> None:
    replace_one = epsilon(z=z, q_num=1, q_den=1, steps=steps, delta=delta, adjacency="replace_one").epsilon
    assert replace_one == epsilon(z=z / 2, q_num=1, q_den=1, steps=steps, delta=delta).epsilon


# --- one training sample ----------------------------------------------------------------------------------------------


def test_the_originals_default_noise_is_no_privacy() -> None:
    result = sample_level_epsilon(epochs=10, batch_size=32, dataset_size=1000, noise_multiplier=0.1, delta=1e-5)
    assert result.steps == 313
    assert (result.q_num, result.q_den) == (32, 1000)
    assert result.sampling == "poisson"
    assert 5900 < result.epsilon < 6050
    assert result == epsilon(z=0.1, q_num=32, q_den=1000, steps=313, delta=1e-5, sampling="poisson")


@pytest.mark.parametrize(
    ("epochs", "batch_size", "dataset_size", "steps"), [(1, 32, 64, 2), (1, 32, 65, 3), (5, 32, 100, 16), (3, 50, 50, 3)]
)
def test_steps_are_counted_with_the_last_short_batch(epochs: int, batch_size: int, dataset_size: int, steps: int) -> None:
    result = sample_level_epsilon(
        epochs=epochs, batch_size=batch_size, dataset_size=dataset_size, noise_multiplier=1.0, delta=1e-5
    )
    assert result.steps == steps


def test_a_batch_larger_than_the_data_is_all_of_it_in_every_step() -> None:
    result = sample_level_epsilon(epochs=5, batch_size=32, dataset_size=10, noise_multiplier=1.0, delta=1e-3)
    assert (result.q_num, result.q_den, result.steps, result.sampling) == (10, 10, 5, "none")
    assert result.epsilon == epsilon(z=1.0, q_num=1, q_den=1, steps=5, delta=1e-3).epsilon


@pytest.mark.parametrize(
    "changes", [{"epochs": 0}, {"batch_size": 0}, {"dataset_size": 0}, {"epochs": 1.5}, {"batch_size": True}]
)
def test_training_that_cannot_happen_has_no_figure(changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"epochs": 1, "batch_size": 32, "dataset_size": 100, "noise_multiplier": 1.0, "delta": 1e-5}
    with pytest.raises(AccountantError, match=next(iter(changes))) as error:
        sample_level_epsilon(**{**arguments, **changes})
    assert error.value.code == "bad_input"


def test_sample_level_noise_of_zero_is_refused() -> None:
    with refused("no_noise"):
        sample_level_epsilon(epochs=1, batch_size=32, dataset_size=100, noise_multiplier=0.0, delta=1e-5)
