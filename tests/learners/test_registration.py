"""Registering learners, organisations and completed assessments."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from learners.assessments import complete_assessment
from learners.errors import RegistrationError
from learners.models import BaselineAssessment, Learner, Organisation
from learners.registration import find_learner, find_organisation, register_learner, register_organisation
from learners.signals import assessment_completed

pytestmark = pytest.mark.django_db

DOMAINS: dict[str, dict[str, float]] = {"mathematics": {"score": 0.6, "level": 4}, "reading": {"score": 1, "level": 9}}


@pytest.fixture
def completed() -> Iterator[list[str]]:
    seen: list[str] = []

    def note(sender: Any, learner: Learner, assessment: BaselineAssessment, **_: Any) -> None:
        seen.append(f"{learner.learner_id} {assessment.assessment_id}")

    assessment_completed.connect(note)
    yield seen
    assessment_completed.disconnect(note)


def test_a_new_learner_has_no_consent_and_a_key_of_its_own(school: Organisation) -> None:
    one = register_learner(learner_id="kid-1", organisation=school, profile={"needs": ["reading"], "language": "es"})
    two = register_learner(learner_id="kid-2", organisation=school)
    assert not (one.consent_training or one.consent_contribution or one.consent_external_transfer)
    assert one.subject_key != two.subject_key
    assert Learner.objects.get(learner_id="kid-1").profile == {"needs": ["reading"], "language": "es"}


def test_registering_again_returns_the_same_learner(school: Organisation) -> None:
    first = register_learner(learner_id="kid-1", organisation=school)
    assert register_learner(learner_id="kid-1", organisation=school).pk == first.pk
    assert Learner.objects.count() == 1


def test_an_id_that_is_taken_is_refused(school: Organisation) -> None:
    register_learner(learner_id="kid-1", organisation=school)
    other = register_organisation(slug="south")
    for values in ({"learner_id": "KID-1"}, {"pool": "CURRICULUM"}, {"organisation": other}):
        with pytest.raises(RegistrationError) as caught:
            register_learner(**{"learner_id": "kid-1", "organisation": school, **values})  # type: ignore[arg-type]
        assert caught.value.code == "learner_exists"


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"learner_id": "../x"}, "bad_learner_id"),
        ({"learner_id": "kid\n"}, "bad_learner_id"),
        ({"pool": "SWIMMING"}, "unknown_pool"),
        ({"grade_band": "x" * 33}, "bad_grade_band"),
        ({"profile": {"name": "Ada"}}, "bad_profile"),
        ({"profile": {"needs": "reading"}}, "bad_profile"),
        ({"profile": {"needs": ["Ada Lovelace"]}}, "bad_profile"),
        ({"profile": {"language": ["en"]}}, "bad_profile"),
    ],
)
def test_values_that_are_not_allowed_are_refused(school: Organisation, values: dict[str, Any], code: str) -> None:
    with pytest.raises(RegistrationError) as caught:
        register_learner(**{"learner_id": "kid-1", "organisation": school, **values})
    assert caught.value.code == code
    assert not Learner.objects.exists()


def test_a_learner_is_found_whatever_the_case(learner: Learner) -> None:
    assert find_learner(learner_id="KID-1") == learner
    with pytest.raises(RegistrationError) as caught:
        find_learner(learner_id="kid-2")
    assert caught.value.code == "unknown_learner"


def test_organisations_are_made_once_and_unknown_ones_named(school: Organisation) -> None:
    assert register_organisation(slug="north", name="other name") == school
    assert find_organisation(slug="north").name == "North School"
    with pytest.raises(RegistrationError, match="known: north"):
        find_organisation(slug="east")
    with pytest.raises(RegistrationError, match="slug"):
        register_organisation(slug="a b")


def test_a_completed_assessment_is_stored_and_told_once(learner: Learner, completed: list[str]) -> None:
    when = datetime(2025, 3, 1, tzinfo=UTC)
    first, new = complete_assessment(learner=learner, assessment_id="base", domains=DOMAINS, completed_at=when)
    second, again = complete_assessment(learner=learner, assessment_id="base", domains={})
    assert (new, again) == (True, False)
    assert first == second
    assert completed == ["kid-1 base"]
    stored = BaselineAssessment.objects.get()
    assert stored.domains == DOMAINS
    assert stored.completed_at == when


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"assessment_id": ""}, "bad_assessment_id"),
        ({"assessment_id": "x" * 65}, "bad_assessment_id"),
        ({"completed_at": datetime(2025, 3, 1)}, "time_without_zone"),
        ({"domains": {"m": {"score": 1.2, "level": 3}}}, "bad_domains"),
        ({"domains": {"m": {"score": float("nan"), "level": 3}}}, "bad_domains"),
        ({"domains": {"m": {"score": True, "level": 3}}}, "bad_domains"),
        ({"domains": {"m": {"score": 0.5, "level": 0}}}, "bad_domains"),
        ({"domains": {"m": {"score": 0.5, "level": 2.5}}}, "bad_domains"),
        ({"domains": {"m": {"score": 0.5}}}, "bad_domains"),
        ({"domains": {"m": {"score": 0.5, "level": 3, "name": "Ada"}}}, "bad_domains"),
        ({"domains": {"m": 0.5}}, "bad_domains"),
        ({"domains": {"": {"score": 0.5, "level": 3}}}, "bad_domains"),
    ],
)
def test_a_summary_that_is_not_of_the_form_is_refused(
    learner: Learner, completed: list[str], values: dict[str, Any], code: str
) -> None:
    good: dict[str, Any] = {"learner": learner, "assessment_id": "base", "domains": DOMAINS}
    with pytest.raises(RegistrationError) as caught:
        complete_assessment(**{**good, **values})
    assert caught.value.code == code
    assert not BaselineAssessment.objects.exists()
    assert completed == []
