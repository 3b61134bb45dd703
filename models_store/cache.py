"""A small cache of things that are expensive to read and never change under their key."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class RecentlyUsed(Generic[K, V]):
    """Keeps the most recently used values of this process, as many as ``capacity`` holds; safe between threads.

    Keys name content (a version, a checksum), so nothing in it grows stale: what changed has another key.

    Args:
        capacity: how many values, or with ``size`` how much of what it measures (bytes); the latest value is kept even if it
            alone is larger.
        size: of a value, which must not change while it is kept.
    """

    def __init__(self, capacity: int, *, size: Callable[[V], int] | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, not {capacity}")
        self._capacity = capacity
        self._size = size
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """The value of ``key``; None where it is not kept."""
        with self._lock:
            kept = self._values.get(key)
            if kept is None:
                return None
            self._values.move_to_end(key)
            return kept[0]

    def get_or_make(self, key: K, make: Callable[[], V]) -> V:
        """The value of ``key``; made outside of the lock, so that a slow one does not hold up the others."""
        with self._lock:
            kept = self._values.get(key)
            if kept is not None:
                self._values.move_to_end(key)
                return kept[0]
        value = make()
        self.keep(key, value)
        return value

    def keep(self, key: K, value: V) -> None:
        """Keep ``value``, in the place of an earlier one."""
        size = 1 if self._size is None else self._size(value)
        with self._lock:
            self._used += size - self._values.pop(key, (None, 0))[1]
            self._values[key] = (value, size)
            while self._used > self._capacity and len(self._values) > 1:
                self._used -= self._values.popitem(last=False)[1][1]

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
            self._used = 0

    @property
    def used(self) -> int:
        """Of the capacity."""
        return self._used

    def __len__(self) -> int:
        return len(self._values)
