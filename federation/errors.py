"""What local training refuses, and why; each error has a stable ``code``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aivo_site.errors import DomainError, Skipped, UsageError


class NothingToTrain(Skipped):
    """No learner was trained, each left out with a reason; ``result`` has the counts.

    ``code``: ``no_learners``, ``nothing_trained``.
    """

    default_code = "nothing_trained"

    def __init__(self, message: str, *, code: str = "", result: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, code=code)
        self.result = dict(result or {})


class LocalTrainingError(DomainError):
    """One learner's local training failed; the code says how."""

    default_code = "training_failed"


class ManagerError(UsageError):
    """A configuration, update or path that the manager refuses; the message names the field and what is allowed.

    ``code``: ``bad_config``, ``unknown_field``, ``privacy_not_available``, ``no_updates``, ``different_bases``,
    ``duplicate_learner``, ``privacy_period_open``, ``wrong_shape``, ``not_finite``, ``bad_path``, codes of ``StrategyError``.
    """

    default_code = "bad_config"


class PeriodError(UsageError):
    """A privacy period that cannot begin or end; the message names the field and what is allowed.

    ``code``: ``bad_period``, ``no_meaning``, ``period_open``, ``no_privacy_period``, ``round_running``,
    ``population_too_small``.
    """

    default_code = "bad_period"


class LedgerError(DomainError):
    """A charge that the ledger refuses; nothing may be released.

    ``code``: ``no_privacy_period``: the period is over, ``clock_set_back``, ``other_meaning``: its δ, rate or unit is not what
    the period or the product stands for.
    """

    default_code = "not_charged"


class BudgetSpent(Skipped):
    """The release would carry ε over a cap; nothing was charged and nothing may be released."""

    default_code = "privacy_budget_spent"
