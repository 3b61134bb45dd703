"""Consents: who decided what is kept for ever; a withdrawal acts at once and outlasts imports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from aivo_site.audit.models import AuditEvent
from aivo_site.database import AppendOnlyError
from learners.consents import ConsentGiven, give_consents, record_consent, withdraw
from learners.errors import ConsentError
from learners.importing import import_interactions
from learners.models import ConsentEvent, ConsentKind, Learner, Organisation
from learners.registration import register_learner
from learners.signals import consent_withdrawn
from tests.learners.csv_files import GOOD, file_of

pytestmark = pytest.mark.django_db

BOTH = ConsentGiven((ConsentKind.TRAINING, ConsentKind.CONTRIBUTION), "guardians, forms of 2025", "import")


def decide(learner: Learner, kind: ConsentKind, given: bool) -> bool:
    return record_consent(learner=learner, kind=kind, given=given, authority="guardian", recorded_by="operator").changed


@pytest.fixture
def withdrawals() -> Iterator[list[tuple[str, str]]]:
    seen: list[tuple[str, str]] = []

    def note(sender: Any, learner: Learner, kind: ConsentKind, **_: Any) -> None:
        seen.append((learner.learner_id, kind.value))

    consent_withdrawn.connect(note)
    yield seen
    consent_withdrawn.disconnect(note)


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        (ConsentKind.TRAINING, "consent_training"),
        (ConsentKind.CONTRIBUTION, "consent_contribution"),
        (ConsentKind.EXTERNAL_TRANSFER, "consent_external_transfer"),
    ],
)
def test_a_consent_given_raises_its_own_flag_and_withdrawn_lowers_it(learner: Learner, kind: ConsentKind, flag: str) -> None:
    assert decide(learner, kind, True)
    stored = Learner.objects.get()
    flags = {name: getattr(stored, name) for name in ("consent_training", "consent_contribution", "consent_external_transfer")}
    assert flags == {**dict.fromkeys(flags, False), flag: True}
    assert decide(learner, kind, False)
    assert not getattr(Learner.objects.get(), flag)
    assert list(ConsentEvent.objects.order_by("created_at").values_list("kind", "given", "subject_key")) == [
        (kind.value, True, learner.subject_key),
        (kind.value, False, learner.subject_key),
    ]


def test_the_same_decision_twice_changes_nothing(learner: Learner) -> None:
    assert decide(learner, ConsentKind.TRAINING, True)
    assert not decide(learner, ConsentKind.TRAINING, True)
    assert decide(learner, ConsentKind.TRAINING, False)
    assert not decide(learner, ConsentKind.TRAINING, False)
    assert ConsentEvent.objects.count() == 2


def test_a_stale_row_in_memory_is_brought_up_to_date(learner: Learner) -> None:
    stale = Learner.objects.get()
    decide(learner, ConsentKind.TRAINING, True)
    assert not decide(stale, ConsentKind.TRAINING, True)
    assert stale.consent_training


def test_a_withdrawal_of_what_was_never_given_is_kept_as_a_refusal(learner: Learner) -> None:
    assert decide(learner, ConsentKind.CONTRIBUTION, False)
    given = give_consents(learners=[learner], consent=BOTH)
    stored = Learner.objects.get()
    assert stored.consent_training
    assert not stored.consent_contribution
    assert given.holders == frozenset()


def test_withdrawn_at_says_since_when_no_consent_is_left(learner: Learner) -> None:
    for kind in ConsentKind:
        decide(learner, kind, True)
    decide(learner, ConsentKind.CONTRIBUTION, False)
    decide(learner, ConsentKind.EXTERNAL_TRANSFER, False)
    assert Learner.objects.get().withdrawn_at is None
    decide(learner, ConsentKind.TRAINING, False)
    assert Learner.objects.get().withdrawn_at is not None
    decide(learner, ConsentKind.CONTRIBUTION, True)
    assert Learner.objects.get().withdrawn_at is None


def test_a_consent_given_with_an_import_clears_withdrawn_at_too(learner: Learner) -> None:
    decide(learner, ConsentKind.CONTRIBUTION, False)
    assert Learner.objects.get().withdrawn_at is not None
    give_consents(learners=[learner], consent=BOTH)
    assert Learner.objects.get().withdrawn_at is None


def test_a_withdrawal_is_told_and_a_repetition_is_not(learner: Learner, withdrawals: list[tuple[str, str]]) -> None:
    decide(learner, ConsentKind.TRAINING, True)
    assert withdrawals == []
    decide(learner, ConsentKind.TRAINING, False)
    decide(learner, ConsentKind.TRAINING, False)
    assert withdrawals == [("kid-1", "TRAINING")]


def test_an_error_in_a_receiver_undoes_the_withdrawal_and_is_not_hidden(learner: Learner) -> None:
    decide(learner, ConsentKind.TRAINING, True)

    def fail(**_: Any) -> None:
        raise RuntimeError("the round could not be told")

    consent_withdrawn.connect(fail)
    try:
        with pytest.raises(RuntimeError, match="could not be told"):
            decide(learner, ConsentKind.TRAINING, False)
    finally:
        consent_withdrawn.disconnect(fail)
    assert Learner.objects.get().consent_training
    assert ConsentEvent.objects.count() == 1


def test_withdrawing_everything_is_one_step(learner: Learner, withdrawals: list[tuple[str, str]]) -> None:
    give_consents(learners=[learner], consent=BOTH)
    changes = withdraw(learner=learner, authority="guardian", recorded_by="operator")
    assert all(change.changed for change in changes)
    assert len(withdrawals) == 3
    stored = Learner.objects.get()
    assert not (stored.consent_training or stored.consent_contribution or stored.consent_external_transfer)


def test_consent_events_cannot_be_changed_or_deleted(learner: Learner) -> None:
    decide(learner, ConsentKind.TRAINING, True)
    event = ConsentEvent.objects.get()
    event.given = False
    with pytest.raises(AppendOnlyError):
        event.save()
    with pytest.raises(AppendOnlyError):
        ConsentEvent.objects.all().delete()


def test_the_audit_log_knows_the_subject_key_and_not_the_id(learner: Learner) -> None:
    decide(learner, ConsentKind.TRAINING, True)
    event = AuditEvent.objects.get(action="consent.given")
    assert event.object_id == str(learner.subject_key)
    assert event.actor == "operator"
    assert "kid-1" not in str(event.data)


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"authority": "  "}, "authority_missing"),
        ({"authority": "x" * 201}, "text_too_long"),
        ({"recorded_by": ""}, "recorded_by_missing"),
        ({"kind": "DANCING"}, "unknown_kind"),
    ],
)
def test_a_consent_without_authority_or_of_unknown_kind_is_refused(learner: Learner, values: dict[str, Any], code: str) -> None:
    good = {"learner": learner, "kind": ConsentKind.TRAINING, "given": True, "authority": "guardian", "recorded_by": "operator"}
    with pytest.raises(ConsentError) as caught:
        record_consent(**{**good, **values})
    assert caught.value.code == code
    assert not ConsentEvent.objects.exists()


def test_a_kind_may_be_written_in_lower_case() -> None:
    assert ConsentGiven(("training", "TRAINING"), "guardian", "import").kinds == (ConsentKind.TRAINING,)  # type: ignore[arg-type]


def test_an_unknown_kind_is_answered_with_the_kinds_that_exist() -> None:
    with pytest.raises(ConsentError, match="TRAINING, CONTRIBUTION, EXTERNAL_TRANSFER"):
        ConsentGiven(("DANCING",), "guardian", "import")  # type: ignore[arg-type]
    with pytest.raises(ConsentError, match="at least one"):
        ConsentGiven((), "guardian", "import")


def test_a_learner_erased_meanwhile_is_refused(learner: Learner) -> None:
    Learner.objects.all().delete()
    with pytest.raises(ConsentError, match="not exist"):
        decide(learner, ConsentKind.TRAINING, True)


# --- Imports ----------------------------------------------------------------------------------------------------------


def test_an_import_with_consent_gives_it_to_every_learner_of_the_file_once() -> None:
    lines = (GOOD, "kid-2,1,,a,p,1", "kid-2,2,,a,p,1", "kid-3,1,,a,p,9")
    report = import_interactions(source=file_of(*lines), pool="FEDERATED", consent=BOTH)
    assert (report.learners, report.consented) == (2, 2)
    assert Learner.objects.filter(consent_training=True, consent_contribution=True, consent_external_transfer=False).count() == 2
    again = import_interactions(source=file_of(*lines), pool="FEDERATED", consent=BOTH)
    assert again.consented == 2
    assert ConsentEvent.objects.count() == 4
    assert set(ConsentEvent.objects.values_list("authority", "recorded_by")) == {(BOTH.authority, BOTH.recorded_by)}


def test_a_second_import_may_bring_the_consents_later() -> None:
    import_interactions(source=file_of(GOOD), pool="FEDERATED", consent=None)
    report = import_interactions(source=file_of(GOOD), pool="FEDERATED", consent=BOTH)
    assert (report.rows_imported, report.rows_duplicate, report.consented) == (0, 1, 1)
    assert Learner.objects.get().consent_training


def test_an_import_does_not_give_back_what_was_withdrawn(withdrawals: list[tuple[str, str]]) -> None:
    import_interactions(source=file_of(GOOD, "kid-2,1,,a,p,1"), pool="FEDERATED", consent=BOTH)
    learner = Learner.objects.get(learner_id="kid-1")
    decide(learner, ConsentKind.CONTRIBUTION, False)
    report = import_interactions(source=file_of(GOOD, "kid-2,1,,a,p,1"), pool="FEDERATED", consent=BOTH)
    learner.refresh_from_db()
    assert learner.consent_training
    assert not learner.consent_contribution
    assert (report.learners, report.consented) == (2, 1)
    decide(learner, ConsentKind.CONTRIBUTION, True)
    assert import_interactions(source=file_of(GOOD), pool="FEDERATED", consent=BOTH).consented == 1


def test_refused_rows_bring_no_consent(school: Organisation) -> None:
    register_learner(learner_id="kid-1", organisation=school, pool="CURRICULUM")
    import_interactions(source=file_of(GOOD), pool="FEDERATED", consent=BOTH)
    assert not Learner.objects.get().consent_training


def test_many_consents_take_few_statements(school: Organisation, django_assert_max_num_queries: Any) -> None:
    learners = [register_learner(learner_id=f"kid-{index}", organisation=school) for index in range(40)]
    with django_assert_max_num_queries(8):
        given = give_consents(learners=learners, consent=BOTH)
    assert given.events == 80
    assert len(given.holders) == 40
