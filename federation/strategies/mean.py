"""The weighted mean and its three weights: FedAvg, FedProx, and samples times measured quality with a cap.

    update = sum of w_i delta_i / sum of w_i

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", algorithm 1. FedProx
(Li et al. 2020, "Federated Optimization in Heterogeneous Networks", algorithm 2) aggregates in the same way here; its
proximal term acts in local training. Under a privacy mechanism the sum of clipped deltas, each with weight 1, is noised
once and divided by a fixed number (McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from federation.strategies.base import Aggregate, Fold, FoldStrategy, Parameter, PrivacyMechanism, StrategyInfo
from federation.strategies.blocks import BLOCK_SIZE, BlockSum, DoubleArray, FloatingArray, OpenBlock, OrderedSum, SumSource
from federation.strategies.errors import refuse
from federation.strategies.inputs import DTYPES, MAX_WEIGHT, as_numbers, check_delta, in_range, sample_weights

DEFAULT_WEIGHT_CAP = 0.1

_MEMORY = "constant in the number of learners: the sum, the open block and one weighted delta, 8 bytes a number each"
_FEDAVG_SOURCE = "McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data"


class MeanFold:
    """The streaming weighted mean; see ``federation.strategies.base.Fold`` for the methods and errors."""

    def __init__(
        self, *, dim: int, dtype: npt.DTypeLike, first_block: int, mechanism: PrivacyMechanism | None, strategy: str
    ) -> None:
        self._dtype = np.dtype(dtype)
        if dim < 1:
            refuse("wrong_shape", f"deltas must have at least one number, not {dim}")
        if self._dtype not in DTYPES:
            refuse("wrong_dtype", f"the result must be float16, float32 or float64, not {self._dtype}")
        if first_block < 0:
            refuse("bad_blocks", f"first_block must be 0 or more, not {first_block}")
        if mechanism is not None and not 0.0 < mechanism.denominator < MAX_WEIGHT:
            refuse("not_private", f"the mechanism's denominator must be positive, not {mechanism.denominator}")
        self._dim = dim
        self._mechanism = mechanism
        self._strategy = strategy
        self._next_block = first_block
        self._open: OpenBlock | None = None
        self._sum = OrderedSum(dim)
        self._scratch = np.empty(dim, dtype=np.float64)
        self._closed = False

    def add(self, delta: FloatingArray, weight: float) -> None:
        self._check_usable()
        self._check_weight(weight)
        bounded = check_delta(delta, self._dim)
        if self._mechanism is not None:
            bounded = check_delta(self._mechanism.clip(bounded), self._dim)
        if self._open is None:
            if self._sum.holds(self._next_block):
                refuse("bad_blocks", f"block {self._next_block} is there already: learners are added before later blocks are")
            self._open = OpenBlock(self._next_block, self._dim)
        self._open.add(bounded, weight, scratch=self._scratch)
        if self._open.count == BLOCK_SIZE:
            self._close_block()

    def add_blocks(self, blocks: Iterable[BlockSum]) -> None:
        self._check_usable()
        self._close_block()
        for block in blocks:
            if self._mechanism is not None and block.weight != block.count:
                refuse("not_private", "under a privacy mechanism every learner's weight must be 1")
            self._sum.add(block)

    def add_sums(self, source: SumSource) -> None:
        self.add_blocks(replace(block, pre_summed=True) for block in source.blocks())

    def merge(self, other: Self) -> None:
        self._check_usable()
        if other is self or other._description() != self._description():
            refuse("bad_blocks", "only two folds of the same strategy, shape, dtype and mechanism can be merged")
        self.add_blocks(other.parts())

    def parts(self) -> Iterator[BlockSum]:
        self._check_usable()
        self._close_block()
        self._closed = True
        return self._sum.parts()

    def finish(self) -> Aggregate:
        self._check_usable()
        self._close_block()
        total = self._sum.total()
        return self._weighted_mean(total) if self._mechanism is None else self._private_mean(total, self._mechanism)

    def _weighted_mean(self, total: BlockSum | None) -> Aggregate:
        if total is None:
            refuse("no_contributions", "there are no contributions to aggregate")
        if total.weight < 1.0 / MAX_WEIGHT:
            refuse(
                "zero_weight", f"the weights of all {total.count} contributions add up to {total.weight}: nothing can be averaged"
            )
        self._closed = True
        return self._result(total.vector, total.weight, total.weight, total.count)

    def _private_mean(self, total: BlockSum | None, mechanism: PrivacyMechanism) -> Aggregate:
        self._closed = True
        count = 0 if total is None else total.count
        exact = np.zeros(self._dim) if total is None else total.vector
        noised = mechanism.add_noise(exact)
        if noised.shape != (self._dim,):
            refuse("wrong_shape", f"the mechanism's result must have shape ({self._dim},), not {noised.shape}")
        return self._result(noised, mechanism.denominator, float(count), count)

    def _result(self, total: DoubleArray, denominator: float, weight: float, count: int) -> Aggregate:
        with np.errstate(over="ignore"):
            vector = (total / denominator).astype(self._dtype)
        if not np.isfinite(vector).all():
            refuse("not_finite", f"the aggregate is not finite in {self._dtype}")
        mechanism = "" if self._mechanism is None else self._mechanism.name
        return Aggregate(
            vector=vector, denominator=denominator, weight=weight, count=count, strategy=self._strategy, mechanism=mechanism
        )

    def _check_weight(self, weight: float) -> None:
        if not 0.0 <= weight <= MAX_WEIGHT:
            refuse("bad_weight", f"weight must be a finite number from 0 to {MAX_WEIGHT}, not {weight}")
        if self._mechanism is not None and weight != 1.0:
            refuse("not_private", f"under a privacy mechanism every learner's weight must be 1, not {weight}")

    def _check_usable(self) -> None:
        if self._closed:
            refuse("finished", "this fold is finished or handed over: nothing can be added or released again")

    def _close_block(self) -> None:
        if self._open is None:
            return
        self._sum.add(self._open.close())
        self._next_block = self._open.index + 1
        self._open = None

    def _description(self) -> tuple[object, ...]:
        mechanism = None if self._mechanism is None else self._mechanism.identity
        return self._strategy, self._dim, self._dtype, mechanism


class WeightedMean(FoldStrategy):
    """A strategy of this family; subclasses say what a weight is."""

    def start(
        self,
        dim: int,
        *,
        dtype: npt.DTypeLike = np.float32,
        first_block: int = 0,
        mechanism: PrivacyMechanism | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> Fold:
        self.check_parameters(parameters)
        if mechanism is not None and not self.info.privacy_compatible:
            refuse("not_private", f"strategy {self.info.name} cannot be combined with a privacy mechanism")
        return MeanFold(dim=dim, dtype=dtype, first_block=first_block, mechanism=mechanism, strategy=self.info.name)


class FedAvg(WeightedMean):
    """Weight = samples trained on."""

    info = StrategyInfo(
        name="fedavg",
        source=_FEDAVG_SOURCE,
        breakdown_point=0.0,
        minimum_cohort=1,
        privacy_compatible=True,
        memory=_MEMORY,
        weight="samples trained on",
    )

    def weigh(
        self, samples: npt.ArrayLike, *, quality: npt.ArrayLike | None = None, parameters: Mapping[str, Any] | None = None
    ) -> DoubleArray:
        self.check_parameters(parameters)
        if quality is not None:
            refuse("unknown_parameter", f"strategy {self.info.name} takes no quality")
        return in_range(sample_weights(samples))


class FedProx(FedAvg):
    """The weights of FedAvg; mu acts in local training."""

    info = replace(
        FedAvg.info, name="fedprox", source="Li et al. 2020, Federated Optimization in Heterogeneous Networks; weights of FedAvg"
    )


class Weighted(WeightedMean):
    """Weight = samples x measured quality, each learner's share of the total capped."""

    info = StrategyInfo(
        name="weighted",
        source=f"{_FEDAVG_SOURCE}; samples scaled by measured quality, shares capped",
        breakdown_point=0.0,
        minimum_cohort=1,
        privacy_compatible=False,
        memory=_MEMORY,
        weight="samples trained on times measured quality, share capped",
        uses_quality=True,
        parameters=(
            Parameter(
                name="weight_cap",
                default=DEFAULT_WEIGHT_CAP,
                low=0.001,
                high=1.0,
                meaning="largest share of the total weight that one learner may have; below 1/n all n learners weigh the same",
            ),
        ),
    )

    def weigh(
        self, samples: npt.ArrayLike, *, quality: npt.ArrayLike | None = None, parameters: Mapping[str, Any] | None = None
    ) -> DoubleArray:
        """See ``Strategy.weigh``; without ``quality`` nothing was measured and the samples alone weigh."""
        cap = self.check_parameters(parameters)["weight_cap"]
        weights = sample_weights(samples)
        if quality is not None:
            measured = as_numbers(quality, name="quality", code="bad_quality")
            if measured.shape != weights.shape:
                refuse("wrong_shape", f"quality must have shape {weights.shape}, one per learner, not {measured.shape}")
            if measured.min() < 0.0 or measured.max() > 1.0:
                refuse("bad_quality", "quality must lie in [0, 1]")
            weights *= measured
        return in_range(cap_shares(in_range(weights), cap))


def cap_shares(weights: DoubleArray, cap: float) -> DoubleArray:
    """``min(weight, t)`` with the largest t at which nobody's share of the total exceeds ``cap``.

    With k learners at the cap, t = cap x (sum of the others) / (1 - k cap). With fewer than 1/cap learners of positive
    weight no such t exists: they all weigh the same, which is as near to the cap as shares can come.

    Args:
        weights: (n,) float64, 0 or more, not all zero.
        cap: in (0, 1].

    Returns:
        (n,) float64; independent of the order of the learners.
    """
    descending = np.sort(weights[weights > 0.0])[::-1]
    below = np.append(np.cumsum(descending[::-1])[::-1], 0.0)
    for capped in range(descending.shape[0]):
        if capped * cap >= 1.0:
            break
        limit = float(below[capped]) * (cap / (1.0 - capped * cap))
        if descending[capped] <= limit:
            return weights if capped == 0 else np.minimum(weights, limit)
    return (weights > 0.0).astype(np.float64)
