"""Clipping and Gaussian noise: the two halves of the Gaussian mechanism, without any accounting.

One L2 norm over everything that is released together, never one per tensor: with clipping per tensor, L tensors would
have sensitivity sqrt(L) C (McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", section 3).

Limits of floating-point noise. The Gaussian mechanism is defined over the real numbers. Noise in float64 has gaps and
ends at 9.49 standard deviations here (a real Gaussian goes beyond with probability 2e-21 per number), and the set of
sums ``value + noise`` that can occur depends, in the last bits, on ``value`` (Mironov 2012, "On significance of the
least significant bits for differential privacy"). Adding in float64 and releasing the result rounded to float32 hides
most of these bits; it is no proof. The guarantee computed by an accountant is therefore that of the ideal mechanism.
"""

from __future__ import annotations

import os
from math import frexp, isfinite, ldexp, pi
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Float = TypeVar("Float", bound=np.floating[Any])
DoubleArray = npt.NDArray[np.float64]

_DTYPES = (np.float16, np.float32, np.float64)


class PrivacyError(ValueError):
    """An input that clipping, noise, a mechanism or the choice of a cohort refuses.

    ``code`` is stable: ``not_finite``, ``wrong_dtype``, ``wrong_shape``, ``bad_clip_norm``, ``bad_noise``,
    ``bad_noise_multiplier``, ``bad_denominator``, ``bad_count_noise``, ``bad_adaptation``, ``bad_rate``, ``bad_cohort``,
    ``already_drawn``.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


def global_norm(vector: npt.NDArray[Float]) -> float:
    """The L2 norm over all numbers of ``vector``, computed in float64; no square overflows or vanishes.

    Infinite only where the norm itself is beyond float64.
    The relative error is below 1e-14 for up to 10^7 numbers. The value is the same whatever the number of threads.

    Args:
        vector: any shape; float16, float32 or float64.

    Raises:
        PrivacyError: NaN or infinity (``not_finite``), another dtype (``wrong_dtype``).
    """
    unit, length = _unit_and_length(_checked(vector))
    return unit * length


def clip(vector: npt.NDArray[Float], c: float) -> npt.NDArray[Float]:
    """``vector`` scaled by min(1, c / norm), a new array of the same shape and dtype (Abadi et al. 2016, algorithm 1).

    ``global_norm`` of the result is at most ``c``, also after the rounding to the dtype; the zero vector stays zero.
    The input is never changed.

    Args:
        vector: any shape; float16, float32 or float64; one norm over all its numbers.
        c: clipping norm C, positive and finite.

    Raises:
        PrivacyError: NaN or infinity in the vector (``not_finite``), another dtype (``wrong_dtype``), a clipping norm
            that is not a positive finite number (``bad_clip_norm``).
    """
    check_clip_norm(c)
    values = _checked(vector)
    unit, length = _unit_and_length(values)
    if unit * length <= c:
        return values.copy()
    direction = values.astype(np.float64) / unit
    scale = c / length
    shrink = float(np.finfo(values.dtype).eps)
    while True:
        clipped = (direction * scale).astype(values.dtype)
        if _norm_at_most(clipped, c):
            return clipped
        # Rounding to the dtype went up: a slightly smaller scale, growing steps so that even a C below the dtype's
        # smallest number ends, at zero.
        scale *= 1.0 - shrink
        shrink = min(2.0 * shrink, 0.5)


def gaussian(size: int, std: float, *, rng: np.random.Generator | None = None) -> DoubleArray:
    """``size`` independent draws from N(0, std^2), float64 of shape (size,).

    The draws come from the operating system's cryptographically secure generator through the Box-Muller transform
    (Box and Muller 1958), with 64 bits for the radius and 53 for the angle. The module's docstring states the limits.

    Args:
        size: how many, 0 or more.
        std: standard deviation, positive and finite.
        rng: replaces the secure generator; for tests alone, such noise protects nobody.

    Raises:
        PrivacyError: ``bad_noise``.
    """
    if size < 0:
        raise PrivacyError(f"size of the noise must be 0 or more, not {size}", code="bad_noise")
    if not (isfinite(std) and std > 0.0):
        raise PrivacyError(f"standard deviation of the noise must be a positive finite number, not {std}", code="bad_noise")
    standard = _secure_standard_normal(size) if rng is None else rng.standard_normal(size)
    return standard * std


def check_clip_norm(c: float) -> None:
    """Refuse a clipping norm that bounds nothing.

    Raises:
        PrivacyError: ``bad_clip_norm``.
    """
    if not 0.0 < c < float("inf"):
        raise PrivacyError(f"clipping norm must be a positive finite number, not {c}", code="bad_clip_norm")


def check_noise_multiplier(z: float) -> None:
    """Refuse a noise multiplier with which nothing is private.

    Raises:
        PrivacyError: ``bad_noise_multiplier``.
    """
    if not 0.0 < z < float("inf"):
        raise PrivacyError(f"noise multiplier z must be a positive finite number, not {z}", code="bad_noise_multiplier")


def _checked(vector: npt.NDArray[Float]) -> npt.NDArray[Float]:
    values = np.asarray(vector)
    if values.dtype not in _DTYPES:
        raise PrivacyError(f"vector must be float16, float32 or float64, not {values.dtype}", code="wrong_dtype")
    if not np.isfinite(values).all():
        raise PrivacyError("vector holds values that are infinite or not a number", code="not_finite")
    return values


def _unit_and_length(values: npt.NDArray[Float]) -> tuple[float, float]:
    """A power of two and the norm in that unit: dividing by it is exact, and squares stay in range."""
    if values.dtype != np.float64:  # squares of narrower floats stay in range as they are
        return 1.0, float(np.sqrt(np.sum(np.square(values, dtype=np.float64))))
    largest = float(np.max(np.abs(values), initial=0.0))
    if largest == 0.0:
        return 1.0, 0.0
    unit = ldexp(1.0, frexp(largest)[1] - 1)
    # A pairwise sum and not a dot product: BLAS may order its sum by the number of threads.
    length = float(np.sqrt(np.sum(np.square(values / unit))))
    return unit, length


def _norm_at_most(values: npt.NDArray[Float], c: float) -> bool:
    unit, length = _unit_and_length(values)
    return unit * length <= c


def _secure_standard_normal(size: int) -> DoubleArray:
    pairs = (size + 1) // 2
    bits = np.frombuffer(os.urandom(16 * pairs), dtype=np.uint64).reshape(2, pairs)
    uniform = (bits[0].astype(np.float64) + 0.5) * 2.0**-64
    radius = np.sqrt(-2.0 * np.log(uniform))
    angle = (bits[1] >> np.uint64(11)).astype(np.float64) * (2.0 * pi * 2.0**-53)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
