"""Whether the success curve can be trusted: off the beaten path, and at the levels it recommends. NumPy only."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from aivo_core.ordinal import LEVELS, recommended_level, success_at, success_curve

Array = npt.NDArray[np.floating]

TARGETS = (0.5, 0.6, 0.7, 0.8)
REACH = 0.1
"""A target counts as reachable where some level's success chance lies so near."""

DISTANCE_EDGES = (-9.0, -4.0, -2.0, -1.0, 1.0, 2.0, 4.0, 9.0)
"""Bands of (level of the event - level expected after the last item)."""


def level_distance(second: Array, level: Array, score: Array, expected: Array | None) -> list[dict[str, Any]] | None:
    """Predicted and observed success by how far the event's level lies from the expected one: off the beaten path too.

    Args:
        second: (n, 10). level, score, expected: (n,). None without ``expected``.
    """
    if expected is None:
        return None
    probability = success_at(second, level)
    band = np.clip(np.searchsorted(DISTANCE_EDGES, level - expected, side="right") - 1, 0, len(DISTANCE_EDGES) - 2)
    table = []
    for index, (low, high) in enumerate(pairwise(DISTANCE_EDGES)):
        mask = band == index
        n = int(mask.sum())
        predicted, observed = (float(values[mask].mean()) if n else None for values in (probability, score))
        gap = None if predicted is None or observed is None else predicted - observed
        table.append({"from": low, "to": high, "samples": n, "predicted": predicted, "observed": observed, "gap": gap})
    return table


def target_success(second: Array, level: Array, score: Array) -> list[dict[str, Any]]:
    """For each target: how often events that happened to lie at the recommended level were right.

    Only states where the target is reachable within .1 count; ``reachable`` is their share among all.

    Args:
        second: (n, 10). level: (n,) continuous. score: (n,).
    """
    curve = success_curve(second)
    # Level d is the interval of continuous levels (d - .5, d + .5].
    event_level = np.clip(np.ceil(np.asarray(level, dtype=np.float64) - 0.5), 1, LEVELS).astype(np.int64)
    table = []
    for target in TARGETS:
        reachable = np.abs(curve - target).min(axis=1) <= REACH
        hit = reachable & (recommended_level(second, target) == event_level)
        n = int(hit.sum())
        observed = float(np.mean(score[hit], dtype=np.float64)) if n else None
        predicted = float(success_at(second[hit], event_level[hit]).mean(dtype=np.float64)) if n else None
        table.append(
            {
                "target": target,
                "observed": observed,
                "predicted": predicted,
                "error": None if observed is None else observed - target,
                "samples": n,
                "reachable": float(reachable.mean()),
            }
        )
    return table
