"""ReferenceMemory: limits the memory of the decoded references of all requests in a process."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..protocol.errors import QueueFull

BYTES_PER_PIXEL = 3
RETRY_AFTER_S = 5.0


class ReferenceMemory:
    """Counts the decoded references that requests hold, from before they are decoded until the request ends.

    Args:
        max_bytes: limit for all requests together. A single request is always accepted; its size has its own limit.
    """

    def __init__(self, max_bytes: float) -> None:
        self._max_bytes, self._held_bytes = max_bytes, 0

    @contextmanager
    def hold(self, num_pixels: int) -> Iterator[None]:
        """Account for the references of a request.

        Raises:
            QueueFull: the references of other requests leave too little memory.
        """
        num_bytes = BYTES_PER_PIXEL * num_pixels
        if self._held_bytes and self._held_bytes + num_bytes > self._max_bytes:
            raise QueueFull(
                f"the references of other requests take {self._held_bytes / 2**20:.0f} MiB and those of this request "
                f"would take {num_bytes / 2**20:.0f} MiB, more than the {self._max_bytes / 2**20:.0f} MiB of this "
                "server; try again later, or send smaller images.",
                RETRY_AFTER_S,
            )
        self._held_bytes += num_bytes
        try:
            yield
        finally:
            self._held_bytes -= num_bytes
