"""Renyi differential privacy: a curve per kind of release, added over releases, then one conversion.

Mironov 2017 ("Renyi Differential Privacy"); Poisson sampling by Mironov, Talwar and Zhang 2019, sampling without
replacement by Wang, Balle and Kasiviswanathan 2019, both computed by dp-accounting; conversion by Canonne, Kamath and
Steinke 2020 (proposition 12). At fractional orders dp-accounting adds the terms of the Poisson series without their
sign: its value is an upper bound, up to 0.2 % above the exact one. Orders whose series does not converge are left out
(their curve is infinite), which can only raise epsilon.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from federation.privacy.release import Release, merged, refuse

DoubleArray = npt.NDArray[np.float64]

ORDERS: tuple[float, ...] = (*(1 + x / 10.0 for x in range(1, 100)), *map(float, range(11, 64)), 128.0, 256.0, 512.0, 1024.0)
"""Orders tried: the library's own."""

CONVERSION = "Canonne, Kamath and Steinke 2020"

_LEAST_CURVE = 1e-13
"""Below this, rounding in the library's logarithms decides, up to a negative divergence that would read as epsilon 0."""


def curve(releases: Iterable[Release], orders: Sequence[float] = ORDERS) -> DoubleArray:
    """The Renyi divergence bound of the composition, one number per order; infinite where an order has none.

    Releases of one kind cost one curve however many they are, and a curve is computed once per process.

    Raises:
        AccountantError: ``unsupported`` for Poisson sampling under replace-one.
    """
    tried = tuple(map(float, orders))
    total = np.zeros(len(tried))
    kinds = merged(releases)
    if not answers(kinds):
        refuse("unsupported", "adjacency replace_one with sampling poisson needs accountant pld")
    for release in kinds:
        if release.sampling == "none":
            total += release.steps / (2.0 * release.z_per_sensitivity**2) * np.array(tried)
        else:
            poisson = release.sampling == "poisson"
            total += release.steps * _one_step(release.z_per_sensitivity, release.q_num, release.q_den, poisson, tried)
    return total


def epsilon_of(total: DoubleArray, delta: float, orders: Sequence[float] = ORDERS) -> tuple[float, float]:
    """Epsilon of a curve and the order that gives it."""
    found, order = _library().compute_epsilon(orders, total, delta)
    return max(float(found), 0.0), float(order)


def delta_of(total: DoubleArray, epsilon: float, orders: Sequence[float] = ORDERS) -> tuple[float, float]:
    """Delta of a curve at ``epsilon`` and the order that gives it."""
    from dp_accounting.rdp import rdp_privacy_accountant

    found, order = rdp_privacy_accountant.compute_delta(orders, total, epsilon)
    return float(found), float(order)


def answers(releases: Iterable[Release]) -> bool:
    """Whether there is a curve for each of these releases: none is known for Poisson sampling under replace-one."""
    return not any(release.sampling == "poisson" and release.adjacency == "replace_one" for release in releases)


@lru_cache(maxsize=2048)
def _one_step(z: float, q_num: int, q_den: int, poisson: bool, orders: tuple[float, ...]) -> DoubleArray:
    """The curve of one sampled release whose noise is ``z`` sensitivities; read-only, since it is shared."""
    import dp_accounting

    relations = dp_accounting.NeighboringRelation
    event = dp_accounting.GaussianDpEvent(z)
    if poisson:
        event = dp_accounting.PoissonSampledDpEvent(q_num / q_den, event)
    else:
        event = dp_accounting.SampledWithoutReplacementDpEvent(q_den, q_num, event)
    relation = relations.ADD_OR_REMOVE_ONE if poisson else relations.REPLACE_ONE
    values = _library().RdpAccountant(orders=orders, neighboring_relation=relation).compose(event, 1).rdp
    found: DoubleArray = np.maximum(np.asarray(values, dtype=np.float64), _LEAST_CURVE)
    found.flags.writeable = False
    return found


@cache
def _library() -> Any:
    """The library's RDP module; loaded at first use, since it takes a second.

    It logs a warning for every order that it leaves out, a dozen a curve; that they are left out is stated above.
    """
    from dp_accounting import rdp

    logging.getLogger("absl").addFilter(lambda record: not str(record.msg).startswith("_compute_log_a_frac failed to converge"))
    return rdp
