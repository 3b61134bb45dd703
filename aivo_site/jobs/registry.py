"""The kinds of jobs: each app registers its own when it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aivo_site.jobs.errors import UnknownKind
from aivo_site.jobs.shard_context import ShardHandler

if TYPE_CHECKING:
    from django.utils.functional import _StrPromise

    from aivo_site.jobs.context import JobContext


@dataclass(frozen=True)
class JobKind:
    """One kind of work.

    Attributes:
        name: stable word stored in the job row.
        label: what a person reads.
        run: does the work and returns its result as a JSON object. Raises ``Skipped`` where there was nothing to do and
            another ``DomainError`` for an expected failure. It may run more than once: a worker can die half way.
        queue: ``default`` for short work, ``training`` for long work.
        child_process: run in a process of its own; needed for TensorFlow, and so that memory returns to the system. A function
            of the job's parameters where it depends on them.
        max_starts: how often workers may begin it before a lost run is a failure.
        shard_handlers: by the name of the phase, what does one shard of a job that several workers share.
    """

    name: str
    label: str | _StrPromise
    run: Callable[[JobContext], Mapping[str, Any]]
    queue: str = "default"
    child_process: bool | Callable[[Mapping[str, Any]], bool] = False
    max_starts: int = 3
    shard_handlers: Mapping[str, ShardHandler] = field(default_factory=dict)

    def needs_child(self, params: Mapping[str, Any]) -> bool:
        """Whether a job with these parameters runs in a process of its own."""
        return self.child_process(params) if callable(self.child_process) else self.child_process


_KINDS: dict[str, JobKind] = {}


def register(kind: JobKind) -> None:
    """Make a kind known; registering the same one again changes nothing.

    Raises:
        ValueError: another kind has this name, or ``max_starts`` is below 1.
    """
    if kind.max_starts < 1:
        raise ValueError(f"max_starts of job kind {kind.name} must be at least 1")
    if _KINDS.setdefault(kind.name, kind) != kind:
        raise ValueError(f"two job kinds are named {kind.name}")


def get_kind(name: str) -> JobKind:
    """The registered kind.

    Raises:
        UnknownKind: naming the kinds there are.
    """
    try:
        return _KINDS[name]
    except KeyError:
        raise UnknownKind(f"kind must be one of {', '.join(sorted(_KINDS))}, not {name!r}") from None
