"""Job: one image in the engine, from its arrival to its last event."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from realcustom.generation import Generation
from realcustom.request import ResolvedRequest

from ..protocol.errors import DeadlineExceeded, InvalidRequest
from ..protocol.events import Event, Progress, Result
from .observer import Outcome
from .step_time import RemainingWork


@dataclass(eq=False)
class Job:
    """One image in the engine.

    Attributes:
        request: what to generate.
        previews: True sends a preview every few steps, False sends none, an int sends this many in total.
        deliver: sends an event to the caller. It is called under the engine's lock from any thread, must not block, and
            raises `RuntimeError` if the caller no longer exists.
        request_id: for the log.
        client: name of the sender.
        arrived: time of arrival, `time.monotonic()`.
        generation: the state of the image once it is prepared.
        num_steps: UNet steps of the image; exact only after `prepare`, because some schedulers add steps.
        steps_done: UNet steps done.
        closed: the result or an error has been sent, or the caller has closed the stream; nothing more is sent.
        position: position in the queue that was last sent.
        preview_pending: a preview is queued or being decoded.
        preview_sent: at least one preview was sent.
        step_sent: highest step that was sent.
        outcome: how the image ended; "cancelled" unless a result or an error was sent.
    """

    request: ResolvedRequest
    previews: bool | int
    deliver: Callable[[Event | Exception], object]
    request_id: str = ""
    client: str = ""
    arrived: float = field(default_factory=time.monotonic)
    generation: Generation | None = None
    num_steps: int = 0
    steps_done: int = 0
    closed: bool = False
    position: int | None = None
    preview_pending: bool = False
    preview_sent: bool = False
    step_sent: int = 0
    outcome: Outcome = "cancelled"

    def __post_init__(self) -> None:
        self.num_steps = self.num_steps or self.request.num_inference_steps

    def send(self, event: Event | Exception) -> None:
        """Deliver an event unless the job is closed; a result or an error closes it."""
        if self.closed:
            return
        if isinstance(event, Result | Exception):
            self.closed, self.outcome = True, _outcome(event)
        if isinstance(event, Progress):  # previews may lag behind the steps; the step number never decreases
            self.step_sent = max(self.step_sent, event.step)
            event = replace(event, step=self.step_sent)
        try:
            self.deliver(event)
        except RuntimeError:  # the caller's event loop is closed
            self.closed = True

    def preview_due(self, every: int) -> bool:
        """Whether a preview should follow the current step; `every` is the number of steps between previews."""
        if self.previews is True:
            return self.steps_done % every == 0
        return self.steps_done in {round(i * self.num_steps / (self.previews + 1)) for i in range(1, self.previews + 1)}

    @property
    def done(self) -> bool:
        return self.steps_done >= self.num_steps

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels; images of one size can step together."""
        return self.request.height, self.request.width

    @property
    def memory(self) -> tuple[int, int]:
        """(pixels, subjects): what the image's memory depends on."""
        return self.request.height * self.request.width, len(self.request.subjects)

    def remaining_work(self) -> RemainingWork:
        return RemainingWork.of(self.request, self.steps_done, self.num_steps)


def _outcome(event: Result | Exception) -> Outcome:
    if isinstance(event, Result):
        return "finished"
    if isinstance(event, DeadlineExceeded):
        return "timed_out"
    return "invalid" if isinstance(event, InvalidRequest) else "failed"
