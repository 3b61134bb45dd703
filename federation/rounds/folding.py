"""From members with their delta files to one update: blocks of learners in threads, or blocks of coordinates.

Only files are read here, no database: what runs in a thread needs no connection. The result depends on the members and
their order alone, not on the number of threads.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar
from uuid import UUID

import numpy as np

from aivo_core.network import FloatArray, NetworkSpec
from federation import strategies
from federation.rounds.cohort import BLOCK, DamagedContribution, DiscountedDelta, compose
from federation.strategies.base import Aggregate, Fold, PrivacyMechanism
from models_store.delta_files import sound_files
from models_store.errors import StoreError
from models_store.store import DeltaFile, DeltaReader, VerifiedDelta, read_part

Own = TypeVar("Own")
Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]

MOST_THREADS = 8


@dataclass(frozen=True, slots=True)
class Member:
    """One contribution of the set with all that the result depends on.

    Attributes:
        contribution: its row. deltas: each session's delta file with its discount, in the order of training.
    """

    contribution: UUID
    subject_key: UUID
    weight: float
    deltas: tuple[DiscountedDelta, ...]

    def line(self) -> str:
        """All that the sum depends on for this member, for a digest."""
        deltas = [[part.file.sha256, part.discount.hex()] for part in self.deltas]
        return json.dumps([str(self.subject_key), deltas, self.weight.hex()])


def usable_threads() -> int:
    """Threads for one aggregation: this process's share of the cores, which a worker tells its child as it tells OpenMP."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    told = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, MOST_THREADS, int(told) if told.isdecimal() else cores))


def fold_members(
    members: Sequence[Member],
    *,
    strategy: strategies.FoldStrategy,
    spec: NetworkSpec,
    parameters: Mapping[str, Any] | None = None,
    first_block: int = 0,
    mechanism: PrivacyMechanism | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Fold:
    """A fold over ``members``, to be finished, or to hand over its parts; memory does not grow with their number.

    Each thread reads, verifies and sums whole blocks, so that a delta stays in its core's cache from the file to the sum.

    Args:
        members: ordered by subject key; whole blocks of the round, of which the last may be short.
        first_block: block of the first member: a shard begins where its blocks begin.
        mechanism: clips each delta; one thread then, so that it sees the deltas in their order.
        threads: None for this process's share of the cores; for one where the files need no checksum any more, since what is
            left are short calls that threads only make wait for one another.
        progress: called with members done and all of them.

    Raises:
        DamagedContribution: a delta file cannot be read any more; the first one, by order.
        StrategyError: the strategy refuses a delta, its weight or the parameters.
    """
    start = partial(strategy.start, spec.tail_size, mechanism=mechanism, parameters=parameters)
    fold = start(first_block=first_block)
    readers = _PerThread(lambda: DeltaReader(spec))

    def block_from(begin: int) -> Fold:
        block = start(first_block=first_block + begin // BLOCK)
        for member in members[begin : begin + BLOCK]:
            block.add(_read(member, readers.own().read), member.weight)
        return block

    alone = mechanism is not None or (threads is None and _all_verified(members))
    count = 1 if alone else (threads or usable_threads())
    done = 0
    with _in_order(block_from, range(0, len(members), BLOCK), threads=count) as blocks:
        for block in blocks:
            fold.merge(block)
            done = min(done + BLOCK, len(members))
            if progress is not None:
                progress(done, len(members))
    return fold


def combine_members(
    members: Sequence[Member],
    *,
    strategy: strategies.CoordinateStrategy,
    spec: NetworkSpec,
    parameters: Mapping[str, Any] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Aggregate:
    """The update of a strategy that needs all deltas at once: every file is verified, then read part by part.

    Args:
        threads, progress: as in ``fold_members``; progress counts coordinates.

    Raises:
        DamagedContribution: a delta file cannot be read any more.
        StrategyError: the strategy refuses.
    """
    count = threads or usable_threads()
    source = MemberDeltas(members, spec=spec, threads=count)
    return strategy.combine(source, parameters=parameters, threads=count, progress=progress)


class MemberDeltas:
    """The members' deltas as a ``DeltaSource``: each file is verified here, once, and then read by position.

    Raises:
        DamagedContribution: a file cannot be read any more; the first one, by order.
    """

    def __init__(self, members: Sequence[Member], *, spec: NetworkSpec, threads: int) -> None:
        self.count: int = len(members)
        self.dim: int = spec.tail_size
        self.dtype: np.dtype[Any] = np.dtype(np.float32)
        self._members = members
        self._spec = spec
        readers = _PerThread(lambda: DeltaReader(spec))

        def verified(member: Member) -> dict[DeltaFile, VerifiedDelta]:
            return {part.file: _guarded(member, readers.own().verify, part.file) for part in member.deltas}

        with _in_order(verified, members, threads=threads) as found:
            self._verified = list(found)

    def read(self, row: int, start: int, stop: int) -> FloatArray:
        """See ``DeltaSource.read``."""
        verified = self._verified[row]
        return _read(self._members[row], lambda file: read_part(verified[file], start, stop, spec=self._spec))


def _all_verified(members: Sequence[Member]) -> bool:
    return all(sound_files.identity(part.file) is not None for member in members for part in member.deltas)


def _read(member: Member, read: Callable[[DeltaFile], FloatArray]) -> FloatArray:
    return _guarded(member, lambda deltas: compose(deltas, read), member.deltas)


def _guarded(member: Member, function: Callable[[Item], Result], value: Item) -> Result:
    try:
        return function(value)
    except StoreError as error:
        raise DamagedContribution(member.contribution, error) from error


class _PerThread(Generic[Own]):
    """One object for each thread that asks."""

    def __init__(self, make: Callable[[], Own]) -> None:
        self._make = make
        self._local = threading.local()

    def own(self) -> Own:
        if not hasattr(self._local, "value"):
            self._local.value = self._make()
        found: Own = self._local.value
        return found


@contextmanager
def _in_order(function: Callable[[Item], Result], items: Sequence[Item], *, threads: int) -> Iterator[Iterator[Result]]:
    """The results in the order of ``items``, computed in threads, at most one per thread waiting; leaving ends the threads."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="aggregation")
    try:
        yield _results(pool, function, items, ahead=2 * threads)
    finally:
        pool.shutdown(cancel_futures=True)


def _results(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Sequence[Item], *, ahead: int
) -> Iterator[Result]:
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
