"""The cache of encoded texts and references."""

import threading

import pytest

from realcustom.cache import Cache


def test_least_recently_used_values_are_evicted():
    """A full cache evicts the value whose last use is longest ago; hits, misses and bytes are counted."""
    cache, computed = Cache(max_bytes=2, size_of=lambda value: 1), []
    get = lambda key: cache.get(key, lambda: computed.append(key) or key)
    for key in "abacab":
        assert get(key) == key
    assert computed == ["a", "b", "c", "b"]  # "c" evicted "b", because "a" had been used after "b"
    assert (cache.hits, cache.misses, cache.num_bytes) == (2, 4, 2)
    cache.clear()
    get("a")
    assert computed[-1] == "a" and cache.num_bytes == 1


def test_value_larger_than_the_budget_is_kept_alone():
    """The newest value is kept even if it exceeds the budget; the next value evicts it."""
    cache = Cache(max_bytes=5, size_of=len)
    assert [cache.get(text, lambda text=text: text) for text in ("abc", "a long one", "a long one")][-1] == "a long one"
    assert (cache.hits, cache.num_bytes) == (1, 10)
    cache.get("de", lambda: "de")
    assert cache.num_bytes == 2


def test_a_smaller_budget_evicts_at_once():
    """`resize` evicts the least recently used values that exceed the new budget."""
    cache = Cache(max_bytes=3, size_of=lambda value: 1)
    for key in "abca":
        cache.get(key, lambda key=key: key)
    cache.resize(2)
    assert (cache.max_bytes, cache.num_bytes) == (2, 2)
    cache.get("a", lambda: "a")
    cache.get("b", lambda: "b")
    assert (cache.hits, cache.misses) == (2, 4)  # "b" was evicted


def test_concurrent_threads_compute_a_value_once():
    """A thread that requests a value that another thread is computing waits for it."""
    cache, computed = Cache(max_bytes=10, size_of=lambda value: 1), []
    started, proceed = threading.Event(), threading.Event()

    def compute():
        computed.append(1)
        started.set()
        proceed.wait(10)
        return "value"

    results = []
    threads = [threading.Thread(target=lambda: results.append(cache.get("key", compute))) for _ in range(2)]
    threads[0].start()
    started.wait(10)
    threads[1].start()
    proceed.set()
    for thread in threads:
        thread.join(10)
    assert results == ["value", "value"] and len(computed) == 1


def test_failed_computations_are_not_cached():
    """An exception reaches the caller; the next call computes the value, and later calls return that value."""
    cache = Cache(max_bytes=10, size_of=lambda value: 1)
    with pytest.raises(ZeroDivisionError):
        cache.get("key", lambda: 1 / 0)
    assert cache.get("key", lambda: "first") == "first"
    assert cache.get("key", lambda: "second") == "first"
