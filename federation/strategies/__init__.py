"""Aggregation strategies by name: how the deltas of a round become one update. Pure NumPy.

To add a strategy: write its family's file with one subclass of ``FoldStrategy``, ``CoordinateStrategy`` or, for a third
shape, ``Strategy``, and name it in ``_STRATEGIES``. Policies, commands and the admin take their choices from here.
"""

from __future__ import annotations

from federation.strategies.base import (
    Aggregate,
    DeltaSource,
    Fold,
    FoldStrategy,
    Parameter,
    PrivacyMechanism,
    Strategy,
    StrategyInfo,
)
from federation.strategies.blocks import BLOCK_SIZE, BlockSum, SumSource, blocks_from_tensors, blocks_to_tensors
from federation.strategies.coordinate import CoordinateStrategy
from federation.strategies.errors import StrategyError
from federation.strategies.mean import FedAvg, FedProx, Weighted
from federation.strategies.order_statistics import Median, TrimmedMean

__all__ = [
    "BLOCK_SIZE",
    "Aggregate",
    "BlockSum",
    "CoordinateStrategy",
    "DeltaSource",
    "Fold",
    "FoldStrategy",
    "Parameter",
    "PrivacyMechanism",
    "Strategy",
    "StrategyError",
    "StrategyInfo",
    "SumSource",
    "blocks_from_tensors",
    "blocks_to_tensors",
    "get",
    "get_fold",
    "names",
]

_STRATEGIES: dict[str, Strategy] = {
    strategy.info.name: strategy for strategy in (FedAvg(), FedProx(), Weighted(), Median(), TrimmedMean())
}


def names() -> tuple[str, ...]:
    """The names that ``get`` knows."""
    return tuple(_STRATEGIES)


def get(name: str) -> Strategy:
    """The strategy called ``name``.

    Raises:
        StrategyError: an unknown name (``unknown_strategy``); the message lists the allowed ones.
    """
    strategy = _STRATEGIES.get(name)
    if strategy is None:
        raise StrategyError(f"strategy must be one of {', '.join(names())}, not {str(name)[:80]!a}", code="unknown_strategy")
    return strategy


def get_fold(name: str) -> FoldStrategy:
    """The strategy called ``name``, for a caller that has one delta at a time, or partial sums.

    Raises:
        StrategyError: as ``get``; ``not_foldable``: the strategy needs all deltas at once.
    """
    strategy = get(name)
    if not isinstance(strategy, FoldStrategy):
        foldable = ", ".join(other for other in names() if isinstance(_STRATEGIES[other], FoldStrategy))
        raise StrategyError(f"strategy {name} needs all deltas at once; those that fold are {foldable}", code="not_foldable")
    return strategy
