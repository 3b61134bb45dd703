"""One simulated learner: skills, clock, and what comes of a task. The package's text has the equations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from learners.simulator.curriculum import LEVELS, Category, Curriculum, Item
from learners.simulator.policy import CurriculumPolicy
from learners.simulator.profiles import GRADE_BANDS, LANGUAGES, NEED_PROFILES, NeedProfile

DISCRIMINATION = 1.4
GUESS = 0.08
UNREADINESS_COST = 1.2
HIGHEST_SKILL = 4.0
LEARNT_FROM_ERROR = 0.6
DAYS_TO_FORGET = 12.0
SECONDS_PER_TASK = 9.0
SECONDS_PER_DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class Task:
    """A task that lies before a learner."""

    category: Category
    item: Item


class SimulatedLearner:
    """A learner that can be stepped: ``next_task`` or ``practise`` gives a task, ``answer`` answers it.

    Args:
        learner_id: the pseudonym in its rows.
        curriculum: shared by all learners.
        rng: this learner's own generator.
        start: its first moment; aware.
    """

    def __init__(self, *, learner_id: str, curriculum: Curriculum, rng: np.random.Generator, start: datetime) -> None:
        self.learner_id = learner_id
        self.curriculum = curriculum
        self._rng = rng
        self.need: NeedProfile = NEED_PROFILES[_draw(rng, [profile.share for profile in NEED_PROFILES])]
        self.grade_band, band_skill = GRADE_BANDS[int(rng.integers(len(GRADE_BANDS)))]
        self.language = LANGUAGES[_draw(rng, [share for _, share in LANGUAGES])][0]
        general = band_skill + float(rng.normal(0.0, 0.7))
        brought = general + rng.normal(0.0, 0.5, size=len(curriculum.categories))
        self._brought: list[float] = brought.tolist()
        self._learnt = [0.0] * len(self._brought)
        self._practised_at = [0.0] * len(self._brought)
        self._practices = [0] * len(self._brought)
        self._rate = 0.18 * math.exp(float(rng.normal(0.0, 0.3)))
        self._policy = CurriculumPolicy(curriculum, rng)
        self._start = start + timedelta(seconds=int(rng.integers(0, 5 * 86_400)))
        self._seconds = 0.0
        self._session = 1
        self._tasks_in_session = 0
        self._tasks_wanted = self._session_length()
        self.events = 0

    # --- What is known of the learner ---------------------------------------------------------------------------------

    @property
    def profile(self) -> dict[str, Any]:
        """As ``Learner.profile`` holds it."""
        needs = [] if self.need.name == "none" else [self.need.name]
        return {"needs": needs, "accommodations": list(self.need.accommodations), "language": self.language}

    @property
    def now(self) -> datetime:
        return self._start + timedelta(seconds=int(self._seconds))

    def skill(self, category: str) -> float:
        """theta_c at this moment, in logits: the truth, which no log shows."""
        return self._skill(self.curriculum.category(category).place)

    def success_probability(self, *, category: str, level: int) -> float:
        """Mean chance, at this moment, of a right first attempt on the items of this level; draws nothing.

        Raises:
            ValueError: unknown category, or a level outside 1..9.
        """
        found = self.curriculum.category(category)
        items = found.items_of_level(_checked_level(level))
        return sum(self._probability(self._mastery(found, item)) for item in items) / len(items)

    # --- Steps --------------------------------------------------------------------------------------------------------

    def next_task(self) -> Task:
        """What the curriculum gives next; begins a new session where the last one is over."""
        self._between_tasks()
        category = self._policy.next_category()
        return self._task(category, self._policy.next_level(category))

    def practise(self, *, category: str, level: int) -> Task:
        """A task of the category and level that somebody recommends.

        Raises:
            ValueError: unknown category, or a level outside 1..9.
        """
        found, checked = self.curriculum.category(category), _checked_level(level)
        self._between_tasks()
        return self._task(found, checked)

    def rest(self, *, days: float) -> None:
        """Let time pass without practice; the next task begins a new session.

        Raises:
            ValueError: ``days`` is negative.
        """
        if days < 0:
            raise ValueError(f"days must not be negative, but is {days}")
        self._seconds += days * SECONDS_PER_DAY
        if self._tasks_in_session:
            self._begin_session()

    def answer(self, task: Task) -> dict[str, Any]:
        """Answer a task and learn from it.

        Returns:
            One row of the canonical CSV: text, numbers, and ``occurred_at`` as ISO 8601 text in UTC.
        """
        category, item, rng = task.category, task.item, self._rng
        mastery = self._mastery(category, item)
        right = bool(rng.random() < self._probability(mastery))
        attempts = 1 if right else 2 + min(3, int(rng.poisson(0.6)))
        hints = 0 if right else int(rng.poisson(self.need.hint_rate))
        response = self._response_seconds(item, right)
        self.events += 1
        row = {
            "learner_id": self.learner_id,
            "seq": self.events,
            "occurred_at": self.now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "subject": category.subject,
            "category": category.name,
            "item_id": item.item_id,
            "difficulty": item.level,
            "action": "practice",
            "score": int(right),
            "response_ms": round(1000 * response),
            "hints": hints,
            "attempts": attempts,
            "session_id": f"s{self._session}",
        }
        self._learn(category, mastery, right)
        self._policy.saw(category, right)
        self._tasks_in_session += 1
        self._seconds += response * attempts + 3.0 + float(rng.exponential(8.0))
        return row

    # --- Inside -------------------------------------------------------------------------------------------------------

    def _probability(self, mastery: float) -> float:
        return GUESS + (1.0 - GUESS - self.need.slip) * mastery

    def _mastery(self, category: Category, item: Item) -> float:
        """The chance of solving the item by skill alone, without guesses and slips."""
        need = self.need
        strain = UNREADINESS_COST * (1.0 - self._readiness(category))
        strain += need.fatigue * self._tasks_in_session + need.reading_cost * category.reading_load
        return _sigmoid(DISCRIMINATION * (self._skill(category.place) - item.difficulty - strain))

    def _readiness(self, category: Category) -> float:
        places = category.prerequisites
        if not places:
            return 1.0
        return sum(_sigmoid(self._skill(place) + 0.5) for place in places) / len(places)

    def _skill(self, place: int) -> float:
        learnt = self._learnt[place]
        if learnt == 0.0:
            return self._brought[place]
        days = (self._seconds - self._practised_at[place]) / SECONDS_PER_DAY
        constant = DAYS_TO_FORGET * self.need.retention * math.sqrt(1.0 + self._practices[place])
        return self._brought[place] + learnt * math.exp(-days / constant)

    def _learn(self, category: Category, mastery: float, right: bool) -> None:
        place = category.place
        gain = self._rate * self._readiness(category) * 4.0 * mastery * (1.0 - mastery)
        skill = self._skill(place) + gain * (1.0 if right else LEARNT_FROM_ERROR)
        self._learnt[place] = max(0.0, min(HIGHEST_SKILL, skill) - self._brought[place])
        self._practised_at[place] = self._seconds
        self._practices[place] += 1

    def _response_seconds(self, item: Item, right: bool) -> float:
        typical = SECONDS_PER_TASK * self.need.time_factor * (1.0 + 0.08 * item.level) * (1.0 if right else 1.3)
        return min(600.0, typical * math.exp(float(self._rng.normal(0.0, 0.4))))

    def _task(self, category: Category, level: int) -> Task:
        items = category.items_of_level(level)
        return Task(category, items[int(self._rng.integers(len(items)))])

    def _between_tasks(self) -> None:
        if self._tasks_in_session >= self._tasks_wanted:
            self._seconds += SECONDS_PER_DAY * (0.6 + float(self._rng.exponential(1.0)))
            self._begin_session()

    def _begin_session(self) -> None:
        self._session += 1
        self._tasks_in_session = 0
        self._tasks_wanted = self._session_length()
        self._policy.begin_session()

    def _session_length(self) -> int:
        return 3 + int(self._rng.poisson(self.need.session_tasks - 3.0))


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0.0 else 1.0 - 1.0 / (1.0 + math.exp(x))


def _draw(rng: np.random.Generator, shares: list[float]) -> int:
    return int(np.searchsorted(np.cumsum(shares), rng.random() * sum(shares), side="right").clip(0, len(shares) - 1))


def _checked_level(level: int) -> int:
    if level not in LEVELS:
        raise ValueError(f"level must lie from 1 to 9, not {level}")
    return level
