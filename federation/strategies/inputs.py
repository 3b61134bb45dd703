"""What every strategy checks of what it is given: deltas, weights, numbers per learner."""

from __future__ import annotations

from math import frexp

import numpy as np
import numpy.typing as npt

from federation.strategies.blocks import DoubleArray, FloatingArray
from federation.strategies.errors import StrategyError, refuse

MAX_WEIGHT = 1e100
"""Largest weight of one learner, and its inverse the smallest total: no sum of products overflows or vanishes."""

MAX_VALUE = 1e150
"""Largest number in a delta; with MAX_WEIGHT, no product and no sum of products overflows."""

DTYPES = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


def as_deltas(deltas: npt.ArrayLike) -> FloatingArray:
    """``deltas`` as an (n, d) array of floats, n at least 1, not copied where it is one already.

    Raises:
        StrategyError: ``wrong_shape``, ``wrong_dtype`` or ``no_contributions``.
    """
    try:
        rows = np.asarray(deltas)
    except ValueError as error:
        raise StrategyError("deltas must all have the same shape", code="wrong_shape") from error
    if rows.size == 0 and (rows.ndim != 2 or rows.shape[0] == 0):
        refuse("no_contributions", "there are no deltas to aggregate")
    if rows.dtype not in DTYPES:
        refuse("wrong_dtype", f"deltas must be float16, float32 or float64, not {rows.dtype}")
    if rows.ndim != 2:
        refuse("wrong_shape", f"deltas must have shape (n, d), not {rows.shape}")
    return rows


def as_numbers(values: npt.ArrayLike, *, name: str, code: str) -> DoubleArray:
    """``values`` as an (n,) float64 array of finite numbers, n at least 1; a new array.

    Raises:
        StrategyError: ``wrong_shape``, ``no_contributions``, or ``code`` for values that are no finite numbers.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise StrategyError(f"{name} must have shape (n,)", code="wrong_shape") from error
    if array.ndim != 1:
        refuse("wrong_shape", f"{name} must have shape (n,), not {array.shape}")
    if array.shape[0] == 0:
        refuse("no_contributions", f"{name} is empty: there is nothing to aggregate")
    if array.dtype.kind not in "iuf":
        refuse(code, f"{name} must be numbers, not {array.dtype}")
    numbers = array.astype(np.float64)
    if not np.isfinite(numbers).all():
        refuse(code, f"{name} must be finite")
    return numbers


def check_delta(delta: npt.ArrayLike, dim: int) -> FloatingArray:
    """``delta`` as a (dim,) array of finite floats, not copied where it is one.

    Raises:
        StrategyError: ``wrong_dtype``, ``wrong_shape``, ``not_finite``.
    """
    values = np.asarray(delta)
    if values.dtype not in DTYPES:
        refuse("wrong_dtype", f"delta must be float16, float32 or float64, not {values.dtype}")
    if values.shape != (dim,):
        refuse("wrong_shape", f"delta must have shape ({dim},), not {values.shape}")
    smallest, largest = float(values.min()), float(values.max())  # two passes without a temporary; NaN is both
    if not (smallest >= -MAX_VALUE and largest <= MAX_VALUE):
        worst = smallest if -smallest > largest else largest
        refuse("not_finite", f"delta must hold finite numbers up to {MAX_VALUE}, not {worst}")
    return values


def one_per_row(weights: DoubleArray, rows: FloatingArray) -> DoubleArray:
    """The weights, if there is one for every row of deltas.

    Raises:
        StrategyError: ``wrong_shape``.
    """
    if weights.shape != (rows.shape[0],):
        refuse("wrong_shape", f"weights must have shape ({rows.shape[0]},), one per delta, not {weights.shape}")
    return weights


def sample_weights(samples: npt.ArrayLike) -> DoubleArray:
    """Samples per learner as weights: (n,) float64, finite, none negative.

    Raises:
        StrategyError: ``bad_weight``, ``wrong_shape`` or ``no_contributions``.
    """
    weights = as_numbers(samples, name="weights", code="bad_weight")
    if weights.min() < 0.0:
        refuse("bad_weight", f"weights must be 0 or more, not {weights.min()}")
    return weights


def in_range(weights: DoubleArray) -> DoubleArray:
    """The weights, scaled by a power of two if the largest is beyond what a fold takes; ratios stay exact.

    Raises:
        StrategyError: all are zero (``zero_weight``).
    """
    largest = float(weights.max())
    if largest == 0.0:
        refuse("zero_weight", f"the weights of all {weights.shape[0]} contributions are 0: nothing can be averaged")
    if 1.0 / MAX_WEIGHT <= largest <= MAX_WEIGHT:
        return weights
    mantissas, exponents = np.frexp(weights)
    return np.asarray(np.ldexp(mantissas, exponents - frexp(largest)[1]), dtype=np.float64)
