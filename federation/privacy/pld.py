"""Privacy loss distributions: the tighter and slower accountant.

Koskela et al. 2020; Doroshenko et al. 2022 ("Connect the dots"), the pessimistic estimate of dp-accounting. The library
scales the sensitivity to 2C under replace-one by itself. There is no distribution for fixed-size sampling.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from math import expm1, isfinite, sqrt
from typing import Any

from federation.privacy.release import Release, merged, refuse

INTERVAL = 1e-4
"""Discretisation of the privacy loss."""

MAX_POINTS = 4e6
"""Above, one distribution is refused: it takes about 150 bytes of memory and a microsecond for a point."""

MAX_WORK = 8e6
"""Above, a composition is refused: the points of all its partial compositions together."""

CONVERSION = f"pessimistic privacy loss distribution, interval {INTERVAL}"

_TAILS = 20.0
"""Width, in standard deviations of the privacy loss, that a distribution is stored over."""


def epsilon_of(releases: Iterable[Release], delta: float) -> float:
    """Epsilon of the composition.

    Raises:
        AccountantError: ``unsupported`` for fixed-size sampling; ``pld_infeasible`` for a distribution too large to hold,
            or a delta below the probability that it cuts off.
    """
    found = _epsilon(_kinds(releases), delta)
    if not isfinite(found):
        refuse("pld_infeasible", f"accountant pld cuts off more probability than delta = {delta}: use rdp")
    return max(found, 0.0)


def delta_of(releases: Iterable[Release], epsilon: float) -> float:
    """Delta of the composition at ``epsilon``; errors as ``epsilon_of``."""
    return float(_composed(_kinds(releases)).get_delta(epsilon))


def _kinds(releases: Iterable[Release]) -> tuple[Release, ...]:
    """Merged releases that the accountant can hold, with all unsampled ones as one Gaussian of the same total."""
    kinds = merged(releases)
    if any(kind.sampling == "fixed_size" for kind in kinds):
        refuse("unsupported", "sampling fixed_size needs accountant rdp")
    work, variance = 0.0, 0.0
    for kind in kinds:
        z = kind.z_per_sensitivity
        variance += kind.steps * _loss_deviation(z, kind.q_num / kind.q_den) ** 2
        points = _TAILS * (sqrt(variance) + 1.0 / z) / INTERVAL
        work += points
        if points > MAX_POINTS or work > MAX_WORK:
            refuse(
                "pld_infeasible",
                f"accountant pld would need about {work:.0e} points for z = {kind.z} and {kind.steps} steps: use rdp",
            )
    return kinds


def _loss_deviation(z: float, q: float) -> float:
    """Standard deviation of one step's privacy loss: about q sqrt(e^(1/z^2) - 1), never more than the unsampled 1/z."""
    return min(q * sqrt(expm1(min(z**-2, 700.0))), 1.0 / z)


@lru_cache(maxsize=512)
def _epsilon(kinds: tuple[Release, ...], delta: float) -> float:
    return float(_composed(kinds).get_epsilon(delta))


def _composed(kinds: tuple[Release, ...]) -> Any:
    import dp_accounting
    from dp_accounting import pld

    relations = dp_accounting.NeighboringRelation
    replace_one = bool(kinds) and kinds[0].adjacency == "replace_one"
    accountant = pld.PLDAccountant(relations.REPLACE_ONE if replace_one else relations.ADD_OR_REMOVE_ONE, INTERVAL)
    unsampled = sum(kind.steps / kind.z**2 for kind in kinds if kind.sampling == "none")
    if unsampled > 0.0:
        accountant.compose(dp_accounting.GaussianDpEvent(unsampled**-0.5))
    for kind in kinds:
        if kind.sampling == "poisson":
            event = dp_accounting.PoissonSampledDpEvent(kind.q_num / kind.q_den, dp_accounting.GaussianDpEvent(kind.z))
            accountant.compose(event, kind.steps)
    return accountant
