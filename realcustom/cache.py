"""A least-recently-used cache bounded by bytes, for encoded texts and references."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Cache(Generic[V]):
    """Keeps the most recently used values within a budget of bytes; the newest value is always kept.

    Thread-safe. Values are computed under the lock, so concurrent threads compute each value once.

    Args:
        max_bytes: budget of all values together.
        size_of: returns the bytes of a value.

    Attributes:
        max_bytes: the budget; it can be changed with `resize`.
        num_bytes: bytes of all values in the cache.
        hits, misses: number of `get` calls that found, or computed, their value.
    """

    def __init__(self, max_bytes: int, size_of: Callable[[V], int]) -> None:
        self.max_bytes, self._size_of = max_bytes, size_of
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0
        self.hits = self.misses = 0

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """Return the value of `key`, computing it with `make` if it is not cached."""
        with self._lock:
            if key in self._values:
                self.hits += 1
            else:
                self.misses += 1
                value = make()
                self._values[key] = value
                self.num_bytes += self._size_of(value)
                self._evict()
            self._values.move_to_end(key)
            return self._values[key]

    def resize(self, max_bytes: int) -> None:
        """Set the budget and evict the values that exceed it."""
        with self._lock:
            self.max_bytes = max_bytes
            self._evict()

    def _evict(self) -> None:
        while self.num_bytes > self.max_bytes and len(self._values) > 1:
            self.num_bytes -= self._size_of(self._values.popitem(last=False)[1])

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
            self.num_bytes = 0
