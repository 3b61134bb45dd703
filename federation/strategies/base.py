"""What every aggregation strategy is: its description, its weights, and one of two shapes.

A strategy turns the deltas of one round into one update. ``weigh`` looks at numbers per learner only and runs first.
Then, by its shape:

- a ``FoldStrategy`` takes one delta after the other, ordered by subject key, into a fold. Two slots are part of every fold:
  a privacy mechanism, applied to each delta and to the finished sum, and sums made elsewhere of deltas nobody here sees.
- a ``CoordinateStrategy`` (``federation.strategies.coordinate``) needs all deltas at once, but each coordinate by itself,
  and asks a ``DeltaSource`` for some coordinates of every delta at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt

from federation.strategies.blocks import BlockSum, DoubleArray, FloatingArray, SumSource
from federation.strategies.errors import StrategyError, refuse
from federation.strategies.inputs import as_deltas, one_per_row


@dataclass(frozen=True, slots=True)
class Parameter:
    """One number that a policy may set for a strategy, allowed in [low, high]."""

    name: str
    default: float
    low: float
    high: float
    meaning: str
    whole: bool = False


@dataclass(frozen=True, slots=True)
class StrategyInfo:
    """What an operator should know before choosing a strategy.

    Attributes:
        name: as stored in policies and rounds.
        source: where the rule is published.
        breakdown_point: share of learners that can send anything and still not move the result without bound.
        minimum_cohort: fewest learners with which the rule is defined.
        privacy_compatible: whether the rule has bounded sensitivity with uniform weights and a fixed denominator.
        memory: what a fold holds, in words.
        weight: what a learner's weight is, in words.
        uses_quality: whether ``weigh`` takes measured quality.
    """

    name: str
    source: str
    breakdown_point: float
    minimum_cohort: int
    privacy_compatible: bool
    memory: str
    weight: str
    uses_quality: bool = False
    parameters: tuple[Parameter, ...] = ()


@dataclass(frozen=True, eq=False)
class Aggregate:
    """One round's update.

    Attributes:
        vector: (d,) in the dtype the fold was started with.
        denominator: what the sum was divided by: the total weight, a privacy mechanism's fixed number, or for a rule on
            coordinates how many values the mean of each one is of.
        weight: total weight of the contributions.
        count: contributions in it.
        mechanism: name of the privacy mechanism that was applied, empty without one.
    """

    vector: FloatingArray
    denominator: float
    weight: float
    count: int
    strategy: str
    mechanism: str = ""


class PrivacyMechanism(Protocol):
    """What bounds each learner's influence and covers it with noise. Under it every weight is 1."""

    @property
    def name(self) -> str:
        """Stands in the aggregate."""
        ...

    @property
    def denominator(self) -> float:
        """Fixed before anything is seen: the expected number of learners."""
        ...

    @property
    def identity(self) -> tuple[str | float, ...]:
        """Name, bounds, noise and denominator: only sums of mechanisms with equal identities are parts of one release."""
        ...

    def clip(self, delta: FloatingArray) -> FloatingArray:
        """A new array of the same shape whose L2 norm is bounded."""
        ...

    def add_noise(self, total: DoubleArray) -> DoubleArray:
        """A new array: the sum of the clipped deltas with noise. Called once per fold, also when nobody contributed."""
        ...


class DeltaSource(Protocol):
    """All deltas of one round, ordered by subject key, for rules that look at a few coordinates of each at a time."""

    @property
    def count(self) -> int:
        """Number of deltas, at least 1."""
        ...

    @property
    def dim(self) -> int:
        """Numbers in a delta."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """float16, float32 or float64: that of the deltas and of the result."""
        ...

    def read(self, row: int, start: int, stop: int) -> FloatingArray:
        """Coordinates ``start`` to ``stop`` of delta ``row``: (stop - start,), finite; called from several threads at once."""
        ...


class Fold(Protocol):
    """Contributions of one round, one after the other, ordered by subject key."""

    def add(self, delta: FloatingArray, weight: float) -> None:
        """Add one learner's (d,) delta.

        Raises:
            StrategyError: the contribution is refused and has left no trace.
        """
        ...

    def add_blocks(self, blocks: Iterable[BlockSum]) -> None:
        """Add what another fold's ``parts`` gave; within or after the learners added here, by block index."""
        ...

    def add_sums(self, source: SumSource) -> None:
        """Add sums whose summands are not seen (masked sums); any clipping happened where they were made."""
        ...

    def merge(self, other: Self) -> None:
        """Take over everything of ``other``, a fold of the same strategy over other blocks; it cannot be used again."""
        ...

    def parts(self) -> Iterator[BlockSum]:
        """Hand over the partial sums, for a process that merges; this fold cannot be used again.

        They carry no noise: as secret as the deltas in them.
        """
        ...

    def finish(self) -> Aggregate:
        """The round's update; once only, since a second call would draw the mechanism's noise a second time."""
        ...


class Strategy(ABC):
    """One aggregation rule; stateless, shared by everyone."""

    info: ClassVar[StrategyInfo]

    @abstractmethod
    def weigh(
        self, samples: npt.ArrayLike, *, quality: npt.ArrayLike | None = None, parameters: Mapping[str, Any] | None = None
    ) -> DoubleArray:
        """The weights to add the learners' deltas with.

        Args:
            samples: (n,) samples each learner trained on, 0 or more.
            quality: (n,) measured quality in [0, 1], for the strategies that use it.

        Returns:
            (n,) float64; only ratios matter.

        Raises:
            StrategyError: nothing to weigh, shapes that differ, values outside their range.
        """

    @abstractmethod
    def aggregate(self, deltas: npt.ArrayLike, weights: npt.ArrayLike, **parameters: Any) -> FloatingArray:
        """One update from all deltas at once; the same arithmetic as when they are read one by one.

        Args:
            deltas: (n, d) float16, float32 or float64, row order as given; never changed.
            weights: (n,) samples each learner trained on.
            parameters: those of ``info.parameters``, and ``quality`` where the strategy uses it.

        Returns:
            (d,) in the dtype of ``deltas``.

        Raises:
            StrategyError: anything that does not fit; nothing is broadcast.
        """

    def check_parameters(self, parameters: Mapping[str, Any] | None) -> dict[str, float]:
        """All parameters of the strategy, those not given at their defaults.

        Raises:
            StrategyError: a name that is unknown, a value that is no number in its range.
        """
        given = dict(parameters or {})
        known = {parameter.name: parameter for parameter in self.info.parameters}
        unknown = sorted(given.keys() - known.keys())
        if unknown:
            allowed = ", ".join(known) or "none"
            refuse("unknown_parameter", f"strategy {self.info.name} has no parameter {', '.join(unknown)}; allowed: {allowed}")
        return {name: _checked_parameter(known[name], given.get(name, known[name].default)) for name in known}


class FoldStrategy(Strategy):
    """A rule that needs each delta once, by itself."""

    @abstractmethod
    def start(
        self,
        dim: int,
        *,
        dtype: npt.DTypeLike = np.float32,
        first_block: int = 0,
        mechanism: PrivacyMechanism | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> Fold:
        """Begin a fold over (dim,) deltas whose result has ``dtype``.

        Args:
            first_block: block of the first learner added; a shard begins where its blocks begin.
            mechanism: makes every weight 1 and the denominator fixed.

        Raises:
            StrategyError: unknown or bad parameters, a mechanism with a strategy that is not made for one.
        """

    def aggregate(self, deltas: npt.ArrayLike, weights: npt.ArrayLike, **parameters: Any) -> FloatingArray:
        """See ``Strategy.aggregate``."""
        rows = as_deltas(deltas)
        quality = parameters.pop("quality", None) if self.info.uses_quality else None
        effective = one_per_row(self.weigh(weights, quality=quality, parameters=parameters), rows)
        fold = self.start(rows.shape[1], dtype=rows.dtype, parameters=parameters)
        for row, weight in enumerate(effective):
            try:
                fold.add(rows[row], float(weight))
            except StrategyError as error:
                raise StrategyError(f"contribution {row}: {error}", code=error.code) from error
        return fold.finish().vector


def _checked_parameter(parameter: Parameter, value: Any) -> float:
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not is_number or not isfinite(value) or not parameter.low <= value <= parameter.high:
        refuse("bad_parameter", f"{parameter.name} must be a number from {parameter.low} to {parameter.high}, not {value!r}")
    if parameter.whole and value != int(value):
        refuse("bad_parameter", f"{parameter.name} must be a whole number, not {value!r}")
    return float(value)
