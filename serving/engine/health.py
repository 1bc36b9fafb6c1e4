"""Health: an engine is healthy if its work makes progress; a running process alone is not sufficient."""

import threading
import time
from collections.abc import Sequence

MAX_FAILED_STEPS = 5  # consecutive; indicates a faulty device rather than faulty requests


class Health:
    """Monitors the engine's threads. Each thread reports when it starts a piece of work and when it has none."""

    def __init__(self) -> None:
        self._busy_since: dict[str, float] = {}
        self._num_failed_steps = 0  # consecutive

    def idle(self) -> None:
        """The calling thread waits for work."""
        self._busy_since.pop(threading.current_thread().name, None)

    def busy(self) -> None:
        """The calling thread starts a piece of work."""
        self._busy_since[threading.current_thread().name] = time.monotonic()

    def step(self, *, failed: bool) -> None:
        """A step has ended; `failed` if no image advanced."""
        self._num_failed_steps = self._num_failed_steps + 1 if failed else 0

    def check(self, threads: Sequence[threading.Thread], stall_timeout_s: float) -> None:
        """Raise `RuntimeError` if a thread has died, a piece of work has run for more than `stall_timeout_s`, or the
        last `MAX_FAILED_STEPS` steps have failed."""
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise RuntimeError(f"the last {self._num_failed_steps} steps have failed")
        if dead := [thread.name for thread in threads if not thread.is_alive()]:
            raise RuntimeError(f"threads have died: {', '.join(dead)}")
        for name, since in list(self._busy_since.items()):
            if (seconds := time.monotonic() - since) > stall_timeout_s:
                raise RuntimeError(f"{name} has not advanced for {seconds:.0f} s")
