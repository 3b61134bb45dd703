"""What learners need, and what that changes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NeedProfile:
    """Parameters of one need; the defaults are those of a learner without any.

    Attributes:
        name: as in the learner's profile; "none" stands for no need.
        share: share of learners.
        slip: chance of a wrong answer in spite of the skill.
        time_factor: multiplies the time to the answer.
        hint_rate: mean number of hints asked for after a wrong answer.
        session_tasks: mean number of tasks in a session.
        fatigue: logits lost per task within a session.
        reading_cost: logits lost in a subject that is all reading.
        retention: multiplies the time constant of forgetting.
        accommodations: what the school grants; part of the learner's profile.
    """

    name: str
    share: float
    slip: float = 0.04
    time_factor: float = 1.0
    hint_rate: float = 0.5
    session_tasks: float = 16.0
    fatigue: float = 0.01
    reading_cost: float = 0.0
    retention: float = 1.0
    accommodations: tuple[str, ...] = ()


NEED_PROFILES = (
    NeedProfile("none", 0.6),
    NeedProfile("attention", 0.12, slip=0.12, session_tasks=8.0, fatigue=0.05, accommodations=("short-sessions",)),
    NeedProfile("reading", 0.12, time_factor=1.5, hint_rate=1.0, reading_cost=0.8, accommodations=("read-aloud",)),
    NeedProfile("processing-speed", 0.1, time_factor=2.0, session_tasks=11.0, accommodations=("extra-time",)),
    NeedProfile("memory", 0.06, hint_rate=0.8, retention=0.4, accommodations=("frequent-review",)),
)

GRADE_BANDS = (("k-2", -0.4), ("3-5", 0.0), ("6-8", 0.3))
"""Grade bands with the skill, in logits, that their learners bring on average."""

LANGUAGES = (("en", 0.75), ("es", 0.15), ("zh", 0.06), ("ar", 0.04))
"""Languages spoken at home, with their shares."""
