"""How much privacy releases of the Gaussian mechanism cost, computed with Google's dp-accounting.

A figure never stands alone: the result carries the accountant, its version and conversion, the adjacency, the sampling,
z, q as a fraction, the number of steps and delta, which together recompute it.

Noise z means: standard deviation z C on the sum of contributions clipped to L2 norm C. Under add-or-remove-one the sum
moves by at most C, under replace-one by at most 2C, so the mechanism is then the one of noise multiplier z/2. The RDP
accountant must be told so; the PLD accountant of dp-accounting does it itself.

RDP: Mironov 2017 ("Renyi Differential Privacy"), Poisson sampling by Mironov, Talwar and Zhang 2019, sampling without
replacement by Wang, Balle and Kasiviswanathan 2019, conversion by Canonne, Kamath and Steinke 2020 (proposition 12).
At fractional orders dp-accounting adds the terms of the Poisson series without their sign: its value is an upper bound,
up to 0.2 % above the exact one. PLD: Koskela et al. 2020; Doroshenko et al. 2022, the pessimistic estimate.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from math import expm1, inf, isfinite, sqrt
from numbers import Integral, Real
from typing import Any, Literal, NoReturn, get_args

Accountant = Literal["rdp", "pld"]
Adjacency = Literal["add_or_remove_one", "replace_one"]
Sampling = Literal["none", "poisson", "fixed_size"]

PLD_INTERVAL = 1e-4
"""Discretisation of the privacy loss."""

PLD_MAX_POINTS = 4e6
"""Above, the PLD accountant is refused: it takes about 150 bytes of memory and a microsecond for a point."""

_PLD_TAILS = 20.0
"""Width, in standard deviations of the privacy loss, that a distribution is stored over."""

CONVERSIONS: dict[str, str] = {
    "rdp": "Canonne, Kamath and Steinke 2020",
    "pld": f"pessimistic privacy loss distribution, interval {PLD_INTERVAL}",
}


class AccountantError(ValueError):
    """A question that has no answer, or none that this accountant can give.

    ``code`` is stable: ``bad_input``, ``no_noise`` (epsilon is infinite), ``unsupported`` (no accountant for this
    combination), ``pld_infeasible`` (the RDP accountant answers it).
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class EpsilonResult:
    """An epsilon with everything that gives it a meaning.

    Attributes:
        epsilon: natural-logarithm units, as always.
        sampling: ``none`` also where poisson or fixed_size was asked for with q = 1: nobody is left out then.
        order: Renyi order at which RDP gives the smallest epsilon; None for PLD and where epsilon is 0 by definition.
    """

    epsilon: float
    delta: float
    z: float
    q_num: int
    q_den: int
    steps: int
    accountant: str
    accountant_version: str
    conversion: str
    adjacency: str
    sampling: str
    order: float | None

    def to_json(self) -> dict[str, Any]:
        """All fields, for the ledger and for ``--json``."""
        return asdict(self)


def epsilon(
    *,
    z: float,
    q_num: int,
    q_den: int,
    steps: int,
    delta: float,
    accountant: Accountant = "rdp",
    adjacency: Adjacency = "add_or_remove_one",
    sampling: Sampling = "none",
) -> EpsilonResult:
    """Epsilon of ``steps`` releases of the Gaussian mechanism, each on a sample of the population.

    Args:
        z: noise multiplier: the noise on the sum of clipped contributions has standard deviation z C. Positive.
        q_num, q_den: the sampling rate as a fraction in [0, 1]; with ``fixed_size``, cohort and population.
        steps: number of releases, 0 or more.
        delta: in (0, 1).
        accountant: ``rdp``, or ``pld``, which is tighter and slower and has no fixed-size sampling.
        adjacency: ``add_or_remove_one``, or ``replace_one``, which fixed-size sampling needs.
        sampling: ``none`` (everyone, q = 1), ``poisson`` (each member independently with q), ``fixed_size``
            (q_num of q_den without replacement).

    Returns:
        The result; epsilon is 0 with no steps or with q = 0.

    Raises:
        AccountantError: see its codes; the message names the field and the allowed values.
    """
    _check_words(accountant=accountant, adjacency=adjacency, sampling=sampling)
    _check_numbers(z=z, q_num=q_num, q_den=q_den, steps=steps, delta=delta)
    if sampling == "none" and 0 < q_num < q_den:
        _refuse("bad_input", f"sampling none means q = 1, not {q_num}/{q_den}: allowed with q < 1 are poisson, fixed_size")
    if sampling == "fixed_size" and adjacency != "replace_one":
        _refuse("unsupported", "sampling fixed_size needs adjacency replace_one: the size of the cohort is public")
    effective: Sampling = "none" if q_num == q_den else sampling
    found: tuple[float, float | None] = (0.0, None)
    if steps > 0 and q_num > 0:
        compute = _rdp if accountant == "rdp" else _pld
        found = compute(float(z), int(q_num), int(q_den), int(steps), float(delta), adjacency, effective)
    if not isfinite(found[0]):
        _refuse("no_noise", f"epsilon is infinite at z = {z}, {steps} steps and delta = {delta}")
    return EpsilonResult(
        epsilon=max(float(found[0]), 0.0),
        delta=float(delta),
        z=float(z),
        q_num=int(q_num),
        q_den=int(q_den),
        steps=int(steps),
        accountant=accountant,
        accountant_version=_library_version(),
        conversion=CONVERSIONS[accountant],
        adjacency=adjacency,
        sampling=effective,
        order=None if found[1] is None else float(found[1]),
    )


def sample_level_epsilon(
    *, epochs: int, batch_size: int, dataset_size: int, noise_multiplier: float, delta: float, accountant: Accountant = "rdp"
) -> EpsilonResult:
    """Epsilon of DP-SGD for one training sample: T = ceil(epochs n / b) Poisson batches of rate q = b / n.

    A batch cannot hold more than the ``dataset_size`` samples: a larger ``batch_size`` means all of them in each step.

    Args:
        epochs, batch_size, dataset_size: 1 or more.
        noise_multiplier: standard deviation of the noise on a batch's sum, in clipping norms. Positive.
        delta: in (0, 1).

    Raises:
        AccountantError: as ``epsilon``.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("dataset_size", dataset_size)):
        if not _is_whole(value) or value < 1:
            _refuse("bad_input", f"{name} must be a whole number of at least 1, not {value!r}")
    batch = min(batch_size, dataset_size)
    return epsilon(
        z=noise_multiplier,
        q_num=batch,
        q_den=dataset_size,
        steps=-(-epochs * dataset_size // batch),
        delta=delta,
        accountant=accountant,
        sampling="poisson",
    )


def _rdp(
    z: float, q_num: int, q_den: int, steps: int, delta: float, adjacency: Adjacency, sampling: Sampling
) -> tuple[float, float | None]:
    """Epsilon and the order that gives it."""
    import dp_accounting
    from dp_accounting import rdp

    if sampling == "poisson" and adjacency == "replace_one":
        _refuse("unsupported", "adjacency replace_one with sampling poisson needs accountant pld")
    sensitivity = 2.0 if adjacency == "replace_one" else 1.0
    event = dp_accounting.GaussianDpEvent(z / sensitivity)
    if sampling == "poisson":
        event = dp_accounting.PoissonSampledDpEvent(q_num / q_den, event)
    elif sampling == "fixed_size":
        event = dp_accounting.SampledWithoutReplacementDpEvent(q_den, q_num, event)
    composed = rdp.RdpAccountant(neighboring_relation=_relation(adjacency)).compose(event, steps)
    found, order = composed.get_epsilon_and_optimal_order(delta)
    return float(found), float(order)


def _pld(
    z: float, q_num: int, q_den: int, steps: int, delta: float, adjacency: Adjacency, sampling: Sampling
) -> tuple[float, float | None]:
    import dp_accounting
    from dp_accounting import pld

    if sampling == "fixed_size":
        _refuse("unsupported", "sampling fixed_size needs accountant rdp")
    sensitivity = 2.0 if adjacency == "replace_one" else 1.0
    points = _pld_points(z / sensitivity, q_num / q_den, steps)
    if points > PLD_MAX_POINTS:
        _refuse("pld_infeasible", f"accountant pld would need about {points:.0e} points for z = {z} and {steps} steps: use rdp")
    event = dp_accounting.GaussianDpEvent(z)
    if sampling == "poisson":
        event = dp_accounting.PoissonSampledDpEvent(q_num / q_den, event)
    composed = pld.PLDAccountant(_relation(adjacency), PLD_INTERVAL).compose(event, steps)
    return float(composed.get_epsilon(delta)), None


def _pld_points(z: float, q: float, steps: int) -> float:
    """Estimated number of points of the composed distribution, from the standard deviation of the privacy loss.

    One step's loss has a standard deviation of about q sqrt(e^(1/z^2) - 1), never more than the unsampled 1/z.
    """
    exponent = min(z**-2, 700.0)
    deviation = min(q * sqrt(expm1(exponent)), 1.0 / z)
    width = _PLD_TAILS * (sqrt(steps) * deviation + 1.0 / z)
    return width / PLD_INTERVAL


def _relation(adjacency: Adjacency) -> Any:
    import dp_accounting

    relations = dp_accounting.NeighboringRelation
    return relations.REPLACE_ONE if adjacency == "replace_one" else relations.ADD_OR_REMOVE_ONE


@cache
def _library_version() -> str:
    from importlib.metadata import version

    return f"dp-accounting {version('dp-accounting')}"


def _check_words(**words: str) -> None:
    allowed = {"accountant": get_args(Accountant), "adjacency": get_args(Adjacency), "sampling": get_args(Sampling)}
    for name, word in words.items():
        if word not in allowed[name]:
            _refuse("bad_input", f"{name} must be one of {', '.join(allowed[name])}, not {word!r}")


def _check_numbers(*, z: float, q_num: int, q_den: int, steps: int, delta: float) -> None:
    if not _is_real(z) or not 0.0 <= z < inf:
        _refuse("bad_input", f"z must be a positive finite number, not {z!r}")
    if z == 0.0:
        _refuse("no_noise", "z must be positive: without noise epsilon is infinite")
    if not _is_whole(q_den) or q_den < 1:
        _refuse("bad_input", f"q_den must be a whole number of at least 1, not {q_den!r}")
    if not _is_whole(q_num) or not 0 <= q_num <= q_den:
        _refuse("bad_input", f"q_num must be a whole number from 0 to q_den = {q_den}, not {q_num!r}")
    if not _is_whole(steps) or steps < 0:
        _refuse("bad_input", f"steps must be a whole number of at least 0, not {steps!r}")
    if not _is_real(delta) or not 0.0 < delta < 1.0:
        _refuse("bad_input", f"delta must lie between 0 and 1, both excluded, not {delta!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _refuse(code: str, message: str) -> NoReturn:
    raise AccountantError(message, code=code)
