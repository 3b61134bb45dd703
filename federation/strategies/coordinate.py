"""Rules that treat each coordinate by itself and need that coordinate of every delta: the second shape of a strategy.

The coordinates are done in blocks, each read from every delta, sorted over the learners, and reduced to one number per
coordinate. Sorting makes the result independent of the order of the deltas, to the bit, and of the machine: a selection
algorithm leaves the values between its pivots in an order of its own, and a sum depends on the order.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from federation.strategies.base import Aggregate, DeltaSource, Strategy
from federation.strategies.blocks import DoubleArray, FloatingArray
from federation.strategies.errors import StrategyError, refuse
from federation.strategies.inputs import as_deltas, check_delta, in_range, one_per_row, sample_weights

BLOCK_BYTES = 32 * 1024 * 1024
"""Memory for the coordinates in work, of all threads together; the result does not depend on it."""

_GATHERED = 64
"""Deltas that are turned from rows to columns at a time: each row is read in one piece, each column written in one."""

Progress = Callable[[int, int], None]


class CoordinateStrategy(Strategy):
    """A rule on the sorted values of one coordinate; weights are checked and ignored."""

    @abstractmethod
    def reduce_sorted(self, ordered: FloatingArray, parameters: Mapping[str, float]) -> DoubleArray:
        """One number per coordinate.

        Args:
            ordered: (k, n) k coordinates of n deltas, each row ascending, finite.
            parameters: all of the strategy's, checked.

        Returns:
            (k,) float64.
        """

    @abstractmethod
    def kept(self, count: int, parameters: Mapping[str, float]) -> int:
        """Of how many of ``count`` values the result of a coordinate is the mean."""

    def weigh(
        self, samples: npt.ArrayLike, *, quality: npt.ArrayLike | None = None, parameters: Mapping[str, Any] | None = None
    ) -> DoubleArray:
        """1 for every learner, once the samples are numbers that could weigh; see ``Strategy.weigh``."""
        self.check_parameters(parameters)
        if quality is not None:
            refuse("unknown_parameter", f"strategy {self.info.name} takes no quality")
        return np.ones_like(in_range(sample_weights(samples)))

    def aggregate(self, deltas: npt.ArrayLike, weights: npt.ArrayLike, **parameters: Any) -> FloatingArray:
        """See ``Strategy.aggregate``."""
        rows = as_deltas(deltas)
        one_per_row(self.weigh(weights, parameters=parameters), rows)
        if rows.shape[1] < 1:
            refuse("wrong_shape", "deltas must have at least one number, not 0")
        for row, delta in enumerate(rows):
            try:
                check_delta(delta, rows.shape[1])
            except StrategyError as error:
                raise StrategyError(f"contribution {row}: {error}", code=error.code) from error
        return self.combine(ArrayRows(rows), parameters=parameters).vector

    def combine(
        self,
        source: DeltaSource,
        *,
        parameters: Mapping[str, Any] | None = None,
        threads: int = 1,
        block_bytes: int = BLOCK_BYTES,
        progress: Progress | None = None,
    ) -> Aggregate:
        """One update from all deltas of ``source``; memory is bounded by ``block_bytes``, not by their number.

        Args:
            threads: blocks in work at a time, in threads; NumPy sorts without the interpreter's lock.
            progress: called with coordinates done and all of them.

        Raises:
            StrategyError: bad parameters, no deltas, or numbers that are not finite.
            Exception: what ``source.read`` raises.
        """
        checked = self.check_parameters(parameters)
        if source.count < 1:
            refuse("no_contributions", "there are no contributions to aggregate")
        width = block_width(source, block_bytes // threads)
        vector = np.empty(source.dim, dtype=source.dtype)
        starts = range(0, source.dim, width)

        own = threading.local()

        def reduce(start: int) -> int:
            stop = min(start + width, source.dim)
            if not hasattr(own, "columns"):  # once per thread: memory that is given back is not always taken again
                own.columns = np.empty((width, source.count), dtype=source.dtype)
            columns = own.columns[: stop - start]
            _fill_sorted(columns, source, start, stop)
            with np.errstate(over="ignore"):
                vector[start:stop] = self.reduce_sorted(columns, checked) + 0.0  # -0 becomes 0
            return stop - start

        done = 0
        with ThreadPoolExecutor(threads) as pool:
            try:
                for width_done in pool.map(reduce, starts):
                    done += width_done
                    if progress is not None:
                        progress(done, source.dim)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if not np.isfinite(vector).all():
            refuse("not_finite", f"the aggregate is not finite in {source.dtype}")
        return Aggregate(
            vector=vector,
            denominator=float(self.kept(source.count, checked)),
            weight=float(source.count),
            count=source.count,
            strategy=self.info.name,
        )


class ArrayRows:
    """The rows of an (n, d) array as a ``DeltaSource``."""

    def __init__(self, rows: FloatingArray) -> None:
        self._rows = rows
        self.count: int = rows.shape[0]
        self.dim: int = rows.shape[1]
        self.dtype: np.dtype[Any] = rows.dtype

    def read(self, row: int, start: int, stop: int) -> FloatingArray:
        return self._rows[row, start:stop]


def block_width(source: DeltaSource, most_bytes: int) -> int:
    """Coordinates of a block that takes at most ``most_bytes``, at least 1."""
    return min(source.dim, max(1, most_bytes // (source.dtype.itemsize * (source.count + _GATHERED))))


def _fill_sorted(columns: FloatingArray, source: DeltaSource, start: int, stop: int) -> None:
    """Fill (stop - start, n) ``columns`` with the coordinates, each ascending over the learners."""
    rows = np.empty((_GATHERED, stop - start), dtype=source.dtype)
    for first in range(0, source.count, _GATHERED):
        last = min(first + _GATHERED, source.count)
        for row in range(first, last):
            rows[row - first] = source.read(row, start, stop)
        columns[:, first:last] = rows[: last - first].T
    columns.sort(axis=1)
