"""Why a recommendation: what each feature group contributes, by leaving it out.

A group is replaced by what says nothing (no category seen, the curriculum's own base rates, the curriculum's mean), and the
difference to the full answer is the group's contribution. Groups overlap, so that the parts need not add up; it says what
this answer leans on, not what caused the learner's results (ablation: Zeiler and Fergus 2014, one group at a time).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aivo_core.encoding.columns import COLUMN_GROUPS
from aivo_core.encoding.encoder import Encoder
from aivo_core.network import FloatArray

GROUPS = tuple(COLUMN_GROUPS)


@dataclass(frozen=True)
class Contribution:
    """What a feature group adds.

    Attributes:
        group: ``content`` (what was practised and how well), ``subject`` (what usually follows), ``learner`` (how the learner
            does in general), ``session`` (what just happened).
        category: chance of the recommended category with the group minus without it.
        success: chance of a right answer at the recommended level with the group minus without it.
    """

    group: str
    category: float
    success: float


def with_groups_left_out(encoder: Encoder, rows: FloatArray) -> FloatArray:
    """(n, 256) rows -> (n, 1 + groups, 256) float32: each row itself, then the row without each of ``GROUPS``."""
    variants = np.repeat(rows[:, None], 1 + len(GROUPS), axis=1)
    for index, group in enumerate(GROUPS, start=1):
        start, stop = COLUMN_GROUPS[group]
        variants[:, index, start:stop] = encoder.base_rates[encoder.context_slots] if group == "subject" else 0.0
    return variants


def contributions(category: FloatArray, success: FloatArray) -> tuple[Contribution, ...]:
    """(1 + groups,) chances of category and of success for the rows of ``with_groups_left_out``; largest effect first."""
    parts = [
        Contribution(group, float(category[0] - category[index]), float(success[0] - success[index]))
        for index, group in enumerate(GROUPS, start=1)
    ]
    return tuple(sorted(parts, key=lambda part: -max(abs(part.category), abs(part.success))))
