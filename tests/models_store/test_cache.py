"""The cache of a process: least recently used first, by number or by size, safe between threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models_store.cache import RecentlyUsed


def test_the_value_unused_for_longest_goes_first() -> None:
    cache: RecentlyUsed[str, int] = RecentlyUsed(2)
    for key in "abac":
        cache.get_or_make(key, lambda: 1)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (1, None, 1)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 40)), max_size=60))
def test_it_never_holds_more_than_its_capacity_but_for_one_value(steps: list[tuple[int, int]]) -> None:
    cache: RecentlyUsed[int, bytes] = RecentlyUsed(64, size=len)
    held: dict[int, int] = {}
    for key, size in steps:
        cache.keep(key, bytes(size))
        held[key] = size
        kept = {k: n for k, n in held.items() if cache.get(k) is not None}
        assert cache.used == sum(kept.values()) <= 64
        assert cache.get(key) == bytes(size)
        held = kept


def test_a_value_larger_than_the_capacity_is_kept_alone() -> None:
    cache: RecentlyUsed[str, bytes] = RecentlyUsed(10, size=len)
    cache.keep("small", b"1")
    cache.keep("large", bytes(50))
    assert (len(cache), cache.used, cache.get("small")) == (1, 50, None)
    cache.clear()
    assert (len(cache), cache.used) == (0, 0)


def test_threads_leave_the_account_right() -> None:
    cache: RecentlyUsed[int, bytes] = RecentlyUsed(500, size=len)

    def work(thread: int) -> None:
        for step in range(2000):
            key = (step * 7 + thread) % 90
            assert len(cache.get_or_make(key, lambda key=key: bytes(key + 1))) == key + 1

    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(work, range(4)))
    kept = [value for value in (cache.get(key) for key in range(90)) if value is not None]
    assert cache.used == sum(map(len, kept)) <= 500
    assert len(cache) == len(kept)


def test_a_capacity_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity"):
        RecentlyUsed(0)
