"""What is accounted for: one kind of release of the Gaussian mechanism, with every qualifier that gives a figure meaning.

Noise z means: standard deviation z C on the sum of contributions clipped to L2 norm C. Under add-or-remove-one that sum
moves by at most C, under replace-one by at most 2C, which is the mechanism of noise multiplier z/2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from math import gcd, isfinite
from numbers import Integral, Real
from typing import Any, Literal, NoReturn, Self, get_args

from aivo_core.privacy_sampling import MAX_DENOMINATOR

Accountant = Literal["rdp", "pld"]
Adjacency = Literal["add_or_remove_one", "replace_one"]
Sampling = Literal["none", "poisson", "fixed_size"]
Unit = Literal["learner", "training_sample"]

Z_SMALLEST, Z_LARGEST = 1e-6, 1e6
"""Outside, squares of z leave what double precision can add up; epsilon is beyond 10^11 there, or is nothing."""

MAX_STEPS = 10**12


class AccountantError(ValueError):
    """A question that has no answer, or none that this accountant can give.

    ``code`` is stable: ``bad_input``, ``no_noise`` (epsilon is infinite), ``unsupported`` (no accountant for this
    combination), ``pld_infeasible`` (the RDP accountant answers it), ``unreachable`` (no noise in range meets the target).
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Release:
    """``steps`` releases of the Gaussian mechanism, each on a sample of the population.

    Attributes:
        z: noise multiplier, positive; the noise on the sum of clipped contributions has standard deviation z C.
        q_num, q_den: the sampling rate as a fraction in [0, 1]; with ``fixed_size``, cohort and population.
        steps: number of releases, 0 or more.
        adjacency: ``add_or_remove_one``, or ``replace_one``, which fixed-size sampling needs.
        sampling: ``none`` (everyone), ``poisson`` (each member independently with q), ``fixed_size`` (q_num of q_den
            without replacement); stored as ``none`` where q = 1, since nobody is left out then.
        unit: what is added, removed or replaced: a ``learner`` or a ``training_sample``.

    Raises:
        AccountantError: a value outside its range, or a combination that cannot be accounted for.
    """

    z: float
    q_num: int = 1
    q_den: int = 1
    steps: int = 1
    adjacency: Adjacency = "add_or_remove_one"
    sampling: Sampling = "none"
    unit: Unit = "learner"

    def __post_init__(self) -> None:
        check_words(adjacency=self.adjacency, sampling=self.sampling, unit=self.unit)
        check_z(self.z)
        _check_whole("q_den", self.q_den, 1, MAX_DENOMINATOR)
        _check_whole("q_num", self.q_num, 0, int(self.q_den))
        _check_whole("steps", self.steps, 0, MAX_STEPS)
        if self.sampling == "none" and 0 < self.q_num < self.q_den:
            refuse(
                "bad_input",
                f"sampling none means q = 1, not {self.q_num}/{self.q_den}: allowed with q < 1 are poisson, fixed_size",
            )
        if self.sampling == "fixed_size" and self.adjacency != "replace_one":
            refuse("unsupported", "sampling fixed_size needs adjacency replace_one: the size of the cohort is public")
        for name, kind in (("z", float), ("q_num", int), ("q_den", int), ("steps", int)):
            object.__setattr__(self, name, kind(getattr(self, name)))
        if self.q_num == self.q_den:
            object.__setattr__(self, "sampling", "none")

    @property
    def costs_nothing(self) -> bool:
        """Nothing was released, or nobody was in it."""
        return self.steps == 0 or self.q_num == 0

    @property
    def z_per_sensitivity(self) -> float:
        """Standard deviation of the noise over the L2 sensitivity: z, or z/2 under replace-one."""
        return self.z / 2.0 if self.adjacency == "replace_one" else self.z

    def to_those_who_see_the_cohort(self) -> Self:
        """The same release against whoever knows who took part: being left out by chance protects no more, so q = 1."""
        if self.costs_nothing:
            return self
        return replace(self, q_num=1, q_den=1, sampling="none")

    def to_json(self) -> dict[str, Any]:
        """All fields, for the ledger and for ``--json``; ``Release(**fields)`` is the same release."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        """The release that ``to_json`` described.

        Raises:
            AccountantError: a field is missing or unknown, or its value is refused.
        """
        names = {field.name for field in fields(cls)}
        wrong = sorted(names ^ stored.keys())
        if wrong:
            refuse(
                "bad_input", f"a stored release has the fields {', '.join(sorted(names))}; missing or unknown: {', '.join(wrong)}"
            )
        return cls(**stored)


def merged(releases: Iterable[Release]) -> tuple[Release, ...]:
    """The same composition with equal releases added up, the fraction in lowest terms, free ones left out, in a fixed order.

    Composition does not depend on order, and here its last bits do not either.
    """
    steps: Counter[Release] = Counter()
    for release in releases:
        if not release.costs_nothing:
            divisor = gcd(release.q_num, release.q_den)
            kind = replace(release, q_num=release.q_num // divisor, q_den=release.q_den // divisor, steps=1)
            steps[kind] += release.steps
    ordered = sorted(steps, key=lambda kind: (kind.sampling, kind.q_num / kind.q_den, kind.z, kind.adjacency, kind.unit))
    return tuple(replace(kind, steps=steps[kind]) for kind in ordered)


def default_delta(population: int) -> float:
    """min(1e-5, N^-1.1): below 1/N, so that publishing one member's data outright does not count as private.

    Raises:
        AccountantError: ``population`` is no whole number of at least 1.
    """
    _check_whole("population", population, 1, MAX_DENOMINATOR)
    return min(1e-5, float(float(population) ** -1.1))


def check_delta(delta: float, population: int | None = None) -> float:
    """``delta`` as a float, if it lies in (0, 1) and, where a population is given, below 1/N.

    Raises:
        AccountantError: ``bad_input``.
    """
    if not is_real(delta) or not 0.0 < delta < 1.0:
        refuse("bad_input", f"delta must lie between 0 and 1, both excluded, not {delta!r}")
    if population is not None:
        _check_whole("population", population, 1, MAX_DENOMINATOR)
        if delta >= 1.0 / population:
            refuse(
                "bad_input", f"delta must lie below 1/N = {1.0 / population:.3g} for a population of {population}, not {delta!r}"
            )
    return float(delta)


def check_epsilon(epsilon: float, name: str = "epsilon") -> float:
    """``epsilon`` as a float, if it is positive and finite.

    Raises:
        AccountantError: ``bad_input``.
    """
    if not is_real(epsilon) or not (isfinite(epsilon) and epsilon > 0.0):
        refuse("bad_input", f"{name} must be a positive finite number, not {epsilon!r}")
    return float(epsilon)


def check_z(z: float) -> None:
    """Refuse a noise multiplier that is none.

    Raises:
        AccountantError: ``no_noise`` for 0, ``bad_input`` for the rest.
    """
    if not is_real(z) or not (isfinite(z) and z >= 0.0):
        refuse("bad_input", f"z must be a positive finite number, not {z!r}")
    if z == 0.0:
        refuse("no_noise", "z must be positive: without noise epsilon is infinite")
    if not Z_SMALLEST <= z <= Z_LARGEST:
        refuse("bad_input", f"z must lie in [{Z_SMALLEST}, {Z_LARGEST}], not {z!r}")


def check_words(**words: str) -> None:
    """Refuse a word that is not one of its kind's.

    Raises:
        AccountantError: ``bad_input``.
    """
    kinds = {"accountant": Accountant, "adjacency": Adjacency, "sampling": Sampling, "unit": Unit}
    for name, word in words.items():
        allowed = get_args(kinds[name])
        if word not in allowed:
            refuse("bad_input", f"{name} must be one of {', '.join(allowed)}, not {word!r}")


def is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def refuse(code: str, message: str) -> NoReturn:
    raise AccountantError(message, code=code)


@cache
def library_version() -> str:
    """Name and version of the library that computes the figures."""
    from importlib.metadata import version

    return f"dp-accounting {version('dp-accounting')}"


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= int(value) <= high:
        limit = f"of at least {low}" if high in (MAX_DENOMINATOR, MAX_STEPS) else f"from {low} to {high}"
        refuse("bad_input", f"{name} must be a whole number {limit}, not {value!r}")
