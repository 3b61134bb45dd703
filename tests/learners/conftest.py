"""Fixtures of the learners' tests."""

from __future__ import annotations

import pytest

from learners.models import Learner, Organisation
from learners.registration import register_learner, register_organisation


@pytest.fixture
def school(db: None) -> Organisation:
    return register_organisation(slug="north", name="North School")


@pytest.fixture
def learner(school: Organisation) -> Learner:
    return register_learner(learner_id="kid-1", organisation=school)
