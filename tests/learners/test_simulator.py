"""Simulated learners: seeded, bounded, and reacting as the documented equations say."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import datetime
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from learners.csv_rows import COLUMNS
from learners.simulator import NEED_PROFILES, ROW_COLUMNS, Curriculum, SimulatedLearner, Simulator, simulate_rows


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(simulate_rows(seed=3, learners=60, events=100))


def by_learner(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    histories: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        histories[row["learner_id"]].append(row)
    return histories


def with_need(name: str) -> SimulatedLearner:
    return next(learner for learner in Simulator(5, learners=400).learners() if learner.need.name == name)


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    first = list(simulate_rows(seed=1, learners=3, events=20))
    assert first == list(simulate_rows(seed=1, learners=3, events=20))
    other = list(simulate_rows(seed=2, learners=3, events=20))
    assert not {row["learner_id"] for row in first} & {row["learner_id"] for row in other}
    assert [row["score"] for row in first] != [row["score"] for row in other]


def test_a_learner_does_not_depend_on_how_many_others_there_are() -> None:
    small, large = Simulator(4, learners=2), Simulator(4, learners=50)
    assert list(small.rows(events=30, indices=[1])) == list(large.rows(events=30, indices=[1]))


def test_rows_have_the_columns_of_the_canonical_csv_and_values_within_bounds(rows: list[dict[str, Any]]) -> None:
    assert set(ROW_COLUMNS) <= set(COLUMNS)
    for row in rows:
        assert tuple(row) == ROW_COLUMNS
        assert row["score"] in (0, 1)
        assert 1 <= row["difficulty"] <= 9
        assert 0 < row["response_ms"] <= 600_000
        assert row["hints"] >= 0
        assert (row["attempts"] == 1) is (row["score"] == 1)
        assert row["hints"] == 0 or row["score"] == 0


def test_a_learner_has_seq_without_gaps_and_time_that_only_goes_forward(rows: list[dict[str, Any]]) -> None:
    for history in by_learner(rows).values():
        assert [row["seq"] for row in history] == list(range(1, len(history) + 1))
        times = [datetime.fromisoformat(row["occurred_at"]) for row in history]
        assert all(later > earlier for earlier, later in pairwise(times))
        assert times[-1].year < 2022


def test_a_session_never_comes_back_and_a_new_one_begins_after_hours(rows: list[dict[str, Any]]) -> None:
    for history in by_learner(rows).values():
        for earlier, later in pairwise(history):
            gap = datetime.fromisoformat(later["occurred_at"]) - datetime.fromisoformat(earlier["occurred_at"])
            assert (gap.total_seconds() > 1_800) is (earlier["session_id"] != later["session_id"])


def test_about_six_tasks_in_ten_are_right_and_learners_differ(rows: list[dict[str, Any]]) -> None:
    means = [float(np.mean([row["score"] for row in history])) for history in by_learner(rows).values()]
    assert 0.5 < np.mean(means) < 0.7
    assert np.std(means) > 0.05


def test_items_come_again_within_learners(rows: list[dict[str, Any]]) -> None:
    repeated = [len(history) - len({row["item_id"] for row in history}) for history in by_learner(rows).values()]
    assert np.mean(repeated) > 5


def test_harder_levels_are_right_less_often(rows: list[dict[str, Any]]) -> None:
    level = np.array([row["difficulty"] for row in rows])
    score = np.array([row["score"] for row in rows])
    bands = [score[(level >= low) & (level <= low + 2)].mean() for low in (1, 4, 7)]
    assert bands[0] > bands[1] + 0.1 > bands[2] + 0.2


def test_the_next_category_is_forecast_better_from_the_last_one_than_from_base_rates(rows: list[dict[str, Any]]) -> None:
    histories = list(by_learner(rows).values())
    base: Counter[str] = Counter()
    following: dict[str, Counter[str]] = defaultdict(Counter)
    for history in histories[:40]:
        for last, row in pairwise(history):
            base[row["category"]] += 1
            following[last["category"]][row["category"]] += 1
    total = sum(base.values())
    names = [category.name for category in Curriculum().categories]
    share = {name: (base[name] + 1) / (total + len(names)) for name in names}
    base_loss, markov_loss = [], []
    for history in histories[40:]:
        for last, row in pairwise(history):
            counts, name = following[last["category"]], row["category"]
            base_loss.append(-np.log(share[name]))
            markov_loss.append(-np.log((counts[name] + 5 * share[name]) / (counts.total() + 5)))
    assert np.mean(markov_loss) < np.mean(base_loss) - 1.5


def test_practice_raises_the_chance_of_success() -> None:
    before, after = [], []
    for learner in Simulator(7, learners=40).learners():
        before.append(learner.success_probability(category="fractions", level=5))
        for _ in range(30):
            learner.answer(learner.practise(category="fractions", level=4))
        after.append(learner.success_probability(category="fractions", level=5))
    assert np.mean(after) > np.mean(before) + 0.15


def test_tasks_of_a_fitting_level_teach_more_than_hopeless_ones() -> None:
    def gain(level: int) -> float:
        gains = []
        for learner in Simulator(7, learners=40).learners():
            before = learner.skill("counting")
            for _ in range(15):
                learner.answer(learner.practise(category="counting", level=level))
            gains.append(learner.skill("counting") - before)
        return float(np.mean(gains))

    assert gain(5) > 1.5 * gain(9)


def test_time_without_practice_takes_what_was_learnt_and_no_more() -> None:
    for learner in Simulator(8, learners=10).learners():
        brought = learner.skill("weather")
        for _ in range(20):
            learner.answer(learner.practise(category="weather", level=5))
        learnt = learner.skill("weather")
        learner.rest(days=10)
        later = learner.skill("weather")
        learner.rest(days=10_000)
        assert learnt > later > brought
        assert learner.skill("weather") == pytest.approx(brought, abs=1e-3)


def test_an_easier_recommendation_succeeds_more_often() -> None:
    def success(level: int) -> float:
        scores = []
        for learner in Simulator(9, learners=40).learners():
            scores += [learner.answer(learner.practise(category="energy", level=level))["score"] for _ in range(10)]
        return float(np.mean(scores))

    assert success(2) > success(5) + 0.1 > success(8) + 0.2


def test_missing_prerequisites_make_a_category_harder() -> None:
    ready, unready = [], []
    for index in range(30):
        simulator = Simulator(10, learners=30)
        practised, fresh = simulator.learner(index), simulator.learner(index)
        category = practised.curriculum.category("percents")
        for place in category.prerequisites:
            for _ in range(30):
                practised.answer(practised.practise(category=practised.curriculum.categories[place].name, level=4))
        practised.rest(days=0.01)
        ready.append(practised.success_probability(category="percents", level=5))
        unready.append(fresh.success_probability(category="percents", level=5))
    assert np.mean(ready) > np.mean(unready) + 0.03


def test_a_task_that_is_recommended_is_of_that_category_and_level() -> None:
    learner = Simulator(1).learner(0)
    row = learner.answer(learner.practise(category="maps", level=7))
    assert (row["category"], row["difficulty"]) == ("maps", 7)


def test_asking_for_the_chance_of_success_changes_nothing() -> None:
    asked, silent = Simulator(1).learner(0), Simulator(1).learner(0)
    for _ in range(10):
        asked.success_probability(category="maps", level=3)
        assert asked.answer(asked.next_task()) == silent.answer(silent.next_task())


def test_needs_show_in_the_profile_and_not_in_the_rows() -> None:
    learner = with_need("attention")
    assert learner.profile == {"needs": ["attention"], "accommodations": ["short-sessions"], "language": learner.language}
    assert with_need("none").profile["needs"] == []
    assert "needs" not in learner.answer(learner.next_task())


def test_every_need_occurs_and_each_changes_what_it_says() -> None:
    figures: dict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
    simulator = Simulator(11, learners=300)
    for learner in simulator.learners():
        rows = [learner.answer(learner.next_task()) for _ in range(60)]
        figures[learner.need.name].append(
            (
                float(np.median([row["response_ms"] for row in rows])),
                60 / len({row["session_id"] for row in rows}),
                float(np.mean([row["hints"] for row in rows if row["score"] == 0])),
                float(np.mean([row["score"] for row in rows])),
            )
        )
    mean = {name: np.mean(values, axis=0) for name, values in figures.items()}
    assert set(mean) == {profile.name for profile in NEED_PROFILES}
    response, session, hints, score = 0, 1, 2, 3
    assert mean["processing-speed"][response] > 1.6 * mean["none"][response]
    assert mean["attention"][session] < 0.7 * mean["none"][session]
    assert mean["reading"][hints] > 1.5 * mean["none"][hints]
    assert mean["attention"][score] < mean["none"][score]


def test_a_reading_need_costs_more_where_there_is_more_to_read() -> None:
    reading, none = with_need("reading").need, with_need("none").need
    assert reading.reading_cost > none.reading_cost == 0.0
    loads = {category.subject: category.reading_load for category in Curriculum().categories}
    assert loads["reading"] > loads["mathematics"]


def test_a_memory_need_forgets_faster() -> None:
    def kept(name: str) -> float:
        learner = with_need(name)
        brought = learner.skill("habitats")
        for _ in range(20):
            learner.answer(learner.practise(category="habitats", level=5))
        learnt = learner.skill("habitats")
        learner.rest(days=20)
        return (learner.skill("habitats") - brought) / (learnt - brought)

    assert kept("memory") < kept("none") - 0.2


def test_prerequisites_come_earlier_in_the_same_subject() -> None:
    curriculum = Curriculum(seed=2)
    assert 40 <= len(curriculum.categories) <= 60
    for category in curriculum.categories:
        for place in category.prerequisites:
            assert place < category.place
            assert curriculum.categories[place].subject == category.subject
        assert bool(category.prerequisites) is (category.step > 0)


@pytest.mark.parametrize(
    ("what", "names"),
    [
        (lambda: Simulator(-1), "seed"),
        (lambda: Simulator(0, learners=0), "learners"),
        (lambda: Simulator(0, prefix="../x"), "prefix"),
        (lambda: list(Simulator(0).rows(events=1)), "events"),
        (lambda: Curriculum(categories_per_subject=11), "categories_per_subject"),
        (lambda: Curriculum(items_per_level=0), "items_per_level"),
        (lambda: Simulator(0).learner(0).practise(category="maps", level=10), "level"),
        (lambda: Simulator(0).learner(0).practise(category="alchemy", level=1), "alchemy"),
        (lambda: Simulator(0).learner(0).rest(days=-1), "days"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(what: Any, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        what()


def test_a_learner_that_does_not_exist_is_refused() -> None:
    with pytest.raises(IndexError, match="learner 5"):
        Simulator(0, learners=5).learner(5)
