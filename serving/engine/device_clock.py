"""DeviceClock: the time of a step on its device, and how far Python may run ahead of it."""

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

Report = Callable[[float], None]  # receives the seconds of a step


class DeviceClock(Protocol):
    """Times the work that steps start on a device."""

    def time(self, work: Callable[[], None], report: Report) -> list[tuple[Report, float]]:
        """Run `work`, which is reported now or after a later step.

        Returns:
            the reports that are due, each with its seconds, for the caller to call.
        """
        ...


class HostClock:
    """The clock of a CPU: work has ended when the function returns."""

    def time(self, work: Callable[[], None], report: Report) -> list[tuple[Report, float]]:
        start = time.monotonic()
        work()
        return [(report, time.monotonic() - start)]


class CudaClock:
    """The clock of a GPU. It waits for the previous step, not for the one it starts.

    Python prepares the next step while the GPU runs this one, so that the GPU does not become idle between steps. At
    most one step is queued; more would delay cancellation.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, Report]] = deque()

    def time(self, work: Callable[[], None], report: Report) -> list[tuple[Report, float]]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        self._pending.append((start, end, report))
        due = []
        while len(self._pending) > 1:
            start, end, earlier = self._pending.popleft()
            end.synchronize()
            due.append((earlier, start.elapsed_time(end) / 1e3))
        return due
