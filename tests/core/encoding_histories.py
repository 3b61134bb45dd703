"""Small synthetic histories for the encoder's tests."""

from __future__ import annotations

import numpy as np

from aivo_core.encoding import Event

Histories = list[tuple[str, list[Event]]]


def make_histories(
    seed: int, *, learners: int = 12, events: int = 30, categories: int = 6, items_per_category: int = 3, timed: bool = True
) -> Histories:
    """Learners that walk through categories in a rough order; every second one has times, some events lack an item."""
    rng = np.random.default_rng(seed)
    histories: Histories = []
    for number in range(learners):
        category, seconds, own = 0, 0.0, []
        for _ in range(events):
            if rng.random() < 0.4:
                category = int((category + rng.integers(1, 3)) % categories)
            item = f"c{category}-i{rng.integers(items_per_category)}" if rng.random() < 0.95 else ""
            seconds += float(rng.choice([20.0, 60.0, 4000.0], p=[0.6, 0.35, 0.05]))
            knows_time = timed and number % 2 == 0
            own.append(
                Event(
                    category=f"c{category}",
                    item=item,
                    subject=f"s{category % 3}",
                    score=float(rng.random() < 0.75 - 0.08 * category),
                    seconds=seconds if knows_time else None,
                    response_ms=float(rng.integers(500, 60_000)) if rng.random() < 0.5 else None,
                    attempts=float(rng.integers(1, 14)) if rng.random() < 0.7 else None,
                )
            )
        histories.append((f"learner-{number:03d}", own))
    return histories
