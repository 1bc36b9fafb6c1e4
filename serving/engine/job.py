"""One image's place in the engine and its line to the caller."""

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import Any

from realcustom.request import ResolvedRequest

from ..protocol.errors import DeadlineExceeded, InvalidRequest
from ..protocol.events import Event, Progress, Result
from .observer import Outcome


@dataclass(eq=False)
class Job:
    """An image from its arrival until it is told.

    Attributes:
        request: with every default filled in.
        previews: none, every few steps, or a number in all.
        loop: of the caller.
        cost: of all its steps (`cost.image_cost`).
        request_id: for the log.
    """

    request: ResolvedRequest
    previews: bool | int
    loop: asyncio.AbstractEventLoop
    cost: float
    request_id: str = ""
    arrived: float = field(default_factory=time.monotonic)
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    generation: Any = None
    closed: bool = False  # the result or an error has been sent, or nobody listens any more
    position: int | None = None  # place in line last told
    preview_pending: bool = False
    preview_sent: bool = False
    step_sent: int = 0
    last_turn: int = 0  # number of the engine's step it last took part in
    outcome: Outcome = "cancelled"  # unless something else is told first

    def send(self, event: Event | Exception) -> None:
        """Hand an event to the caller; from any thread, under the engine's lock, so that order holds."""
        if self.closed:
            return
        if isinstance(event, Result | Exception):
            self.closed, self.outcome = True, _outcome(event)
        if isinstance(event, Progress):  # a preview is made beside the steps and may be behind them: never count back
            self.step_sent = max(self.step_sent, event.step)
            event = replace(event, step=self.step_sent)
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the caller's loop has closed; nobody is left to tell
            self.closed = True

    def preview_due(self, every: int) -> bool:
        """Whether to show the image after its present step; `every` counts the steps between previews."""
        step, num_steps = self.generation.step_index, self.generation.num_steps
        if self.previews is True:
            return step % every == 0
        return step in {round(i * num_steps / (self.previews + 1)) for i in range(1, self.previews + 1)}

    @property
    def remaining_cost(self) -> float:
        if self.generation is None:
            return self.cost
        return self.cost * (1 - self.generation.step_index / self.generation.num_steps)

    @property
    def memory(self) -> tuple[int, int]:
        """What its memory depends on: (pixels, subjects)."""
        return self.request.height * self.request.width, len(self.request.subjects)


def _outcome(event: Result | Exception) -> Outcome:
    if isinstance(event, Result):
        return "finished"
    if isinstance(event, DeadlineExceeded):
        return "timed_out"
    return "invalid" if isinstance(event, InvalidRequest) else "failed"
