"""Many releases together: the reference ledgers, the order and the splitting that must not matter, and the edges."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
from hypothesis import HealthCheck, given, settings

from federation.privacy import rdp
from federation.privacy.accountant import epsilon, sample_level_epsilon, sample_level_release
from federation.privacy.composition import compose, composed_delta
from federation.privacy.release import (
    MAX_DENOMINATOR,
    AccountantError,
    Release,
    check_delta,
    default_delta,
    merged,
)
from tests.federation.privacy_vectors import ledger, release, rows
from tests.shared import needs_vectors

few = settings(derandomize=True, max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
poisson = st.builds(
    Release,
    z=st.floats(0.6, 6.0),
    q_num=st.integers(1, 40),
    q_den=st.just(100),
    steps=st.integers(1, 60),
    sampling=st.just("poisson"),
)
unsampled = st.builds(Release, z=st.floats(0.6, 6.0), steps=st.integers(1, 60))
histories = st.lists(st.one_of(poisson, unsampled), min_size=1, max_size=4)
deltas = st.sampled_from([1e-3, 1e-5, 1e-8])


def refused(code: str) -> Any:
    return pytest.raises(AccountantError, check=lambda error: error.code == code)


# --- reference values -------------------------------------------------------------------------------------------------


@needs_vectors
def test_rdp_over_mixed_releases_lies_between_the_exact_value_and_the_librarys_bound() -> None:
    cases = ledger()["heterogeneous"]
    assert len(cases) == 12
    for case in cases:
        result = compose(map(release, case["releases"]), case["delta"])
        assert case["exact_rdp_epsilon"] * (1 - 1e-6) <= result.epsilon <= case["rdp_epsilon"] * (1 + 1e-6), case["id"]
        assert result.order == pytest.approx(case["rdp_order"]), case["id"]
        assert result.epsilon <= case["sum_of_separate_rdp_epsilons"]


@needs_vectors
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(f"H{case}", marks=[pytest.mark.slow] if case in ("3", "4", "5", "8") else [])
        for case in ("1", "1b", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11")
    ],
)
def test_pld_over_mixed_releases_reproduces_the_reference_values(name: str) -> None:
    case = next(case for case in ledger()["heterogeneous"] if case["id"] == name)
    result = compose(map(release, case["releases"]), case["delta"], "pld")
    assert result.accountant == "pld"
    assert result.epsilon == pytest.approx(case["pld_epsilon"], rel=1e-3, abs=2e-4 if case["pld_epsilon"] < 0.1 else 0.0)


@needs_vectors
def test_the_identities_among_the_reference_ledgers_hold_to_the_last_bit() -> None:
    cases = {case["id"]: case for case in ledger()["heterogeneous"]}

    def of(name: str) -> float:
        return compose(map(release, cases[name]["releases"]), cases[name]["delta"]).epsilon

    assert of("H1") == of("H1b")
    assert of("H2") == of("H3")
    precision = sum(entry["T"] / entry["z"] ** 2 for entry in cases["H6"]["releases"])
    one = compose([Release(z=precision**-0.5)], cases["H6"]["delta"]).epsilon
    assert of("H6") == pytest.approx(one, rel=1e-12)
    orders = np.array(rdp.ORDERS)
    closed = orders * precision / 2 + np.log1p(-1 / orders) - np.log(cases["H6"]["delta"] * orders) / (orders - 1)
    assert of("H6") == pytest.approx(closed.min(), rel=1e-12)


@needs_vectors
def test_the_librarys_figures_agree_with_two_other_accountants() -> None:
    checked = 0
    for name, row in rows("privacy_crosscheck.csv").items():
        setting = rows("privacy.csv")[name]
        found = compose([release(setting)], float(setting["delta"])).epsilon
        assert float(row["opacus_rdp_epsilon"]) * (1 - 1e-6) <= found <= float(row["opacus_rdp_epsilon"]) * (1 + 2.5e-3), name
        if name in ("T4", "T11", "M1-1", "G1", "P4"):
            tight = compose([release(setting)], float(setting["delta"]), "pld").epsilon
            assert float(row["prv_low"]) <= tight <= float(row["prv_high"]), name
            checked += 1
    assert checked == 5


@needs_vectors
def test_the_curve_reproduces_renyi_divergences_at_single_orders() -> None:
    seen = 0
    for name, row in rows("privacy_other.csv").items():
        if name.startswith("B-RDP-"):
            values = json.loads(row["params_json"])
            found = rdp.curve([release(values)], [float(values["order"])])[0]
            assert found == pytest.approx(float(row["value"]), rel=1e-4), name
            seen += 1
    assert seen == 6


@needs_vectors
@pytest.mark.parametrize("name", ["B-PLD-1", "B-PLD-2"])
def test_delta_at_a_given_epsilon_reproduces_its_reference_value(name: str) -> None:
    row = rows("privacy_other.csv")[name]
    values = json.loads(row["params_json"])
    values["z"] = math.sqrt(3) if values["z"] == "sqrt(3)" else values["z"]
    releases = [release(values)]
    assert composed_delta(releases, float(row["epsilon_given"]), "pld") == pytest.approx(float(row["value"]), abs=1e-4)
    assert composed_delta(releases, float(row["epsilon_given"])) >= float(row["value"]) * (1 - 1e-9)


@needs_vectors
def test_concentrated_privacy_is_a_gaussian_of_the_same_rho() -> None:
    row = rows("privacy_other.csv")["B-ZCDP-RDP"]
    rho = json.loads(row["params_json"])["rho"]
    found = compose([Release(z=(2 * rho) ** -0.5)], float(row["delta"]))
    assert found.epsilon == pytest.approx(float(row["value"]), rel=1e-3)
    assert found.epsilon < float(rows("privacy_other.csv")["B-ZCDP-NAIVE"]["value"])


@needs_vectors
@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_the_edges_of_the_reference_values(accountant: Any) -> None:
    found = rows("privacy_other.csv")
    for name in ("Q0", "T0"):
        row = found[f"B-{name}-{accountant.upper()}"]
        assert compose([release(json.loads(row["params_json"]), sampling="poisson")], 1e-5, accountant).epsilon == float(
            row["value"]
        )
    for name in ("Z0", "Z0Q1"):
        row = found[f"B-{name}-{accountant.upper()}"]
        assert row["value"] == "inf"
        with refused("no_noise"):
            release(json.loads(row["params_json"]))


@needs_vectors
def test_whole_orders_alone_reproduce_the_figures_of_before_2020() -> None:
    found = rows("privacy_other.csv")
    orders = tuple(map(float, range(2, 65)))
    curve = rdp.curve([release(json.loads(found["M0-INT-CKS"]["params_json"]))], orders)
    assert rdp.epsilon_of(curve, 1e-9, orders)[0] == pytest.approx(float(found["M0-INT-CKS"]["value"]), rel=1e-3)
    old_conversion = float((curve - math.log(1e-9) / (np.array(orders) - 1.0)).min())
    assert old_conversion == pytest.approx(float(found["M0-INT-MOM"]["value"]), rel=1e-3)


@needs_vectors
def test_published_fixed_size_figures_are_those_of_noise_per_sensitivity() -> None:
    found = rows("privacy_other.csv")
    for case in range(1, 11):
        row = found[f"C{case}-WOR"]
        values = json.loads(row["params_json"])
        # The table's z is noise over sensitivity 2C; here z is noise over C.
        cohort = Release(
            z=2 * values["z"],
            q_num=values["cohort"],
            q_den=values["population"],
            steps=values["T"],
            adjacency="replace_one",
            sampling="fixed_size",
        )
        assert compose([cohort], float(row["delta"])).epsilon == pytest.approx(float(row["value"]), rel=1e-3), row["id"]


@needs_vectors
@pytest.mark.parametrize("name", [pytest.param("R1", marks=pytest.mark.slow), "R3"])
def test_reference_rows_of_both_adjacencies_in_the_words_used_here(name: str) -> None:
    found = rows("privacy_other.csv")
    values = json.loads(found[f"{name}-PLD-ADD-HALF"]["params_json"])
    delta = float(found[f"{name}-PLD-ADD-HALF"]["delta"])
    half = compose([release(values, z=values["library_noise_multiplier"])], delta, "pld").epsilon
    assert half == pytest.approx(float(found[f"{name}-PLD-ADD-HALF"]["value"]), rel=1e-3)
    # The library's RDP accountant does not rescale: its row is what replace-one would cost with twice the noise.
    asis = compose([release(values, z=2 * values["z"], adjacency="replace_one")], delta).epsilon
    assert asis == pytest.approx(float(found[f"{name}-RDP-REPLACE-ASIS"]["value"]), rel=1e-3)


# --- closed forms -----------------------------------------------------------------------------------------------------


def exact_delta(z: float, found: float) -> float:
    """Delta of one Gaussian release at an epsilon (Balle and Wang 2018, theorem 8)."""
    normal = scipy.stats.norm
    return float(normal.cdf(0.5 / z - found * z) - math.exp(found) * normal.cdf(-0.5 / z - found * z))


@few
@given(z=st.floats(0.8, 6.0), steps=st.integers(1, 10), at=st.floats(0.1, 5.0))
def test_both_accountants_bound_the_exact_gaussian_and_pld_meets_it(z: float, steps: int, at: float) -> None:
    exact = exact_delta(z / math.sqrt(steps), at)
    tight = composed_delta([Release(z=z, steps=steps)], at, "pld")
    assert exact * (1 - 1e-6) - 1e-14 <= tight <= exact * (1 + 1e-2) + 1e-12
    assert composed_delta([Release(z=z, steps=steps)], at) >= exact * (1 - 1e-9)


@few
@given(z=st.floats(0.8, 6.0), percent=st.integers(1, 99), at=st.floats(0.1, 3.0))
def test_both_accountants_bound_one_sampled_release_and_pld_meets_it(z: float, percent: int, at: float) -> None:
    q = percent / 100
    # Whoever is in the sample with probability q: q times the Gaussian's delta at log(1 + (e^epsilon - 1) / q)
    # (Balle, Barthe and Gaboardi 2018, theorem 8, tight for removing; adding costs less).
    exact = q * exact_delta(z, math.log1p(math.expm1(at) / q))
    history = [Release(z=z, q_num=percent, q_den=100, sampling="poisson")]
    assert exact * (1 - 1e-6) - 1e-14 <= composed_delta(history, at, "pld") <= exact * (1 + 1e-2) + 1e-12
    assert composed_delta(history, at) >= exact * (1 - 1e-9)


# --- what must not matter, and what must ------------------------------------------------------------------------------


@few
@given(history=histories, delta=deltas, seed=st.randoms(use_true_random=False))
def test_neither_order_nor_splitting_changes_a_bit(history: list[Release], delta: float, seed: Any) -> None:
    pieces = [replace(item, steps=1) for item in history for _ in range(item.steps)]
    seed.shuffle(pieces)
    whole, split = compose(history, delta), compose(pieces, delta)
    assert whole == split
    assert len(whole.releases) <= len(history)


@few
@given(history=histories, extra=st.one_of(poisson, unsampled), delta=deltas)
def test_a_further_release_costs_more_and_less_than_on_its_own(history: list[Release], extra: Release, delta: float) -> None:
    before, after = compose(history, delta).epsilon, compose([*history, extra], delta).epsilon
    assert before < after
    assert after <= (before + compose([extra], delta).epsilon) * (1 + 1e-9)


@few
@given(history=histories, delta=deltas)
def test_less_noise_a_higher_rate_and_a_smaller_delta_cost_more(history: list[Release], delta: float) -> None:
    cost = compose(history, delta).epsilon
    first, rest = history[0], history[1:]
    assert compose([replace(first, z=first.z * 0.8), *rest], delta).epsilon > cost
    assert compose(history, delta / 10).epsilon > cost
    seen = compose([item.to_those_who_see_the_cohort() for item in history], delta).epsilon
    assert seen > cost if any(item.sampling == "poisson" for item in history) else seen == cost


@settings(few, max_examples=4)
@given(history=st.lists(st.one_of(poisson, unsampled), min_size=1, max_size=2), delta=st.sampled_from([1e-3, 1e-5]))
def test_the_tighter_accountant_is_never_above(history: list[Release], delta: float) -> None:
    tight = compose(history, delta, "pld")
    assert tight.epsilon <= compose(history, delta).epsilon * (1 + 1e-3) + 2e-4


@few
@given(history=histories, delta=deltas)
def test_delta_and_epsilon_are_inverse(history: list[Release], delta: float) -> None:
    found = compose(history, delta).epsilon
    assert composed_delta(history, found) <= delta * (1 + 1e-6)


def test_equal_releases_need_one_curve_and_a_curve_is_computed_once() -> None:
    rdp._one_step.cache_clear()
    pieces = [Release(z=1.37, q_num=20, q_den=200, sampling="poisson")] * 100
    compose(pieces, 1e-5)
    assert rdp._one_step.cache_info().misses == 1
    compose([replace(pieces[0], q_num=1, q_den=10, steps=7), Release(z=5.0, steps=3)], 1e-7)
    assert rdp._one_step.cache_info().misses == 1


def test_merging_leaves_out_what_costs_nothing() -> None:
    tenth = Release(z=1.0, q_num=1, q_den=10, steps=2, sampling="poisson")
    nothing = [replace(tenth, q_num=0), replace(tenth, steps=0)]
    assert merged([tenth, *nothing, replace(tenth, q_num=3, q_den=30, steps=5)]) == (replace(tenth, steps=7),)
    result = compose(nothing, 1e-5)
    assert (result.epsilon, result.releases, result.adjacency, result.unit, result.order) == (0.0, (), None, None, None)
    assert compose([], 1e-5, "pld").epsilon == 0.0
    assert composed_delta(nothing, 0.0) == 0.0


def test_one_release_costs_what_the_single_question_says() -> None:
    alone = epsilon(z=1.2, q_num=3, q_den=20, steps=17, delta=1e-6, sampling="poisson")
    composed = compose([Release(z=1.2, q_num=3, q_den=20, steps=17, sampling="poisson")], 1e-6)
    assert (composed.epsilon, composed.order) == (alone.epsilon, alone.order)


def test_sessions_of_a_learner_compose_over_their_samples() -> None:
    session = sample_level_release(epochs=5, batch_size=32, dataset_size=200, noise_multiplier=1.5)
    assert (session.steps, session.q_num, session.q_den, session.unit) == (32, 32, 200, "training_sample")
    alone = sample_level_epsilon(epochs=5, batch_size=32, dataset_size=200, noise_multiplier=1.5, delta=1e-4)
    assert compose([session], 1e-4).epsilon == alone.epsilon
    assert alone.epsilon < compose([session] * 3, 1e-4).epsilon < 3 * alone.epsilon


def test_a_vanishing_divergence_is_not_taken_for_none() -> None:
    # In double precision the library's series is negative here, which it reads as epsilon 0 for any number of steps.
    faint = Release(z=1e6, q_num=1, q_den=10, steps=10**12, sampling="poisson")
    assert np.all(rdp.curve([replace(faint, steps=1)]) > 0.0)
    assert compose([faint], 1e-9).epsilon > 0.0


# --- PLD where it cannot answer ---------------------------------------------------------------------------------------

TENTH = Release(z=1.0, q_num=1, q_den=10, steps=3, sampling="poisson")


@pytest.mark.parametrize(
    ("history", "delta"),
    [
        ([TENTH], 1e-30),
        ([Release(z=1.0, steps=10**7)], 1e-6),
        ([Release(z=0.05, steps=50)], 1e-6),
        ([replace(TENTH, z=0.05, steps=50)], 1e-6),
        ([replace(TENTH, adjacency="replace_one", sampling="fixed_size")], 1e-6),
        (
            [replace(TENTH, q_num=q) for q in range(1, 10)] * 2
            + [replace(TENTH, z=0.4, steps=500 + q, q_num=q) for q in range(1, 10)],
            1e-6,
        ),
    ],
)
def test_where_pld_cannot_answer_rdp_does_and_the_result_says_so(history: list[Release], delta: float) -> None:
    result = compose(history, delta, "pld")
    assert (result.accountant, result.requested) == ("rdp", "pld")
    assert "pld" in result.fallback or "rdp" in result.fallback
    assert result.epsilon == compose(history, delta).epsilon
    assert result.conversion == compose(history, delta).conversion


def test_without_a_fallback_the_question_to_pld_is_refused() -> None:
    with refused("pld_infeasible"):
        epsilon(z=1.0, q_num=1, q_den=10, steps=3, delta=1e-30, accountant="pld", sampling="poisson")
    assert compose([TENTH], 1e-5, "pld").fallback == ""


def test_poisson_under_replace_one_has_no_curve_to_fall_back_to() -> None:
    swapped = replace(TENTH, adjacency="replace_one")
    assert compose([swapped], 1e-5, "pld").accountant == "pld"
    with refused("unsupported"):
        compose([swapped], 1e-5)
    with refused("pld_infeasible"):
        compose([swapped], 1e-30, "pld")


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"z": -1.0}, "z"),
        ({"z": math.nan}, "z"),
        ({"z": math.inf}, "z"),
        ({"z": 1e-200}, "z"),
        ({"z": 1e300}, "z"),
        ({"q_den": 0}, "q_den"),
        ({"q_den": MAX_DENOMINATOR + 1}, "q_den"),
        ({"q_num": 11}, "q_num"),
        ({"q_num": -1}, "q_num"),
        ({"q_num": 0.5}, "q_num"),
        ({"steps": -1}, "steps"),
        ({"steps": 10**13}, "steps"),
        ({"adjacency": "neighbours"}, "adjacency"),
        ({"sampling": "shuffle"}, "sampling"),
        ({"sampling": "none"}, "sampling"),
        ({"unit": "interaction"}, "unit"),
    ],
)
def test_a_release_that_is_none_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    fields = {"z": 1.0, "q_num": 1, "q_den": 10, "steps": 5, "sampling": "poisson"}
    with pytest.raises(AccountantError, match=field) as error:
        Release(**{**fields, **changes})
    assert error.value.code == "bad_input"


def test_no_noise_is_refused_whatever_else_is_given() -> None:
    for fields in ({}, {"q_num": 0, "q_den": 5, "sampling": "poisson"}, {"steps": 0}):
        with refused("no_noise"):
            Release(z=0.0, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf, True, "1e-5"])
def test_delta_outside_its_range_is_refused(delta: Any) -> None:
    for call in (lambda: compose([], delta), lambda: compose([TENTH], delta), lambda: check_delta(delta)):
        with pytest.raises(AccountantError, match="delta"):
            call()


@pytest.mark.parametrize("population", [1, 3, 49, 50, 200, 10_000, 10**9])
def test_delta_must_lie_below_one_in_the_population(population: int) -> None:
    if population > 1:
        with pytest.raises(AccountantError, match="1/N"):
            check_delta(1.0 / population, population)
        with pytest.raises(AccountantError, match="1/N"):
            check_delta(0.9, population)
    assert check_delta(default_delta(population), population) == min(1e-5, population**-1.1)
    assert check_delta(0.99 / population, population) == 0.99 / population


@pytest.mark.parametrize("population", [0, -1, 1.5, True])
def test_a_population_that_is_none_is_refused(population: Any) -> None:
    for call in (lambda: default_delta(population), lambda: check_delta(1e-5, population)):
        with pytest.raises(AccountantError, match="population"):
            call()


@pytest.mark.parametrize("change", [{"adjacency": "replace_one"}, {"unit": "training_sample"}])
def test_releases_that_protect_different_things_have_no_common_figure(change: dict[str, Any]) -> None:
    everyone = Release(z=2.0)
    for call in (lambda pair: compose(pair, 1e-5), lambda pair: composed_delta(pair, 1.0)):
        with refused("unsupported"):
            call([everyone, replace(everyone, **change)])
    # What costs nothing says nothing either.
    assert compose([everyone, replace(everyone, steps=0, **change)], 1e-5).epsilon == compose([everyone], 1e-5).epsilon


@pytest.mark.parametrize("given_epsilon", [-1.0, math.nan, math.inf, "1"])
def test_an_epsilon_that_is_none_is_refused(given_epsilon: Any) -> None:
    with refused("bad_input"):
        composed_delta([TENTH], given_epsilon)


def test_an_accountant_that_does_not_exist_is_refused_also_for_nothing() -> None:
    with refused("bad_input"):
        compose([], 1e-5, "moments")  # type: ignore[arg-type]


# --- stored and read again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_a_result_carries_all_that_recomputes_it(accountant: Any) -> None:
    history = [TENTH, Release(z=4.0, steps=5), TENTH]
    result = compose(history, 1e-5, accountant)
    stored = json.loads(json.dumps(result.to_json()))
    again = compose([Release.from_json(entry) for entry in stored["releases"]], stored["delta"], stored["requested"])
    assert again == result
    assert stored["accountant_version"].startswith("dp-accounting ")
    assert (stored["adjacency"], stored["unit"], stored["accountant"]) == ("add_or_remove_one", "learner", accountant)


def test_a_stored_release_with_other_fields_is_refused() -> None:
    stored = TENTH.to_json()
    assert Release.from_json(stored) == TENTH
    for wrong in ({**stored, "colour": 1}, {name: value for name, value in stored.items() if name != "z"}):
        with pytest.raises(AccountantError, match=r"colour|z"):
            Release.from_json(wrong)


def test_importing_the_pure_half_loads_neither_django_nor_the_accounting_library() -> None:
    code = (
        "import sys, federation.privacy.composition, federation.privacy.calibration, federation.privacy.self_test;"
        "sys.exit(bool({'dp_accounting', 'django', 'scipy', 'tensorflow'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
