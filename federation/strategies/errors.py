"""The one error of aggregation."""

from __future__ import annotations

from typing import NoReturn


class StrategyError(ValueError):
    """An aggregation, or one contribution to it, that is refused; a refused contribution leaves no trace.

    ``code`` is stable: ``unknown_strategy``, ``unknown_parameter``, ``bad_parameter``, ``wrong_shape``,
    ``wrong_dtype``, ``not_finite``, ``bad_weight``, ``zero_weight``, ``bad_quality``, ``no_contributions``,
    ``bad_blocks``, ``finished``, ``not_private``, ``not_foldable``.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


def refuse(code: str, message: str) -> NoReturn:
    raise StrategyError(message, code=code)
