"""The teaching that happens where nobody recommends: which category comes next, and at which level."""

from __future__ import annotations

import numpy as np

from learners.simulator.curriculum import Category, Curriculum

ENOUGH_RIGHT, OF_LAST, MOST_TASKS = 3, 4, 6
REVIEW_SHARE, CHANGE_SHARE, INTERLEAVED_SHARE = 0.15, 0.08, 0.25
SHORT_VISIT = 2


class CurriculumPolicy:
    """One learner's way through the curriculum. It sees answers only, never skills."""

    def __init__(self, curriculum: Curriculum, rng: np.random.Generator) -> None:
        self._curriculum = curriculum
        self._rng = rng
        self._steps = [0] * len(curriculum.subjects)
        self._subject = int(rng.integers(len(curriculum.subjects)))
        self._levels = [4.0] * len(curriculum.categories)
        self._visit: Category | None = None
        self._results: list[bool] = []

    @property
    def category(self) -> Category:
        """The category that is being worked on."""
        return self._visit or self._curriculum.at(self._subject, self._steps[self._subject])

    def next_category(self) -> Category:
        """The category of the next task: the present one, or now and then a prerequisite in between."""
        category = self.category
        if self._visit is None and category.prerequisites and self._results and self._rng.random() < INTERLEAVED_SHARE:
            return self._curriculum.categories[category.prerequisites[0]]
        return category

    def next_level(self, category: Category) -> int:
        """A level for the next task: the staircase's place with some jitter, 1..9."""
        level = self._levels[category.place] + float(self._rng.normal(0.0, 1.3))
        return int(min(9, max(1, round(level))))

    def begin_session(self) -> None:
        """A new session mostly takes up the next subject."""
        if self._rng.random() < 0.8:
            self._change_subject((self._subject + 1) % len(self._steps))

    def saw(self, category: Category, right: bool) -> None:
        """Take note of an answer, recommended tasks included."""
        level = self._levels[category.place]
        if self._rng.random() < (0.6 if right else 0.8):
            self._levels[category.place] = min(8.5, max(1.5, level + (1.0 if right else -1.0)))
        if category is self.category:
            self._results.append(right)
            self._move_on()

    def _move_on(self) -> None:
        results = self._results
        if self._visit is not None:
            if len(results) >= SHORT_VISIT:
                self._visit, self._results = None, []
        elif len(results) >= 3 and not any(results[-3:]) and self.category.prerequisites:
            places = self.category.prerequisites
            self._go_to(self._curriculum.categories[places[int(self._rng.integers(len(places)))]])
        elif sum(results[-OF_LAST:]) >= ENOUGH_RIGHT or len(results) >= MOST_TASKS:
            self._next_unit()

    def _next_unit(self) -> None:
        draw = self._rng.random()
        step = self._steps[self._subject]
        self._steps[self._subject] = (step + 1) % self._curriculum.steps
        self._results = []
        if draw < REVIEW_SHARE and step > 0:
            self._go_to(self._curriculum.at(self._subject, int(self._rng.integers(step))))
        elif draw > 1.0 - CHANGE_SHARE:
            self._change_subject(int(self._rng.integers(len(self._steps))))

    def _go_to(self, category: Category) -> None:
        self._visit, self._results = category, []

    def _change_subject(self, subject: int) -> None:
        self._subject, self._visit, self._results = subject, None, []
