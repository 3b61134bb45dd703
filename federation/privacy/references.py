"""Epsilons computed or published elsewhere, which this installation's accountant must give again."""

from __future__ import annotations

from dataclasses import dataclass

from federation.privacy.composition import compose
from federation.privacy.release import Accountant, Release

RDP_TOLERANCE, PLD_TOLERANCE = 1e-6, 1e-3


@dataclass(frozen=True, slots=True)
class Reference:
    """A composition with its epsilon from elsewhere.

    Attributes:
        exact: epsilon by an implementation other than this product's.
        upper: for RDP at fractional orders, the known safe upper bound; equal to ``exact`` elsewhere.
    """

    name: str
    source: str
    accountant: Accountant
    releases: tuple[Release, ...]
    delta: float
    exact: float
    upper: float

    @property
    def _tolerance(self) -> float:
        return RDP_TOLERANCE if self.accountant == "rdp" else PLD_TOLERANCE

    @property
    def low(self) -> float:
        return self.exact * (1.0 - self._tolerance)

    @property
    def high(self) -> float:
        return self.upper * (1.0 + self._tolerance)

    def computed(self) -> float:
        """What the accountant gives here; a fallback to another accountant counts as not a number."""
        result = compose(self.releases, self.delta, self.accountant)
        return result.epsilon if result.accountant == self.accountant else float("nan")


def _poisson(z: float, q_num: int, q_den: int, steps: int) -> Release:
    return Release(z=z, q_num=q_num, q_den=q_den, steps=steps, sampling="poisson")


_MIXED = (_poisson(0.8, 25, 500, 30), _poisson(1.0, 50, 500, 20), Release(z=4.0, steps=5))

REFERENCES: tuple[Reference, ...] = (
    Reference(
        "poisson_sgd",
        "TensorFlow Privacy 0.7242234; Opacus 1.6.0",
        "rdp",
        (_poisson(1.3, 150, 60000, 6000),),
        1e-5,
        0.7242234026109339,
        0.7242234026109339,
    ),
    Reference(
        "gaussian",
        "TensorFlow Privacy 13.376; closed form",
        "rdp",
        (Release(z=1.0, steps=5),),
        1e-6,
        13.37637916335795,
        13.37637916335795,
    ),
    Reference(
        "tenth_of_a_school",
        "Opacus 1.6.0; dp-accounting 0.6.0 as upper bound",
        "rdp",
        (_poisson(1.0, 1, 10, 50),),
        1e-5,
        5.88097893218889,
        5.88542727658131,
    ),
    Reference(
        "no_privacy",
        "Opacus 1.6.0; a formula in circulation gives 998",
        "rdp",
        (_poisson(0.1, 32, 1000, 312),),
        1e-5,
        5958.873080952082,
        5958.8730813455695,
    ),
    Reference(
        "mixed_releases",
        "Opacus 1.6.0; dp-accounting 0.6.0 as upper bound",
        "rdp",
        _MIXED,
        1e-4,
        5.147677365246912,
        5.15039890276171,
    ),
    Reference(
        "replace_one",
        "dp-accounting 0.6.0 at half the noise",
        "rdp",
        (Release(z=4.0, steps=10, adjacency="replace_one"),),
        1e-5,
        8.079406222420491,
        8.079406222420491,
    ),
    Reference(
        "fixed_size_cohort",
        "dp-accounting 0.6.0 at half the noise",
        "rdp",
        (Release(z=2.0, q_num=20, q_den=200, steps=40, adjacency="replace_one", sampling="fixed_size"),),
        1e-4,
        7.351222431667319,
        7.351222431667319,
    ),
    Reference(
        "calibrated_pld",
        "dp-accounting noise calibration test, epsilon 1",
        "pld",
        (_poisson(0.67379294682, 1, 100, 1),),
        1e-5,
        1.0,
        1.0,
    ),
    Reference(
        "mixed_releases_pld",
        "dp-accounting 0.6.0",
        "pld",
        _MIXED,
        1e-4,
        4.374260781068398,
        4.374260781068398,
    ),
)
"""Sources: test suites and files of the libraries named, version by version."""
