"""What all releases together cost: never a sum of epsilons, and never without what gives the figure its meaning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from federation.privacy import pld, rdp
from federation.privacy.release import (
    Accountant,
    AccountantError,
    Adjacency,
    Release,
    Unit,
    check_delta,
    check_words,
    is_real,
    library_version,
    merged,
    refuse,
)

CONVERSIONS: dict[Accountant, str] = {"rdp": rdp.CONVERSION, "pld": pld.CONVERSION}


@dataclass(frozen=True, slots=True)
class ComposedResult:
    """An epsilon over all releases with everything that recomputes it.

    Attributes:
        epsilon: natural-logarithm units, as always; 0 where nothing was released.
        accountant: the one that computed it; differs from ``requested`` where ``fallback`` says why.
        order: Renyi order at which RDP gives the smallest epsilon; None for PLD and where epsilon is 0 by definition.
        adjacency, unit: those of all releases; None where nothing was released.
        releases: equal ones added up, free ones left out, in a fixed order.
    """

    epsilon: float
    delta: float
    accountant: Accountant
    requested: Accountant
    fallback: str
    accountant_version: str
    conversion: str
    order: float | None
    adjacency: Adjacency | None
    unit: Unit | None
    releases: tuple[Release, ...]

    def to_json(self) -> dict[str, Any]:
        """All fields, for the ledger and for ``--json``."""
        return {**asdict(self), "releases": [release.to_json() for release in self.releases]}


def compose(releases: Iterable[Release], delta: float, accountant: Accountant = "rdp") -> ComposedResult:
    """Epsilon of all releases together.

    Args:
        releases: in any order; equal ones cost the time of one.
        delta: in (0, 1).
        accountant: ``rdp``, or ``pld``, which is tighter and slower; where it cannot hold the composition (its size, a
            delta below what it cuts off, fixed-size sampling), RDP answers and the result says so.

    Raises:
        AccountantError: releases of different adjacency or unit, which no figure covers; Poisson sampling under
            replace-one where PLD cannot answer; delta outside its range.
    """
    kinds = _of_one_meaning(releases)
    check_words(accountant=accountant)
    limit = check_delta(delta)
    used, fallback = accountant, ""
    found: tuple[float, float | None] = (0.0, None)
    if kinds and accountant == "pld":
        try:
            found = (pld.epsilon_of(kinds, limit), None)
        except AccountantError as error:
            if error.code not in ("pld_infeasible", "unsupported") or not rdp.answers(kinds):
                raise
            used, fallback = "rdp", str(error)
    if kinds and used == "rdp":
        found = rdp.epsilon_of(rdp.curve(kinds), limit)
    if not isfinite(found[0]):
        refuse("no_noise", f"epsilon is infinite for {len(kinds)} kinds of releases and delta = {delta}")
    return ComposedResult(
        epsilon=found[0],
        delta=limit,
        accountant=used,
        requested=accountant,
        fallback=fallback,
        accountant_version=library_version(),
        conversion=CONVERSIONS[used],
        order=found[1],
        adjacency=kinds[0].adjacency if kinds else None,
        unit=kinds[0].unit if kinds else None,
        releases=kinds,
    )


def composed_delta(releases: Iterable[Release], epsilon: float, accountant: Accountant = "rdp") -> float:
    """The smallest delta for which all releases together are (``epsilon``, delta)-private; no fallback.

    Raises:
        AccountantError: as ``compose``; ``pld_infeasible`` and ``unsupported`` of the accountant asked for.
    """
    kinds = _of_one_meaning(releases)
    check_words(accountant=accountant)
    if not is_real(epsilon) or not (isfinite(epsilon) and epsilon >= 0.0):
        refuse("bad_input", f"epsilon must be a finite number of at least 0, not {epsilon!r}")
    if not kinds:
        return 0.0
    return pld.delta_of(kinds, epsilon) if accountant == "pld" else rdp.delta_of(rdp.curve(kinds), epsilon)[0]


def _of_one_meaning(releases: Iterable[Release]) -> tuple[Release, ...]:
    kinds = merged(releases)
    for name in ("adjacency", "unit"):
        words = sorted({getattr(kind, name) for kind in kinds})
        if len(words) > 1:
            refuse("unsupported", f"releases of different {name} have no common epsilon: {', '.join(words)}")
    return kinds
