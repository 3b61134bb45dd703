"""The 256 columns of a row, by group and by name."""

from __future__ import annotations

SLOTS = 128
"""Category slots: the most frequent categories, and the last slot for every other one."""

OVERFLOW_SLOT = SLOTS - 1
CONTEXT_SLOTS = 64
"""Columns of the subject group: forecast of the most frequent slots."""

SUBJECT_SLOTS = 8
"""Subject slots: the 7 most frequent subjects of the fit, and the last slot for every other one."""

INPUT_DIM = 256
SCALED_START = 192
"""From this column on columns are standardised with the curriculum's mean and standard deviation."""

SCALED = INPUT_DIM - SCALED_START
CLIP = 5.0
"""Standardised columns are clipped to [-CLIP, CLIP]."""

COLUMN_GROUPS: dict[str, tuple[int, int]] = {
    "content": (0, 128),
    "subject": (128, 192),
    "learner": (192, 224),
    "session": (224, 256),
}
"""First column and one past the last of each feature group."""

SCALED_COLUMNS: tuple[str, ...] = (
    "score_mean_fast",
    "score_mean_slow",
    "history_length",
    "streak",
    "share_of_slots_seen",
    "mean_mastery_seen",
    "attempts_mean",
    "response_time_mean",
    "response_time_known",
    "score_mean_last_20",
    "distinct_item_share",
    "largest_category_share",
    "forecast_entropy",
    "forecast_of_last_category",
    "expected_mastery",
    "ability",
    *(f"subject_share_{index}" for index in range(SUBJECT_SLOTS)),
    *(f"subject_accuracy_{index}" for index in range(SUBJECT_SLOTS)),
    "session_length",
    "session_accuracy",
    "session_index",
    "category_run",
    "category_run_log",
    "seconds_between_last_two",
    "seconds_between_known",
    "expected_seen",
    "last_item_mean",
    "expected_category_ability",
    "last_category_mastery",
    "last_category_count",
    "expected_item_mean",
    "last_attempts",
    "time_known",
    "surprise",
    *(f"score_{lag}_back" for lag in range(1, 6)),
    *(f"decile_{lag}_back" for lag in range(1, 6)),
    *(f"same_category_{lag}_before_last" for lag in range(1, 6)),
    "self_transition",
)
"""Names of the columns 192..255."""

INDEX: dict[str, int] = {name: index for index, name in enumerate(SCALED_COLUMNS)}
"""Where a named column lies within the standardised block."""


def group_of(column: int) -> str:
    """Group of a column 0..255."""
    return next(name for name, (start, stop) in COLUMN_GROUPS.items() if start <= column < stop)
