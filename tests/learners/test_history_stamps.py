"""The stamp of a history: every way of writing interactions changes it, and nothing brings an old one back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.db import connection
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from learners.assessments import complete_assessment
from learners.consents import ConsentGiven
from learners.importing import import_interactions
from learners.models import ConsentKind, Interaction, Learner, Organisation, Pool
from learners.simulated_csv import write_simulated_csv
from learners.simulator import Simulator
from tests.learners.csv_files import file_of

pytestmark = pytest.mark.django_db


def histories() -> dict[Any, tuple[Any, list[Any]]]:
    """Stamp and stored interactions of every learner, by primary key."""
    found: dict[Any, tuple[Any, list[Any]]] = {
        key: (stamp, []) for key, stamp in Learner.objects.values_list("pk", "history_stamp")
    }
    for row in Interaction.objects.order_by("pk").values_list("learner_id", *[f.attname for f in Interaction._meta.fields]):
        found[row[0]][1].append(row)
    return found


def check_step(before: dict[Any, tuple[Any, list[Any]]]) -> None:
    """Whose interactions differ has another stamp; a learner without a change keeps it."""
    after = histories()
    for key, (stamp, rows) in after.items():
        if key in before:
            assert (stamp != before[key][0]) == (rows != before[key][1])


LINES = st.lists(
    st.builds(
        lambda learner, seq, score: f"kid-{learner},{seq},,fractions,p{seq % 3},{score}",
        st.integers(1, 3),
        st.integers(1, 12),
        st.sampled_from((0, 1)),
    ),
    min_size=1,
    max_size=6,
)


@given(batches=st.lists(LINES, min_size=2, max_size=4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_import_changes_the_stamps_of_exactly_the_learners_whose_interactions_it_changes(batches: list[list[str]]) -> None:
    Learner.objects.all().delete()
    for lines in batches:
        before = histories()
        import_interactions(source=file_of(*lines), pool=Pool.FEDERATED, consent=None)
        check_step(before)


def test_simulated_learners_imported_again_keep_their_stamps(tmp_path: Path) -> None:
    path = tmp_path / "simulated.csv"
    write_simulated_csv(simulator=Simulator(1, learners=5, prefix="sim"), events=8, path=path)
    before = histories()
    import_interactions(source=path, pool=Pool.FEDERATED, consent=None)
    check_step(before)
    imported = histories()
    assert len(imported) == 5
    import_interactions(source=path, pool=Pool.FEDERATED, consent=None)
    assert histories() == imported


def test_what_is_no_interaction_leaves_the_stamp(learner: Learner) -> None:
    import_interactions(source=file_of(f"{learner.learner_id},1,,fractions,p1,1"), pool=Pool.FEDERATED, consent=None)
    before = histories()
    complete_assessment(learner=learner, assessment_id="a1", domains={"maths": {"score": 0.5, "level": 4}})
    consent = ConsentGiven(kinds=(ConsentKind.TRAINING,), authority="parent", recorded_by="test")
    import_interactions(source=file_of(f"{learner.learner_id},1,,fractions,p1,1"), pool=Pool.FEDERATED, consent=consent)
    learner.refresh_from_db()
    assert learner.consent_training
    assert histories() == before


def test_saving_a_learner_that_was_read_earlier_does_not_bring_an_old_stamp_back(learner: Learner) -> None:
    read_earlier = Learner.objects.get(pk=learner.pk)
    import_interactions(source=file_of(f"{learner.learner_id},1,,fractions,p1,1"), pool=Pool.FEDERATED, consent=None)
    stamp = Learner.objects.get(pk=learner.pk).history_stamp
    read_earlier.grade_band = "3-4"
    read_earlier.save()
    stored = Learner.objects.get(pk=learner.pk)
    assert (stored.history_stamp, stored.grade_band) == (stamp, "3-4")
    assert stamp != read_earlier.history_stamp


def test_a_learner_is_found_by_an_index(school: Organisation, learner: Learner) -> None:
    """By small letters, as the unique index has them: a search through all learners grows with the district."""
    from learners.registration import find_learner

    assert find_learner(learner_id=learner.learner_id.upper()) == learner
    if connection.vendor == "sqlite":
        from django.db.models.functions import Lower

        plan = Learner.objects.annotate(lowered_id=Lower("learner_id")).filter(lowered_id="kid-1").explain()
        assert "learner_id_unique_without_case" in plan
