"""The Gaussian mechanism on a sum of deltas, and on one delta before it leaves a device.

McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", algorithm 1 with the fixed-denominator
estimator: clip every delta to C as a whole, add them, add one draw of standard deviation z C, divide by the number of
learners expected. The number that came is not used: it depends on who took part, and its noise would not be covered.
"""

from __future__ import annotations

from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from aivo_core.privacy import DoubleArray, Float, PrivacyError, check_clip_norm, check_noise_multiplier, clip, gaussian

FloatingArray = npt.NDArray[np.floating[Any]]


class GaussianSumMechanism:
    """Clips each delta once as a whole and covers the sum with one draw; a ``PrivacyMechanism`` of the strategies.

    One object is one release: noise is drawn once and a second draw is refused, since the average of two draws over the
    same sum protects less than what was charged.

    Attributes:
        name: stands in the aggregate.
        clip_norm: C, the most that one learner can move the sum, in L2 norm.
        noise_multiplier: z; the noise on the sum has standard deviation z C in each coordinate.
        denominator: expected number of learners, fixed before anybody is chosen.
    """

    name = "gaussian_sum"

    def __init__(
        self, *, clip_norm: float, noise_multiplier: float, expected_cohort: float, rng: np.random.Generator | None = None
    ) -> None:
        """
        Args:
            clip_norm: C, positive and finite.
            noise_multiplier: z, positive and finite.
            expected_cohort: 1 or more; q times the population under Poisson sampling.
            rng: replaces the secure generator; for tests alone, such noise protects nobody.

        Raises:
            PrivacyError: ``bad_clip_norm``, ``bad_noise_multiplier``, ``bad_denominator``, ``bad_noise``: z C is 0 or infinite.
        """
        check_clip_norm(clip_norm)
        check_noise_multiplier(noise_multiplier)
        check_expected_cohort(expected_cohort)
        self.clip_norm = float(clip_norm)
        self.noise_multiplier = float(noise_multiplier)
        self.denominator = float(expected_cohort)
        if not 0.0 < self.noise_std < float("inf"):
            raise PrivacyError(f"z C must be a positive finite number, not {self.noise_std}", code="bad_noise")
        self._rng = rng
        self._drawn = False

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in each coordinate of the sum."""
        return self.noise_multiplier * self.clip_norm

    @property
    def identity(self) -> tuple[str | float, ...]:
        """What two processes must share for their sums to be parts of one release: name, C, z and the denominator."""
        return self.name, self.clip_norm, self.noise_multiplier, self.denominator

    def clip(self, delta: npt.NDArray[Float]) -> npt.NDArray[Float]:
        """``delta`` with an L2 norm of at most C over all its numbers; see ``aivo_core.privacy.clip``."""
        return clip(delta, self.clip_norm)

    def add_noise(self, total: DoubleArray) -> DoubleArray:
        """``total`` with fresh noise, a new float64 array of the same shape.

        Raises:
            PrivacyError: ``already_drawn``; ``not_finite``, ``wrong_dtype`` or ``wrong_shape`` (not one dimension), which draw
                nothing.
        """
        self._draw(total)
        return total + gaussian(total.shape[0], self.noise_std, rng=self._rng)

    def _draw(self, total: DoubleArray) -> None:
        if self._drawn:
            raise PrivacyError("this mechanism has drawn its noise: another release needs another one", code="already_drawn")
        if total.dtype != np.float64:
            raise PrivacyError(f"the sum must be float64, not {total.dtype}", code="wrong_dtype")
        if total.ndim != 1:
            raise PrivacyError(f"the sum must have one dimension, not shape {total.shape}", code="wrong_shape")
        if not np.isfinite(total).all():
            raise PrivacyError("the sum holds values that are infinite or not a number", code="not_finite")
        self._drawn = True


def privatise_upload(
    delta: npt.NDArray[Float], *, clip_norm: float, noise_multiplier: float, rng: np.random.Generator | None = None
) -> npt.NDArray[Float]:
    """A learner's delta as it may leave the device: clipped as a whole, with noise of standard deviation z C.

    Any delta may stand in for any other, so what leaves differs by up to 2C: the upload is accounted for as replace-one,
    noise multiplier z/2, one release for each upload of the learner.

    Args:
        delta: (d,) float16, float32 or float64, never changed.
        clip_norm: C, positive and finite.
        noise_multiplier: z, positive and finite.
        rng: replaces the secure generator; for tests alone, such noise protects nobody.

    Returns:
        (d,) in the dtype of ``delta``; the noise is added in float64 before rounding.

    Raises:
        PrivacyError: ``bad_clip_norm``, ``bad_noise_multiplier``, ``bad_noise``, ``wrong_shape``, ``wrong_dtype``;
            ``not_finite``: the delta, or the result in its dtype.
    """
    check_noise_multiplier(noise_multiplier)
    bounded = clip(delta, clip_norm)
    if bounded.ndim != 1:
        raise PrivacyError(f"the delta must have one dimension, not shape {bounded.shape}", code="wrong_shape")
    noised = bounded.astype(np.float64) + gaussian(bounded.shape[0], noise_multiplier * clip_norm, rng=rng)
    with np.errstate(over="ignore"):
        upload = noised.astype(bounded.dtype)
    if not np.isfinite(upload).all():
        raise PrivacyError(f"the noised delta is not finite in {bounded.dtype}", code="not_finite")
    return upload


def check_expected_cohort(expected_cohort: float) -> None:
    """Refuse a denominator that would make one learner count for more than one.

    Raises:
        PrivacyError: ``bad_denominator``.
    """
    if not (isfinite(expected_cohort) and expected_cohort >= 1.0):
        raise PrivacyError(
            f"expected cohort must be a finite number of at least 1, not {expected_cohort}", code="bad_denominator"
        )
