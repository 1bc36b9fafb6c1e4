"""Graceful shutdown: SIGTERM and SIGINT (Ctrl-C) end a run with a checkpoint."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

ResultT = TypeVar("ResultT")


class Interrupted(BaseException):
    """Raised by a signal inside `StopSignal.interruptible`."""


class StopSignal:
    """Becomes `requested` when SIGTERM or SIGINT arrives inside `listen`.

    The run checks `requested` between steps. While it waits for data, which may take long, it is `interruptible`. At
    other times a signal interrupts nothing, so that neither a step nor a checkpoint is left half done.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._raises = False

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self) -> None:
        """Ask the run to stop, as a signal does; for callers that run it in another thread."""
        self._event.set()

    @contextmanager
    def listen(self) -> Iterator["StopSignal"]:
        """Handle the signals inside the context; the previous handlers are restored on exit.

        Only the main thread may install handlers. In other threads, nothing is installed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for number in previous:
                signal.signal(number, self._handle)
            yield self
        finally:
            for number, handler in previous.items():
                # None stands for a handler that was not installed from Python; it cannot be set again.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def interruptible(self, function: Callable[[], ResultT]) -> ResultT | None:
        """The result of `function`, or None if a signal arrives before it returns, which ends it at once."""
        try:
            self._raises = True
            return None if self.requested else function()
        except Interrupted:
            return None
        finally:
            self._raises = False

    def _handle(self, *_) -> None:
        self._event.set()
        if self._raises:
            self._raises = False
            raise Interrupted
