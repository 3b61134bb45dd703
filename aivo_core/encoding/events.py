"""One thing a learner did, as the encoder sees it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """One interaction in the learner's order.

    Attributes:
        category: skill or knowledge component.
        item: the task; may be empty (then only its category is known).
        subject: may be empty.
        score: 0..1.
        seconds: time on the learner's own clock in seconds, or None where only the order is known.
        response_ms: milliseconds to the answer, or None.
        attempts: actions needed, or None.
    """

    category: str
    item: str
    subject: str
    score: float
    seconds: float | None = None
    response_ms: float | None = None
    attempts: float | None = None
