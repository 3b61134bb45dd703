"""Aggregation strategies by name: how the deltas of a round become one update. Pure NumPy.

To add a strategy: write its family's file with one ``Strategy`` subclass, and name it in ``_STRATEGIES``.
"""

from __future__ import annotations

from federation.strategies.base import Aggregate, Fold, Parameter, PrivacyMechanism, Strategy, StrategyInfo
from federation.strategies.blocks import BLOCK_SIZE, BlockSum, SumSource, blocks_from_tensors, blocks_to_tensors
from federation.strategies.errors import StrategyError
from federation.strategies.mean import FedAvg, FedProx, Weighted

__all__ = [
    "BLOCK_SIZE",
    "Aggregate",
    "BlockSum",
    "Fold",
    "Parameter",
    "PrivacyMechanism",
    "Strategy",
    "StrategyError",
    "StrategyInfo",
    "SumSource",
    "blocks_from_tensors",
    "blocks_to_tensors",
    "get",
    "names",
]

_STRATEGIES: dict[str, Strategy] = {strategy.info.name: strategy for strategy in (FedAvg(), FedProx(), Weighted())}


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
