"""What there is to learn: subjects, categories with prerequisites, items with difficulties."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEVELS = range(1, 10)
LOGITS_PER_LEVEL = 0.55

SUBJECTS: dict[str, tuple[float, tuple[str, ...]]] = {
    "mathematics": (
        0.2,
        ("counting", "place-value", "addition", "subtraction", "multiplication", "division", "fractions", "decimals",
         "percents", "equations"),
    ),
    "reading": (
        1.0,
        ("letter-sounds", "sight-words", "fluency", "vocabulary", "main-idea", "sequence-of-events", "inference",
         "point-of-view", "comparing-texts", "argument"),
    ),
    "writing": (
        0.7,
        ("handwriting", "spelling", "capitals", "punctuation", "sentences", "paragraphs", "narrative", "informing", "opinion",
         "revising"),
    ),
    "science": (
        0.5,
        ("observing", "living-things", "habitats", "weather", "matter", "forces", "energy", "earth-and-space", "ecosystems",
         "experiments"),
    ),
    "social-studies": (
        0.8,
        ("community", "maps", "calendars-and-time", "economy", "government", "states", "regions", "history", "citizenship",
         "world-cultures"),
    ),
}  # fmt: skip
"""Subject -> how much of a task is reading (0..1), and its categories in teaching order."""


@dataclass(frozen=True, slots=True)
class Item:
    """One task: ``level`` 1..9, ``difficulty`` b_i in logits."""

    item_id: str
    level: int
    difficulty: float


@dataclass(frozen=True, slots=True)
class Category:
    """One skill: its ``place`` among all categories and in its subject, its prerequisites as places, its items by level."""

    name: str
    subject: str
    place: int
    step: int
    reading_load: float
    prerequisites: tuple[int, ...]
    items: tuple[tuple[Item, ...], ...]

    def items_of_level(self, level: int) -> tuple[Item, ...]:
        return self.items[level - 1]


class Curriculum:
    """Categories of all subjects in one sequence; the same arguments always give the same curriculum.

    Args:
        seed: draws item difficulties and the second prerequisites.
        categories_per_subject: 1..10.
        items_per_level: items of each level in each category, at least 1.

    Raises:
        ValueError: an argument out of bounds.
    """

    def __init__(self, *, seed: int = 0, categories_per_subject: int = 10, items_per_level: int = 2) -> None:
        if not 1 <= categories_per_subject <= 10:
            raise ValueError(f"categories_per_subject must lie from 1 to 10, not {categories_per_subject}")
        if items_per_level < 1:
            raise ValueError(f"items_per_level must be at least 1, not {items_per_level}")
        rng = np.random.default_rng([seed, 1])
        categories: list[Category] = []
        for subject, (load, names) in SUBJECTS.items():
            first = len(categories)
            for step, name in enumerate(names[:categories_per_subject]):
                items = tuple(_items(name, step, level, items_per_level, rng) for level in LEVELS)
                prerequisites = _prerequisites(first, step, rng)
                categories.append(Category(name, subject, first + step, step, load, prerequisites, items))
        self.categories = tuple(categories)
        self.subjects = tuple(SUBJECTS)
        self.steps = categories_per_subject
        self._by_name = {category.name: category for category in categories}

    def category(self, name: str) -> Category:
        """The category of this name.

        Raises:
            ValueError: there is none.
        """
        if name not in self._by_name:
            raise ValueError(f"category {name!r} is unknown; known: {', '.join(self._by_name)}")
        return self._by_name[name]

    def at(self, subject: int, step: int) -> Category:
        """The category at a step of a subject, both counted from 0."""
        return self.categories[subject * self.steps + step]


def _prerequisites(first: int, step: int, rng: np.random.Generator) -> tuple[int, ...]:
    """The category before, and half the time one more of the earlier ones."""
    if step == 0:
        return ()
    earlier = int(rng.integers(0, step))
    return tuple(sorted({first + step - 1, first + earlier})) if rng.random() < 0.5 else (first + step - 1,)


def _items(name: str, step: int, level: int, count: int, rng: np.random.Generator) -> tuple[Item, ...]:
    centre = (level - 5) * LOGITS_PER_LEVEL + 0.04 * step
    return tuple(
        Item(f"{name}-{level}{'abcdefghijklmnopqrstuvwxyz'[i % 26]}{i // 26 or ''}", level, centre + float(rng.normal(0.0, 0.15)))
        for i in range(count)
    )
