"""A clipping norm that follows a quantile of the deltas' norms, paid for out of the same noise.

Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping", algorithm 1. Each learner sends, beside its
clipped delta, the bit "my norm was at most C" less one half; the bits' noisy mean moves C:

    C <- C exp(-eta (b - gamma))

The centred bit moves its sum by at most 1/2 and the delta by at most C, so both releases together are one Gaussian
release of noise multiplier z where z^-2 = z_delta^-2 + (2 sigma_b)^-2. The noise of a round is scaled by the C that the
round was clipped with, never by the one that follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, isfinite, log

import numpy as np
import numpy.typing as npt

from aivo_core.privacy import (
    DoubleArray,
    Float,
    PrivacyError,
    check_clip_norm,
    check_noise_multiplier,
    clip,
    gaussian,
    global_norm,
)
from aivo_core.privacy_mechanisms import FloatingArray, GaussianSumMechanism, check_expected_cohort

COUNT_NOISE_SHARE = 1.0 / 20.0
"""Published default of sigma_b, in expected learners."""


@dataclass(frozen=True, slots=True)
class NormAdaptation:
    """How the clipping norm moves from round to round.

    Attributes:
        quantile: gamma, the share of learners whose delta should stay as it is, in [0, 1].
        learning_rate: eta, positive; the published value is 0.2.
        lowest, highest: bounds of C, fixed in advance; within them noise in the bit cannot carry C to 0 or infinity.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    lowest: float = 1e-6
    highest: float = 1e6

    def __post_init__(self) -> None:
        if not 0.0 <= self.quantile <= 1.0:
            raise PrivacyError(f"quantile must lie in [0, 1], not {self.quantile}", code="bad_adaptation")
        if not 0.0 < self.learning_rate < float("inf"):
            raise PrivacyError(f"learning rate must be a positive finite number, not {self.learning_rate}", code="bad_adaptation")
        if not 0.0 < self.lowest <= self.highest < float("inf"):
            raise PrivacyError(
                f"bounds of the clipping norm must be positive, finite and in order, not {self.lowest} and {self.highest}",
                code="bad_adaptation",
            )

    def next_norm(self, clip_norm: float, unclipped: float) -> float:
        """The next round's C.

        Args:
            clip_norm: the C that the round was clipped with.
            unclipped: b, the noisy share of learners whose norm was at most C; noise may carry it out of [0, 1].

        Raises:
            PrivacyError: ``bad_clip_norm``, ``not_finite``.
        """
        check_clip_norm(clip_norm)
        if not isfinite(unclipped):
            raise PrivacyError(f"share of unclipped learners must be finite, not {unclipped}", code="not_finite")
        # In the exponent, so that a share far out cannot overflow before the bounds apply.
        moved = log(clip_norm) - self.learning_rate * (unclipped - self.quantile)
        if moved <= log(self.lowest):
            return self.lowest
        if moved >= log(self.highest):
            return self.highest
        return min(max(clip_norm * exp(-self.learning_rate * (unclipped - self.quantile)), self.lowest), self.highest)


def noise_for_deltas(noise_multiplier: float, count_noise: float) -> float:
    """z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2): what is left for the deltas so that both releases cost z.

    Args:
        noise_multiplier: z of both together, positive.
        count_noise: sigma_b, standard deviation of the noise on the sum of the bits; above z/2.

    Raises:
        PrivacyError: ``bad_noise_multiplier``; ``bad_count_noise``: the bits alone would cost more than z.
    """
    check_noise_multiplier(noise_multiplier)
    if not (isfinite(count_noise) and 2.0 * count_noise > noise_multiplier):
        raise PrivacyError(
            f"noise on the count must exceed half the noise multiplier, {noise_multiplier / 2.0}, not {count_noise}",
            code="bad_count_noise",
        )
    return float(
        noise_multiplier
        / np.sqrt((1.0 - noise_multiplier / (2.0 * count_noise)) * (1.0 + noise_multiplier / (2.0 * count_noise)))
    )


class AdaptiveGaussianSumMechanism(GaussianSumMechanism):
    """The Gaussian mechanism on deltas with one slot more, which carries the centred bit through the same sum.

    The fold runs over (d + 1,) vectors: ``extend`` makes one of a delta, ``split`` takes the aggregate apart. The bit is
    thus summed, sharded, masked and noised like every other coordinate, and nothing counts learners on the side.

    Attributes:
        noise_multiplier: z of deltas and bits together: what is accounted for.
        delta_noise_multiplier: z_delta, the part that the deltas get.
        count_noise: sigma_b, on the sum of the bits.
    """

    name = "adaptive_gaussian_sum"

    def __init__(
        self,
        *,
        clip_norm: float,
        noise_multiplier: float,
        expected_cohort: float,
        count_noise: float | None = None,
        rng: np.random.Generator | None = None,
    ) -> None:
        """
        Args:
            count_noise: sigma_b; a twentieth of the expected cohort where not given.

        Raises:
            PrivacyError: as ``GaussianSumMechanism`` and ``noise_for_deltas``.
        """
        check_expected_cohort(expected_cohort)
        self.count_noise = float(COUNT_NOISE_SHARE * expected_cohort if count_noise is None else count_noise)
        self.delta_noise_multiplier = noise_for_deltas(noise_multiplier, self.count_noise)
        super().__init__(clip_norm=clip_norm, noise_multiplier=noise_multiplier, expected_cohort=expected_cohort, rng=rng)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in each coordinate of the deltas' sum."""
        return self.delta_noise_multiplier * self.clip_norm

    @property
    def identity(self) -> tuple[str | float, ...]:
        """As ``GaussianSumMechanism.identity``, and the noise on the count."""
        return *super().identity, self.count_noise

    def extend(self, delta: npt.NDArray[Float]) -> npt.NDArray[Float]:
        """(d,) -> (d + 1,): the delta with an empty slot, as the fold takes it."""
        return np.append(delta, np.zeros(1, delta.dtype))

    def clip(self, delta: npt.NDArray[Float]) -> npt.NDArray[Float]:
        """(d + 1,) with an empty slot -> the clipped delta and its centred bit.

        Raises:
            PrivacyError: ``wrong_shape``: no slot, or one that is taken; else as ``aivo_core.privacy.clip``.
        """
        if delta.ndim != 1 or delta.shape[0] < 1 or delta[-1] != 0.0:
            raise PrivacyError("the delta must end in an empty slot for its bit", code="wrong_shape")
        unclipped = global_norm(delta[:-1]) <= self.clip_norm
        return np.append(clip(delta[:-1], self.clip_norm), np.array([0.5 if unclipped else -0.5], delta.dtype))

    def add_noise(self, total: DoubleArray) -> DoubleArray:
        """The sum of deltas and bits with fresh noise, z_delta C and sigma_b; errors as ``GaussianSumMechanism.add_noise``."""
        self._draw(total)
        noise = gaussian(total.shape[0], 1.0, rng=self._rng)
        noise[:-1] *= self.noise_std
        noise[-1] *= self.count_noise
        return total + noise

    def split(self, vector: FloatingArray) -> tuple[FloatingArray, float]:
        """The fold's result as the update (d,) and the noisy share b of learners whose delta was left as it was.

        Raises:
            PrivacyError: ``wrong_shape``.
        """
        if vector.ndim != 1 or vector.shape[0] < 1:
            raise PrivacyError(f"the aggregate must have shape (d + 1,), not {vector.shape}", code="wrong_shape")
        return vector[:-1].copy(), float(vector[-1]) + 0.5
