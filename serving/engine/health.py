"""Health: an engine is healthy if its work makes progress; a running process alone is not sufficient."""

import threading
import time
from collections.abc import Sequence

STALL_FACTOR = 10  # a step may take this many times as long as expected, for example on a machine that is shared
MAX_FAILED_STEPS = 5  # consecutive; indicates a faulty device rather than faulty requests


class Health:
    """Monitors the engine's threads. Each thread reports when it starts a piece of work and when it has none."""

    def __init__(self) -> None:
        self._busy_since: dict[str, float] = {}
        self._limit_s: dict[str, float] = {}  # of the current work, if it may take longer than `stall_timeout_s`
        self._num_failed_steps = 0  # consecutive

    def idle(self) -> None:
        """The calling thread waits for work."""
        self._busy_since.pop(threading.current_thread().name, None)

    def busy(self) -> None:
        """The calling thread starts a piece of work."""
        name = threading.current_thread().name
        self._limit_s.pop(name, None)
        self._busy_since[name] = time.monotonic()

    def expect(self, seconds: float | None) -> None:
        """The work of the calling thread takes at most about `seconds`; None if that is unknown."""
        if seconds is not None:
            self._limit_s[threading.current_thread().name] = STALL_FACTOR * seconds

    def step(self, *, failed: bool) -> None:
        """A step has ended; `failed` if no image advanced."""
        self._num_failed_steps = self._num_failed_steps + 1 if failed else 0

    def check(self, threads: Sequence[threading.Thread], stall_timeout_s: float) -> None:
        """Raise `RuntimeError` if a thread has died, the last `MAX_FAILED_STEPS` steps have failed, or a piece of work
        has run for more than `stall_timeout_s` and for more than `STALL_FACTOR` times the expected time."""
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise RuntimeError(f"the last {self._num_failed_steps} steps have failed")
        if dead := [thread.name for thread in threads if not thread.is_alive()]:
            raise RuntimeError(f"threads have died: {', '.join(dead)}")
        for name, since in list(self._busy_since.items()):
            if (seconds := time.monotonic() - since) > max(stall_timeout_s, self._limit_s.get(name, 0.0)):
                raise RuntimeError(f"{name} has not advanced for {seconds:.0f} s")
