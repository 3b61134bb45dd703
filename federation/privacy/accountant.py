"""How much privacy releases of the Gaussian mechanism cost, computed with Google's dp-accounting.

A figure never stands alone: the result carries the accountant, its version and conversion, the adjacency, the sampling,
z, q as a fraction, the number of steps and delta, which together recompute it. Here is one kind of release;
``federation.privacy.composition`` composes many, ``federation.privacy.calibration`` turns the question around.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from federation.privacy import pld, rdp
from federation.privacy.composition import CONVERSIONS, ComposedResult, compose, composed_delta
from federation.privacy.release import (
    Accountant,
    AccountantError,
    Adjacency,
    Release,
    Sampling,
    check_delta,
    check_words,
    is_whole,
    library_version,
    refuse,
)

__all__ = [
    "Accountant",
    "AccountantError",
    "Adjacency",
    "ComposedResult",
    "EpsilonResult",
    "Release",
    "Sampling",
    "compose",
    "composed_delta",
    "epsilon",
    "sample_level_epsilon",
    "sample_level_release",
]


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
        The result of the accountant asked for, without a fallback; epsilon is 0 with no steps or with q = 0.

    Raises:
        AccountantError: see its codes; the message names the field and the allowed values.
    """
    check_words(accountant=accountant)
    release = Release(z=z, q_num=q_num, q_den=q_den, steps=steps, adjacency=adjacency, sampling=sampling)
    limit = check_delta(delta)
    found: tuple[float, float | None] = (0.0, None)
    if not release.costs_nothing:
        alone = [release]
        found = rdp.epsilon_of(rdp.curve(alone), limit) if accountant == "rdp" else (pld.epsilon_of(alone, limit), None)
    if not isfinite(found[0]):
        refuse("no_noise", f"epsilon is infinite at z = {z}, {steps} steps and delta = {delta}")
    return EpsilonResult(
        epsilon=found[0],
        delta=limit,
        z=release.z,
        q_num=release.q_num,
        q_den=release.q_den,
        steps=release.steps,
        accountant=accountant,
        accountant_version=library_version(),
        conversion=CONVERSIONS[accountant],
        adjacency=release.adjacency,
        sampling=release.sampling,
        order=found[1],
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
    release = sample_level_release(
        epochs=epochs, batch_size=batch_size, dataset_size=dataset_size, noise_multiplier=noise_multiplier
    )
    return epsilon(
        z=release.z,
        q_num=release.q_num,
        q_den=release.q_den,
        steps=release.steps,
        delta=delta,
        accountant=accountant,
        sampling=release.sampling,
    )


def sample_level_release(*, epochs: int, batch_size: int, dataset_size: int, noise_multiplier: float) -> Release:
    """What one training session by DP-SGD releases; arguments and errors as ``sample_level_epsilon``."""
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("dataset_size", dataset_size)):
        if not is_whole(value) or value < 1:
            refuse("bad_input", f"{name} must be a whole number of at least 1, not {value!r}")
    batch = min(batch_size, dataset_size)
    return Release(
        z=noise_multiplier,
        q_num=batch,
        q_den=dataset_size,
        steps=-(-epochs * dataset_size // batch),
        sampling="poisson",
        unit="training_sample",
    )
