"""FairQueue: a queue that its clients share equally, whatever the number of items each of them sends. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Entry(Generic[T]):
    item: T
    client: str
    start: float
    end: float


class FairQueue(Generic[T]):
    """Start-time fair queueing (Goyal, Vin and Cheng, 1996).

    The start time of an item is the current virtual time or the end time of its client's previous item, whichever is
    later. Its end time is its start time plus its cost. The item with the earliest start time is next, and its start
    time becomes the current virtual time. Items of one client keep their order, and an item of one client does not wait
    for all items of another.

    No item is inserted before the first one, which may be waiting for memory.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry[T]] = []
        self._now = 0.0
        self._ends: dict[str, float] = {}  # of the last item taken of each client, if later than now

    def add(self, item: T, client: str = "", cost: float = 1.0) -> None:
        own = [entry.end for entry in self._entries if entry.client == client]
        start = max(own, default=max(self._now, self._ends.get(client, 0.0)))
        later = (i for i, entry in enumerate(self._entries) if i > 0 and entry.start > start)
        self._entries.insert(next(later, len(self._entries)), _Entry(item, client, start, start + cost))

    def popleft(self) -> T:
        """Take the first item."""
        entry = self._entries.pop(0)
        self._now = max(self._now, entry.start)
        self._ends[entry.client] = max(entry.end, self._ends.get(entry.client, 0.0))
        self._ends = {client: end for client, end in self._ends.items() if end > self._now}
        return entry.item

    def appendleft(self, item: T, client: str = "") -> None:
        """Return an item that was taken to the head of the queue."""
        self._entries.insert(0, _Entry(item, client, self._now, self._ends.get(client, self._now)))

    def remove(self, item: T) -> None:
        self._entries = [entry for entry in self._entries if entry.item != item]

    def clear(self) -> None:
        self._entries.clear()

    def __iter__(self) -> Iterator[T]:
        return iter([entry.item for entry in self._entries])

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> T:
        return self._entries[index].item

    def __contains__(self, item: object) -> bool:
        return any(entry.item == item for entry in self._entries)
