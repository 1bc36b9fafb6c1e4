"""DeviceClock: the time of a step on its device, and how far Python may run ahead of it."""

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch


class DeviceClock(Protocol):
    """Times the work that steps start on a device."""

    def time(self, work: Callable[[], None], report: Callable[[float], None]) -> None:
        """Run `work` and call `report` with its seconds, now or after a later step.

        Raises:
            Exception: what `work` raises; `report` is not called then.
        """
        ...


class HostClock:
    """The clock of a CPU: work has ended when the function returns."""

    def time(self, work: Callable[[], None], report: Callable[[float], None]) -> None:
        start = time.monotonic()
        work()
        report(time.monotonic() - start)


class CudaClock:
    """The clock of a GPU. It waits for the previous step, not for the one it starts.

    Python prepares the next step while the GPU runs this one, so that the GPU does not become idle between steps. At
    most one step is queued; more would delay cancellation.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, Callable[[float], None]]] = deque()

    def time(self, work: Callable[[], None], report: Callable[[float], None]) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        self._pending.append((start, end, report))
        while len(self._pending) > 1:
            start, end, report = self._pending.popleft()
            end.synchronize()
            report(start.elapsed_time(end) / 1e3)
