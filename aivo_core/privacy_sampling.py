"""Who takes part, chosen by chance with exactly the probabilities that are accounted for.

The choice comes from the operating system's secure generator: whoever could predict it would know who took part, and the
amplified figure would not hold. Rates are fractions of whole numbers, compared without rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from aivo_core.privacy import PrivacyError

Member = TypeVar("Member")
Randomness = Callable[[int], bytes]
"""Takes a number of bytes and gives that many; another than ``os.urandom`` is for tests alone."""

MAX_DENOMINATOR = 2**63 - 1


def poisson_cohort(members: Sequence[Member], q_num: int, q_den: int, *, randomness: Randomness = os.urandom) -> list[Member]:
    """Each member independently with probability q_num / q_den, in the order given; may be nobody.

    Args:
        members: the declared population as far as it is there.
        q_num, q_den: the rate as a fraction in (0, 1].

    Raises:
        PrivacyError: ``bad_rate``.
    """
    if not (1 <= q_den <= MAX_DENOMINATOR and 1 <= q_num <= q_den):
        raise PrivacyError(f"rate must be a fraction in (0, 1] of numbers below 2^63, not {q_num}/{q_den}", code="bad_rate")
    chosen = np.flatnonzero(uniform_integers(len(members), q_den, randomness=randomness) < np.uint64(q_num))
    return [members[int(index)] for index in chosen]


def fixed_size_cohort(members: Sequence[Member], size: int, *, randomness: Randomness = os.urandom) -> list[Member]:
    """``size`` of the members, every such set with the same probability, in the order given.

    Floyd's algorithm (Bentley and Floyd 1987).

    Raises:
        PrivacyError: ``bad_cohort``: more than there are, or fewer than one.
    """
    count = len(members)
    if not 1 <= size <= count:
        raise PrivacyError(f"cohort must have from 1 to {count} members, not {size}", code="bad_cohort")
    chosen: set[int] = set()
    for last in range(count - size, count):
        drawn = int(uniform_integers(1, last + 1, randomness=randomness)[0])
        chosen.add(last if drawn in chosen else drawn)
    return [members[index] for index in sorted(chosen)]


def uniform_integers(count: int, below: int, *, randomness: Randomness = os.urandom) -> npt.NDArray[np.uint64]:
    """(count,) uint64, independent and exactly uniform on 0 .. below - 1.

    64-bit numbers above the largest multiple of ``below`` are drawn again, since a remainder would favour small values.

    Args:
        count: 0 or more.
        below: from 1 to 2^63 - 1.

    Raises:
        PrivacyError: ``bad_rate``.
    """
    if not 1 <= below <= MAX_DENOMINATOR:
        raise PrivacyError(f"below must lie between 1 and 2^63 - 1, not {below}", code="bad_rate")
    largest = np.uint64(2**64 // below * below - 1)
    drawn = _words(count, randomness)
    while (again := np.flatnonzero(drawn > largest)).size:
        drawn[again] = _words(again.size, randomness)
    return drawn % np.uint64(below)


def _words(count: int, randomness: Randomness) -> npt.NDArray[np.uint64]:
    return np.frombuffer(randomness(8 * count), dtype=np.uint64).copy()
