"""The privacy ledger: charged before release, composed and never summed, per learner, under caps, and recomputable."""

from __future__ import annotations

import threading
from datetime import timedelta
from fractions import Fraction
from typing import Any

import pytest
from django.db import connection, connections
from django.utils import timezone

from aivo_site.audit import services as audit
from aivo_site.audit.models import AuditEvent
from aivo_site.database import AppendOnlyError
from federation import ledger, privacy_periods
from federation.errors import BudgetSpent, LedgerError, PeriodError
from federation.ledger_check import verify_ledger
from federation.models import PrivacyLedgerEntry, PrivacyPeriod
from federation.privacy.accountant import epsilon
from federation.privacy.release import Release, default_delta
from federation.privacy_periods import PeriodTerms
from learners.models import Learner
from tests.federation.rounds_world import person

CHARGE: dict[str, Any] = {"clip_norm": 0.5, "mechanism": "gaussian_sum"}


def begin(**terms: Any) -> PrivacyPeriod:
    return privacy_periods.begin_period(terms=PeriodTerms(**{"population": 1000, **terms}), meaning="a test year", actor="test")


def charge(period: PrivacyPeriod, z: float = 1.0, **values: Any) -> PrivacyLedgerEntry:
    q = privacy_periods.rate_of(period)
    release = Release(z=z, q_num=q.numerator, q_den=q.denominator, sampling="none" if q == 1 else "poisson")
    return ledger.charge(**{"period": period, "release": release, **CHARGE, **values})


def of_steps(z: float, steps: int, period: PrivacyPeriod) -> float:
    q = privacy_periods.rate_of(period)
    sampling: Any = "none" if q == 1 else "poisson"
    return epsilon(z=z, q_num=q.numerator, q_den=q.denominator, steps=steps, delta=period.delta, sampling=sampling).epsilon


def alter(sequence: int, field: str, value: Any) -> None:
    """Change a row past the product, as somebody with the database would."""
    with connection.cursor() as cursor:
        cursor.execute(f"UPDATE federation_privacyledgerentry SET {field} = %s WHERE sequence = %s", [value, sequence])


# --- Charges ------------------------------------------------------------------------------------------------------------------


@pytest.mark.django_db
@pytest.mark.parametrize("rate", [Fraction(1), Fraction(1, 10)])
def test_three_charges_are_one_composition_of_three_and_not_three_times_one(rate: Fraction) -> None:
    period = begin(rate=rate)
    rows = [charge(period) for _ in range(3)]

    assert [row.sequence for row in rows] == [1, 2, 3]
    assert [row.epsilon_total for row in rows] == pytest.approx([of_steps(1.0, n, period) for n in (1, 2, 3)], rel=1e-12)
    assert rows[2].epsilon_total < 3 * rows[0].epsilon
    assert {row.epsilon for row in rows} == {rows[0].epsilon_total}
    assert ledger.federation_epsilon(period, delta=period.delta).epsilon == rows[2].epsilon_total


@pytest.mark.django_db
def test_a_row_holds_all_that_its_epsilon_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    period = begin(rate=Fraction(1, 10))
    row = PrivacyLedgerEntry.objects.get(pk=charge(period, 1.2, override_reason=" a reason ").pk)

    assert (row.unit, row.adjacency, row.sampling) == ("learner", "add_or_remove_one", "poisson")
    assert (row.q_num, row.q_den, row.noise_multiplier, row.clip_norm, row.steps) == (1, 10, 1.2, 0.5, 1)
    assert row.delta == period.delta == default_delta(1000)
    assert row.accountant == "rdp" and "dp-accounting" in row.accountant_version and row.conversion
    assert row.subject_key is None and row.override_reason == "a reason"
    assert ledger.release_of(row) == Release(z=1.2, q_num=1, q_den=10, sampling="poisson")
    event = AuditEvent.objects.get(action=ledger.ACTION)
    assert event.data == {"sequence": 1, "sha256": ledger.digest_of(row), "override_reason": "a reason"}


@pytest.mark.django_db(transaction=True)
def test_charges_from_several_connections_at_once_are_one_composition() -> None:
    period = begin()
    failures: list[BaseException] = []

    def one() -> None:
        try:
            charge(period)
        except BaseException as error:  # noqa: BLE001 - told to the test's own thread
            failures.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not failures
    rows = PrivacyLedgerEntry.objects.order_by("sequence")
    assert [row.sequence for row in rows] == [1, 2, 3, 4]
    assert [row.epsilon_total for row in rows] == pytest.approx([of_steps(1.0, n, period) for n in (1, 2, 3, 4)])


@pytest.mark.django_db
def test_a_release_over_the_cap_is_refused_and_charges_nothing() -> None:
    period = begin(epsilon_cap=8.0)
    while ledger.federation_epsilon(period, delta=period.delta).epsilon <= 8.0:
        try:
            charge(period, 2.0)
        except BudgetSpent as refused:
            assert refused.code == "privacy_budget_spent" and "cap 8" in str(refused)
            break
    spent = PrivacyLedgerEntry.objects.count()
    assert spent > 1 and of_steps(2.0, spent, period) <= 8.0 < of_steps(2.0, spent + 1, period)
    with pytest.raises(BudgetSpent):
        ledger.check_affordable(period, Release(z=2.0), None)
    ledger.check_affordable(period, Release(z=1e5), None)
    with pytest.raises(BudgetSpent):
        charge(period, 1e5, cap=1e-3)
    assert PrivacyLedgerEntry.objects.count() == spent


@pytest.mark.django_db
def test_nothing_is_charged_in_a_period_that_is_over_or_by_a_clock_that_was_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    period = begin()
    charge(period)
    with monkeypatch.context() as patched:
        earlier = timezone.now() - timedelta(days=1)
        patched.setattr(ledger.timezone, "now", lambda: earlier)
        with pytest.raises(LedgerError) as refused:
            charge(period)
        assert refused.value.code == "clock_set_back"
    person("from-tomorrow")
    Learner.objects.update(created_at=timezone.now() + timedelta(days=1))
    with pytest.raises(LedgerError) as refused:
        charge(period)
    assert refused.value.code == "clock_set_back"
    Learner.objects.all().delete()
    privacy_periods.end_period(reason="the year is over", actor="test")
    with pytest.raises(LedgerError) as refused:
        charge(period)
    assert refused.value.code == "no_privacy_period"
    assert PrivacyLedgerEntry.objects.count() == 1


@pytest.mark.django_db
def test_rows_are_neither_changed_nor_deleted() -> None:
    row = charge(begin())
    row.epsilon = 0.0
    for change in (
        row.save,
        row.delete,
        PrivacyLedgerEntry.objects.all().delete,
        lambda: PrivacyLedgerEntry.objects.update(epsilon=0),
    ):
        with pytest.raises(AppendOnlyError):
            change()


# --- Learners -----------------------------------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_a_learner_is_charged_from_joining_on_whether_drawn_or_not_and_for_uploads_of_their_own() -> None:
    period = begin(rate=Fraction(1, 2))
    early = person("early")
    charge(period)
    late = person("late")
    charge(period)
    charge(period, subject_key=late.subject_key, release=Release(z=3.0))

    found = dict(ledger.learner_epsilons(period))
    assert found[early.subject_key] == pytest.approx(of_steps(1.0, 2, period), rel=1e-12)
    poisson, own = Release(z=1.0, q_num=1, q_den=2, sampling="poisson"), Release(z=3.0)
    assert found[late.subject_key] == pytest.approx(ledger.compose([poisson, own], period.delta).epsilon, rel=1e-12)
    assert ledger.federation_epsilon(period, delta=period.delta).epsilon == found[early.subject_key]
    following = ledger.LearnerAccount(period, following=poisson)
    assert following.epsilon(early.subject_key, early.created_at) == pytest.approx(of_steps(1.0, 3, period), rel=1e-12)


@pytest.mark.django_db
def test_who_sees_the_cohort_is_told_the_figure_without_amplification() -> None:
    period = begin(rate=Fraction(1, 10))
    charge(period)
    public = ledger.federation_epsilon(period, delta=period.delta).epsilon
    seeing = ledger.federation_epsilon(period, delta=period.delta, seeing_cohort=True).epsilon
    assert seeing == pytest.approx(epsilon(z=1.0, q_num=1, q_den=1, steps=1, delta=period.delta).epsilon) and seeing > 2 * public


# --- Periods ------------------------------------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_a_new_period_counts_anew_and_the_lifetime_goes_on() -> None:
    first = begin()
    charge(first)
    with pytest.raises(PeriodError) as refused:
        begin()
    assert refused.value.code == "period_open"
    ended = privacy_periods.end_period(reason="a new school year", actor="steward")
    assert ended.ended_at is not None and privacy_periods.current_period() is None
    second = begin(population=2000)
    assert second.number == 2 and ledger.federation_epsilon(second, delta=second.delta).epsilon == 0.0
    charge(second)
    assert ledger.federation_epsilon(second, delta=second.delta).epsilon == of_steps(1.0, 1, second)
    assert ledger.federation_epsilon(None, delta=second.delta).epsilon == pytest.approx(of_steps(1.0, 2, second), rel=1e-12)
    events = AuditEvent.objects.filter(action__startswith="privacy_period.").order_by("sequence")
    assert [event.action for event in events] == ["privacy_period.begun", "privacy_period.ended", "privacy_period.begun"]
    assert events[1].data["reason"] == "a new school year" and events[1].actor == "steward"
    assert events[2].data["population"] == 2000 and verify_ledger().verified


# --- Verification -------------------------------------------------------------------------------------------------------------


def three_charges() -> PrivacyPeriod:
    period = begin(rate=Fraction(1, 10))
    for z in (1.0, 1.5, 1.0):
        charge(period, z)
    return period


@pytest.mark.django_db
def test_an_untouched_ledger_verifies() -> None:
    assert verify_ledger().to_json() == {"entries": 0, "problem_count": 0, "problems": [], "verified": True}
    three_charges()
    found = verify_ledger()
    assert found.verified and found.entries == 3


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("field", "value", "codes"),
    [
        ("epsilon", 0.01, {"altered", "wrong_epsilon"}),
        ("epsilon_total", 0.01, {"altered", "wrong_epsilon"}),
        ("noise_multiplier", 20.0, {"altered", "wrong_epsilon"}),
        ("steps", 2, {"altered", "wrong_epsilon"}),
        ("q_den", 1000, {"altered", "wrong_epsilon", "wrong_period"}),
        ("delta", 1e-3, {"altered", "wrong_epsilon", "wrong_period"}),
        ("sampling", "fixed_size", {"altered", "unreadable"}),
        ("unit", "class", {"altered", "unreadable"}),
        ("clip_norm", 5.0, {"altered"}),
        ("override_reason", "it was agreed", {"altered"}),
        ("created_at", "2020-01-01 00:00:00", {"altered"}),
    ],
)
def test_a_row_that_was_altered_is_named(field: str, value: Any, codes: set[str]) -> None:
    three_charges()
    alter(2, field, value)
    found = verify_ledger()
    own = [problem for problem in found.problems if problem.sequence == 2]
    assert not found.verified and {problem.code for problem in own} == codes
    assert all("entry 2" in problem.message for problem in own)
    assert not [problem for problem in found.problems if problem.sequence < 2]


@pytest.mark.django_db
@pytest.mark.parametrize("sequence", [1, 2, 3])
def test_a_row_that_was_removed_is_missed(sequence: int) -> None:
    three_charges()
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM federation_privacyledgerentry WHERE sequence = %s", [sequence])
    found = verify_ledger()
    assert (sequence, "missing") in [(problem.sequence, problem.code) for problem in found.problems]
    assert audit.verify().verified


@pytest.mark.django_db
def test_a_row_that_was_added_by_hand_is_not_in_the_audit_log(monkeypatch: pytest.MonkeyPatch) -> None:
    period = three_charges()
    monkeypatch.setattr(ledger.audit, "record", lambda **_values: None)
    charge(period)
    found = verify_ledger()
    assert [(problem.sequence, problem.code) for problem in found.problems] == [(4, "not_in_audit_log")]


@pytest.mark.django_db
@pytest.mark.parametrize(("field", "value"), [("population", 10**6), ("epsilon_cap", 80.0), ("expected_cohort", 5.0)])
def test_a_period_that_was_altered_is_named(field: str, value: Any) -> None:
    three_charges()
    PrivacyPeriod.objects.update(**{field: value})
    found = verify_ledger()
    assert [(problem.code, problem.sequence) for problem in found.problems] == [("altered_period", 0)]
    assert "period 1" in found.problems[0].message and field in found.problems[0].message


@pytest.mark.django_db
def test_a_ledger_of_many_charges_of_several_scopes_verifies() -> None:
    period = begin(rate=Fraction(1, 4), expected_cohort=200.0, epsilon_cap_learner=50.0)
    learners = [person(f"learner-{number}") for number in range(3)]
    for number in range(24):
        charge(period, 2.0 + number % 3)
        one = learners[number % 3].subject_key
        charge(period, subject_key=one, release=Release(z=6.0))
        charge(period, subject_key=one, release=Release(z=20.0, adjacency="replace_one"), mechanism="upload")
    found = verify_ledger()
    assert found.problems == [] and found.entries == 72
