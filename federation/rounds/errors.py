"""What rounds refuse, and why; each error has a stable ``code``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aivo_site.errors import DomainError, Skipped, UsageError


class RoundFailed(DomainError):
    """A round ended FAILED; main is as it was.

    ``code``: ``deadline_passed``, ``base_moved``, ``consent_withdrawn``, or that of what went wrong.
    """

    default_code = "round_failed"

    def __init__(self, message: str, *, code: str = "", result: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, code=code)
        self.result = dict(result or {})


class RoundSkipped(Skipped):
    """A round ended SKIPPED, or none could begin.

    ``code``: ``too_few_learners``, ``round_running``, ``awaiting_decision``.
    """

    default_code = "round_skipped"

    def __init__(self, message: str, *, code: str = "", result: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, code=code)
        self.result = dict(result or {})


class RoundConflict(DomainError):
    """The round is no longer in the state that the change needs: another run or an operator changed it first."""

    default_code = "round_conflict"


class RoundStopped(DomainError):
    """The run was asked to stop; the round is cancelled, or open for the next run to go on with."""

    default_code = "stopped"


class NotPromotable(DomainError):
    """A version cannot be made active in the way that was asked for.

    ``code``: ``not_promotable``, ``not_archived``, ``no_reason``, ``no_files``, ``round_running``, ``consent_withdrawn``.
    """

    default_code = "not_promotable"


class BadDecision(UsageError):
    """A decision on a round that is no decision, or lacks its reason."""

    default_code = "bad_decision"
