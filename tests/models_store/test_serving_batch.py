"""Recommendations for many learners at once: the same answers, few queries, and nobody holds up the others."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from aivo_core.encoding.errors import EncodingError
from aivo_site.errors import UsageError
from models_store import learner_states, store
from models_store.errors import NoMainModel
from models_store.models import ServingChoice
from models_store.recommendation import NotRecommended, Recommendation
from models_store.serving import LEARNERS_AT_ONCE, clear_serving_cache, recommend, recommend_many
from tests.models_store.factories import add_events, events_of, make_learner, make_version
from tests.models_store.test_serving import give_tail, learner_with

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def fresh_caches() -> None:
    store.clear_loaded_versions()
    clear_serving_cache()


def assert_same(one: Any, other: Any) -> None:
    """Equal but for float32 rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, tuple | list) and one and isinstance(one[0], float):
        np.testing.assert_allclose(one, other, atol=1e-5)
    elif isinstance(one, tuple | list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-5)
    else:
        assert one == other


def by_group(answer: Recommendation) -> dict[str, Any]:
    """As JSON, with the explanation by group: parts of the same strength have no order."""
    data = asdict(answer)
    data["why"] = {part["group"]: part for part in data["why"]}
    return data


def mixed_learners() -> list[str]:
    """On two trunks, with own tails, blends, the main tail and no events; more than are computed together."""
    make_version(seed=1)
    names = []
    for number in range(LEARNERS_AT_ONCE + 4):
        learner = make_learner(f"kid-{number}")
        add_events(learner, events_of(60 + number, 3 + number))
        names.append(learner.learner_id)
        if number % 3 == 0:
            give_tail(learner, ServingChoice.PERSONAL, 1.0)
        elif number % 3 == 1:
            give_tail(learner, ServingChoice.BLEND, 0.25)
    make_version(seed=2)
    make_learner("new")
    return [*names, "new"]


def test_a_batch_gives_each_learner_what_a_single_call_gives() -> None:
    names = mixed_learners()
    single = [recommend(name, target=0.6) for name in names]
    clear_serving_cache()
    many = recommend_many(names, target=0.6)
    assert len(many) == len(names)
    for one, answer in zip(single, many, strict=True):
        assert isinstance(answer, Recommendation)
        assert_same(by_group(one), by_group(answer))
    assert {answer.served_by.choice for answer in many if isinstance(answer, Recommendation)} == {"MAIN", "PERSONAL", "BLEND"}


def test_a_warm_batch_needs_one_query() -> None:
    names = mixed_learners()
    expected = recommend_many(names)
    with CaptureQueriesContext(
        connection,
    ) as queries:
        assert recommend_many(names) == expected
    assert len(queries) == 1


def test_a_batch_without_anything_in_memory_reads_the_stored_states_together() -> None:
    names = mixed_learners()
    expected = recommend_many(names)
    clear_serving_cache()
    with CaptureQueriesContext(connection) as queries:
        assert recommend_many(names) == expected
    # Stamps, then per trunk the states; "new" has none and is looked for.
    assert not [query for query in queries if "COUNT" in query["sql"]]
    assert len(queries) <= 4


def test_unknown_learners_do_not_hold_up_the_others_and_order_and_repetition_are_kept() -> None:
    make_version()
    learner_with(learner_id="ada")
    answers = recommend_many(["nobody", "ADA", "a\0", "ada", ""])
    assert [type(answer) for answer in answers] == [
        NotRecommended,
        Recommendation,
        NotRecommended,
        Recommendation,
        NotRecommended,
    ]
    assert answers[1] == answers[3]
    assert answers[1].learner_id == "ada"
    assert [answer.code for answer in answers if isinstance(answer, NotRecommended)] == ["unknown_learner"] * 3
    assert recommend_many([]) == []


def test_a_learner_who_cannot_be_encoded_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    make_version()
    learner_with(learner_id="ada")
    bad = learner_with(learner_id="bad")
    real = learner_states.read_history

    def read(learner: Any, **options: Any) -> Any:
        history = real(learner, **options)
        if learner == bad.pk:
            object.__setattr__(history.events[0], "score", 2.0)
        return history

    monkeypatch.setattr(learner_states, "read_history", read)
    answers = recommend_many(["bad", "ada"])
    assert isinstance(answers[0], NotRecommended)
    assert (answers[0].learner_id, answers[0].code) == ("bad", "bad_event")
    assert isinstance(answers[1], Recommendation)
    with pytest.raises(EncodingError):
        recommend("bad")


def test_a_wrong_target_or_no_main_model_fails_the_whole_batch() -> None:
    learner_with(learner_id="ada")
    with pytest.raises(UsageError, match="target"):
        recommend_many(["ada"], target=1.0)
    with pytest.raises(NoMainModel):
        recommend_many(["ada"])


def test_a_current_state_is_used_without_reading_or_counting_the_history() -> None:
    make_version()
    learner_with(30)
    expected = recommend("ada")
    clear_serving_cache()
    with CaptureQueriesContext(connection) as queries:
        assert recommend("ada") == expected
    assert not [query for query in queries if "learners_interaction" in query["sql"]]


@pytest.mark.parametrize("by_seq", [True, False])
def test_after_new_interactions_only_those_are_read(by_seq: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from learners.importing import import_interactions
    from tests.learners.csv_files import file_of

    make_version()
    lines = [f"ada,{n if by_seq else ''},2025-03-01T10:{n:02}:00Z,category {n % 5},item {n % 5}.1,{n % 2}" for n in range(1, 21)]
    import_interactions(source=file_of(*lines[:15]), pool="FEDERATED", consent=None)
    recommend("ada")
    read: list[int] = []
    real = learner_states.read_history

    def count(learner: Any, **options: Any) -> Any:
        history = real(learner, **options)
        read.append(len(history.events))
        return history

    monkeypatch.setattr(learner_states, "read_history", count)
    import_interactions(source=file_of(*lines[15:]), pool="FEDERATED", consent=None)
    after = recommend("ada")
    assert read == [5]
    learner_states.EncoderStateRow.objects.all().delete()
    clear_serving_cache()
    assert recommend("ada") == after
    assert read == [5, 20]
