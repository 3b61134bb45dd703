"""Many simulated learners from one seed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np

from learners.simulator.curriculum import Curriculum
from learners.simulator.learner import SimulatedLearner

ROW_COLUMNS = (
    "learner_id", "seq", "occurred_at", "subject", "category", "item_id", "difficulty", "action", "score", "response_ms",
    "hints", "attempts", "session_id",
)  # fmt: skip

START = datetime(2020, 9, 1, 8, 0, tzinfo=UTC)
"""Far enough back that even long histories stay in the past."""


class Simulator:
    """``learners`` learners of one curriculum; the same arguments always give the same learners.

    Learner i has the id ``<prefix>-<seed>-<i>``, does not depend on how many others there are, and other seeds give other
    learners of the same curriculum.

    Args:
        seed: draws the learners; not negative.
        learners: how many, at least 1.
        curriculum: by default ``Curriculum()``, the same for every seed.
        prefix: of the learner ids: 1 to 32 letters, digits, dots, underscores or hyphens, beginning with a letter or digit.
        start: first moment of the first learners; aware.

    Raises:
        ValueError: an argument out of bounds.
    """

    def __init__(
        self,
        seed: int,
        *,
        learners: int = 100,
        curriculum: Curriculum | None = None,
        prefix: str = "sim",
        start: datetime = START,
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed must not be negative, but is {seed}")
        if learners < 1:
            raise ValueError(f"learners must be at least 1, not {learners}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", prefix):
            raise ValueError("prefix: A-Z a-z 0-9 . _ - , at most 32, beginning with a letter or digit")
        self.seed = seed
        self.size = learners
        self.curriculum = curriculum or Curriculum()
        self._prefix = prefix
        self._start = start

    def learner(self, index: int) -> SimulatedLearner:
        """Learner ``index`` (counted from 0) at its very beginning.

        Raises:
            IndexError: there is no such learner.
        """
        if not 0 <= index < self.size:
            raise IndexError(f"learner {index} is not among {self.size} learners")
        return SimulatedLearner(
            learner_id=f"{self._prefix}-{self.seed}-{index:05d}",
            curriculum=self.curriculum,
            rng=np.random.default_rng([self.seed, 2, index]),
            start=self._start,
        )

    def learners(self) -> Iterator[SimulatedLearner]:
        """All learners at their beginning, made one at a time."""
        return (self.learner(index) for index in range(self.size))

    def rows(self, *, events: int, indices: Iterable[int] | None = None) -> Iterator[dict[str, Any]]:
        """Canonical CSV rows, learner by learner, where the curriculum alone chooses.

        Args:
            events: mean number of events per learner; each gets from 0.6 to 1.4 times as many, at least 2.
            indices: which learners; by default all.

        Raises:
            ValueError: ``events`` is below 2.
        """
        if events < 2:
            raise ValueError(f"events must be at least 2, not {events}")
        for index in range(self.size) if indices is None else indices:
            learner = self.learner(index)
            share = np.random.default_rng([self.seed, 3, index]).uniform(0.6, 1.4)
            for _ in range(max(2, round(events * share))):
                yield learner.answer(learner.next_task())


def simulate_rows(*, seed: int, learners: int, events: int, prefix: str = "sim") -> Iterator[dict[str, Any]]:
    """Rows of ``Simulator(seed, learners=learners).rows(events=events)``.

    Raises:
        ValueError: an argument out of bounds.
    """
    return Simulator(seed, learners=learners, prefix=prefix).rows(events=events)
