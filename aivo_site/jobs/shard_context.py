"""What a shard is to those who plan it and to the handler that does it; nothing here touches a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aivo_site.jobs.errors import ShardStopped

Steps = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True)
class ShardPlan:
    """A shard to be: its parameters (ids, numbers, words), and how many steps of the job's progress it is."""

    params: Mapping[str, Any]
    size: int = 1


@dataclass(frozen=True)
class ShardContext:
    """What a shard's handler gets.

    Attributes:
        should_stop: whether to end early; a handler that does raises ``ShardStopped``.
        progress: says how many of the shard's steps are done.
    """

    params: Mapping[str, Any]
    should_stop: Callable[[], bool]
    progress: Callable[[int], None]

    def check_stopped(self) -> None:
        """Call between steps, and at the end of work that may have ended early.

        Raises:
            ShardStopped: let it pass through.
        """
        if self.should_stop():
            raise ShardStopped


ShardHandler = Callable[[ShardContext], Mapping[str, Any]]
"""Does one shard and returns its result, a JSON object. Idempotent: a shard may run twice, at the same moment even."""
