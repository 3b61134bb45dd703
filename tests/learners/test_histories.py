"""Histories: a learner's events in the learner's order."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aivo_core.encoding.events import Event
from learners.histories import iter_histories, read_history
from learners.importing import import_interactions
from learners.models import Interaction, Learner
from tests.learners.csv_files import file_of

pytestmark = pytest.mark.django_db


def imported(*lines: str) -> None:
    import_interactions(source=file_of(*lines), pool="FEDERATED", consent=None)


def items(learner_id: str = "kid-1") -> list[str]:
    return [event.item for event in read_history(Learner.objects.get(learner_id=learner_id).pk).events]


def test_seq_decides_where_all_rows_have_one_even_against_the_clock() -> None:
    imported("kid-1,2,2025-03-01T09:00:00Z,a,second,1", "kid-1,1,2025-03-01T10:00:00Z,a,first,1")
    assert items() == ["first", "second"]


def test_time_decides_where_a_seq_is_missing() -> None:
    imported("kid-1,1,2025-03-01T10:00:00Z,a,later,1", "kid-1,,2025-03-01T09:00:00Z,a,earlier,1")
    assert items() == ["earlier", "later"]


def test_arrival_decides_between_equal_times() -> None:
    imported(*(f"kid-1,,2025-03-01T09:00:00Z,a,p{index},1" for index in range(5)))
    assert items() == [f"p{index}" for index in range(5)]


def test_an_event_carries_what_the_encoder_reads() -> None:
    header = "learner_id,seq,occurred_at,subject,category,item_id,difficulty,score,response_ms,attempts"
    line = "kid-1,1,2000-01-01T00:00:10.5Z,math,fractions,p1,7,0.5,1200,3"
    import_interactions(source=file_of(line, header=header), pool="FEDERATED", consent=None)
    (event,) = read_history(Learner.objects.get().pk).events
    start = (datetime(2000, 1, 1, tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(seconds=1)
    assert event == Event(
        category="fractions", item="p1", subject="math", score=0.5, seconds=start + 10.5, response_ms=1200, attempts=3
    )


def test_what_the_source_does_not_say_is_none() -> None:
    imported("kid-1,1,,fractions,,1")
    assert read_history(Learner.objects.get().pk).events == [Event(category="fractions", item="", subject="", score=1.0)]


def test_many_learners_come_in_the_order_of_their_ids_each_with_its_own_events() -> None:
    imported(*(f"kid-{learner},{seq},,a,p{learner}-{seq},1" for seq in (2, 1) for learner in (3, 1, 2)))
    Learner.objects.create(learner_id="kid-0", organisation=Learner.objects.earliest("learner_id").organisation)
    found = [(learner.learner_id, [event.item for event in events]) for learner, events in iter_histories(Learner.objects.all())]
    assert found == [("kid-0", []), *((f"kid-{n}", [f"p{n}-1", f"p{n}-2"]) for n in (1, 2, 3))]
    for learner, events in iter_histories(Learner.objects.all()):
        assert events == read_history(learner.pk).events


def test_the_order_of_the_queryset_is_kept_and_without_one_it_is_by_id() -> None:
    imported(*(f"kid-{learner},1,,a,p,1" for learner in (2, 3, 1)))
    backwards = Learner.objects.order_by("-learner_id")
    assert [learner.learner_id for learner, _ in iter_histories(backwards)] == ["kid-3", "kid-2", "kid-1"]
    assert [learner.learner_id for learner, _ in iter_histories(Learner.objects.order_by())] == ["kid-1", "kid-2", "kid-3"]


def test_the_portion_changes_nothing_but_the_number_of_queries(django_assert_num_queries: Any) -> None:
    imported(*(f"kid-{learner},{seq},,a,p,1" for learner in range(10) for seq in range(3)))
    with django_assert_num_queries(1 + 2 * 1):
        whole = list(iter_histories(Learner.objects.all(), learners_per_query=10))
    with django_assert_num_queries(1 + 2 * 4):
        cut = list(iter_histories(Learner.objects.all(), learners_per_query=3))
    assert whole == cut


def test_a_learner_erased_while_reading_is_left_out() -> None:
    imported(*(f"kid-{learner},1,,a,p,1" for learner in range(4)))
    seen = []
    for learner, _ in iter_histories(Learner.objects.all(), learners_per_query=2):
        seen.append(learner.learner_id)
        if learner.learner_id == "kid-1":
            Interaction.objects.filter(learner__learner_id="kid-3").delete()
            Learner.objects.filter(learner_id="kid-3").delete()
    assert seen == ["kid-0", "kid-1", "kid-2"]


def test_a_portion_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="learners_per_query"):
        next(iter_histories(Learner.objects.all(), learners_per_query=0))
