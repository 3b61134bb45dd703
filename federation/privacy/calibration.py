"""The question turned around: how little noise meets a target, and how many rounds a budget lasts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, log
from typing import Any

from federation.privacy import rdp
from federation.privacy.composition import ComposedResult, compose
from federation.privacy.release import (
    Z_LARGEST,
    Accountant,
    Adjacency,
    Release,
    Sampling,
    Unit,
    check_delta,
    check_epsilon,
    check_words,
    refuse,
)

GRID = 10_000
"""Calibrated noise multipliers are whole multiples of 1/GRID."""

MAX_ROUNDS = 10**9
"""A forecast of this many stands for this many or more."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The smallest noise multiplier on the grid that meets a target.

    Attributes:
        z: a multiple of 1e-4; the composition with it was computed and costs at most ``target``.
        composed: that composition, past releases included, with all qualifiers.
        target: the epsilon that was asked for.
        epsilon_one_step_below: what 1e-4 less noise would cost, above the target.
    """

    z: float
    composed: ComposedResult
    target: float
    epsilon_one_step_below: float

    def to_json(self) -> dict[str, Any]:
        """All fields, for ``--json``."""
        return {**asdict(self), "composed": self.composed.to_json()}


@dataclass(frozen=True, slots=True)
class Forecast:
    """How long a budget lasts by the RDP accountant.

    Attributes:
        rounds: how often the next release can follow before epsilon exceeds ``cap``; MAX_ROUNDS means at least that.
        epsilon_now: what the past releases cost.
        epsilon_then: what they cost with ``rounds`` more; above the cap only where the past alone is.
        epsilon_one_more: what one more costs, above the cap; with MAX_ROUNDS rounds it may lie below.
    """

    rounds: int
    epsilon_now: float
    epsilon_then: float
    epsilon_one_more: float
    cap: float
    delta: float

    def to_json(self) -> dict[str, Any]:
        """All fields, for ``--json``."""
        return asdict(self)


def smallest_noise(
    *,
    epsilon: float,
    delta: float,
    q_num: int,
    q_den: int,
    steps: int,
    accountant: Accountant = "rdp",
    adjacency: Adjacency = "add_or_remove_one",
    sampling: Sampling = "none",
    unit: Unit = "learner",
    past: Sequence[Release] = (),
) -> Calibration:
    """The smallest z, a multiple of 1e-4, with which ``steps`` releases after those of the past cost at most ``epsilon``.

    Epsilon falls in z; both sides of the answer are computed, never interpolated.

    Args:
        epsilon: target, positive.
        delta: in (0, 1).
        q_num, q_den, steps, adjacency, sampling, unit: as in ``Release``; q and steps above 0.
        past: releases already made under the same adjacency and unit.

    Raises:
        AccountantError: ``unreachable``: the past alone, or z = 10^6, costs more; ``pld_infeasible``: accountant pld cannot
            hold a composition near the answer; else as ``compose``.
    """
    target, limit = check_epsilon(epsilon), check_delta(delta)
    check_words(accountant=accountant)
    kind = Release(z=1.0, q_num=q_num, q_den=q_den, steps=steps, adjacency=adjacency, sampling=sampling, unit=unit)
    if kind.costs_nothing:
        refuse("bad_input", "q_num and steps must be at least 1: a release of nothing needs no noise")
    spent = compose(past, limit, accountant).epsilon
    if spent > target:
        refuse("unreachable", f"the releases made so far cost epsilon = {spent:.4g}, more than the target {target}")

    def composed_at(step: int, by: Accountant) -> ComposedResult:
        found = compose([*past, replace(kind, z=step / GRID)], limit, by)
        if found.accountant != by:
            refuse("pld_infeasible", found.fallback)
        return found

    start = _smallest(lambda step: composed_at(step, "rdp").epsilon, target, GRID) if rdp.answers([*past, kind]) else GRID
    answer = start if accountant == "rdp" else _smallest(lambda step: composed_at(step, "pld").epsilon, target, start)
    below = composed_at(answer - 1, accountant).epsilon if answer > 1 else float("inf")
    return Calibration(z=answer / GRID, composed=composed_at(answer, accountant), target=target, epsilon_one_step_below=below)


def rounds_left(past: Sequence[Release], next_release: Release, cap: float, delta: float) -> Forecast:
    """How often ``next_release`` can follow the releases of the past before epsilon exceeds ``cap``, by RDP.

    Args:
        past: releases already made, of the adjacency and unit of ``next_release``.
        next_release: what one round releases: its ``steps`` are those of one round.
        cap: the largest epsilon allowed, positive.
        delta: in (0, 1).

    Raises:
        AccountantError: a next release that costs nothing; else as ``compose``.
    """
    budget, limit = check_epsilon(cap, "cap"), check_delta(delta)
    if next_release.costs_nothing:
        refuse("bad_input", "next_release must have q_num and steps of at least 1: a release of nothing lasts for ever")
    now = compose(past, limit).epsilon
    compose([*past, next_release], limit)
    curve, per_round = rdp.curve(past), rdp.curve([next_release])

    def after(rounds: int) -> float:
        return now if rounds == 0 else rdp.epsilon_of(curve + rounds * per_round, limit)[0]

    rounds = _largest(after, budget, MAX_ROUNDS)
    return Forecast(
        rounds=rounds,
        epsilon_now=now,
        epsilon_then=after(rounds),
        epsilon_one_more=after(rounds + 1),
        cap=budget,
        delta=limit,
    )


def _smallest(epsilon_at: Callable[[int], float], target: float, start: int) -> int:
    """The smallest grid step with epsilon at most ``target``; ``epsilon_at`` falls, so two neighbours prove it."""
    known: dict[int, float] = {}

    def meets(step: int) -> bool:
        if step not in known:
            known[step] = epsilon_at(step)
        return known[step] <= target

    low, high = _bracket(meets, start)
    while high - low > 1:
        guess = _interpolated(low, high, known, target)
        for probe in (guess, guess - 1 if meets(guess) else guess + 1, (low + high) // 2):
            if low < probe < high:
                low, high = (low, probe) if meets(probe) else (probe, high)
    return high


def _bracket(meets: Callable[[int], bool], start: int) -> tuple[int, int]:
    """Steps (low, high): low is 0 or does not meet the target, high meets it."""
    low, high = start, start
    if meets(start):
        while low > 0 and meets(low):
            low, high = low * 4 // 5 if low > 4 else low - 1, low
        return low, high
    largest = int(Z_LARGEST) * GRID
    while not meets(high):
        if high == largest:
            refuse("unreachable", f"even noise multiplier {Z_LARGEST:g} costs more than the target")
        low, high = high, min(2 * high, largest)
    return low, high


def _interpolated(low: int, high: int, known: dict[int, float], target: float) -> int:
    """Where a straight line in logarithms meets the target, strictly between ``low`` and ``high``."""
    if low == 0 or known[high] <= 0.0:
        return (low + high) // 2
    share = log(known[low] / target) / log(known[low] / known[high])
    return min(max(ceil(low * float((high / low) ** share)), low + 1), high - 1)


def _largest(epsilon_after: Callable[[int], float], cap: float, most: int) -> int:
    """The largest number of rounds, up to ``most``, whose epsilon is at most ``cap``; 0 where the first exceeds it."""
    low, high = 0, 1
    while epsilon_after(high) <= cap:
        if high == most:
            return most
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if epsilon_after(middle) <= cap else (low, middle)
    return low
