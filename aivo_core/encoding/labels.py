"""The path label: what kind of step the learner took.

id = 3 * relation + step within a session, 18 + relation after a break. The last score never enters a label.
"""

from __future__ import annotations

RELATIONS = (
    "repeat_item",
    "same_category",
    "review_same_subject",
    "review_other_subject",
    "new_same_subject",
    "new_other_subject",
)
STEPS = ("easier", "same", "harder")
STEP_DECILES = 2
"""Deciles of difficulty between two items from which on a step is easier or harder."""

SESSION_GAP_SECONDS = 1800.0
"""A longer gap between two events with known times begins a new session."""

AFTER_BREAK = len(RELATIONS) * len(STEPS)
PATHS = AFTER_BREAK + len(RELATIONS)
"""Path ids in use: 0..23 of the head's 32."""


def path_id(*, relation: int, decile_change: int, after_break: bool) -> int:
    """Id of a step from its relation (index into RELATIONS) and the change of difficulty decile."""
    if after_break:
        return AFTER_BREAK + relation
    step = 0 if decile_change <= -STEP_DECILES else 2 if decile_change >= STEP_DECILES else 1
    return len(STEPS) * relation + step


def relation(*, item_seen: bool, same_category: bool, category_seen: bool, same_subject: bool) -> int:
    """Relation of an event to what the learner did before; the first that holds, in the order of RELATIONS.

    ``item_seen``: the learner had this very item before. ``same_category``, ``same_subject``: as the event right before.
    """
    if item_seen:
        return 0
    if same_category:
        return 1
    return (2 if category_seen else 4) + (0 if same_subject else 1)


def path_name(path: int) -> str:
    """Readable name of a path id, such as ``same_category/harder`` or ``repeat_item/after_break``."""
    if not 0 <= path < PATHS:
        raise ValueError(f"path must be 0..{PATHS - 1}, not {path}")
    if path >= AFTER_BREAK:
        return f"{RELATIONS[path - AFTER_BREAK]}/after_break"
    return f"{RELATIONS[path // len(STEPS)]}/{STEPS[path % len(STEPS)]}"
