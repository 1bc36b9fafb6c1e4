"""Client of a Ray Serve handle, with queue positions, deadlines and retries on another replica."""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

from realcustom.request import Request, ResolvedRequest
from realcustom.words import PromptLength

from ..protocol.errors import DeadlineExceeded, QueueFull, Unavailable
from ..protocol.events import HEARTBEAT_S, Event, Heartbeat, Queued, Result, result_of
from ..protocol.model_info import ModelInfo
from ..ray_private import hung_replicas
from .ray_errors import translate_ray_errors
from .retry import RetryPolicy, resume, short_backoff

RETRY_AFTER_S = 5.0  # if the queue is full and no images have been completed
TIMEOUT_S = 600.0  # default deadline of a request, so that no request waits indefinitely for a replica
QUEUE_POLL_S = 0.5  # seconds without an event after which the position of a waiting request is updated
SILENCE_S = 6 * HEARTBEAT_S  # seconds without any item after which a replica is considered hung
PROBE_S = 3.0  # seconds within which a replica must answer whether it is alive


class Completions:
    """Measures the time between completed images while there is work.

    Args:
        clock: returns the time in seconds.
        number: of the most recent completions that count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, number: int = 16) -> None:
        self._clock, self._intervals_s = clock, deque[float](maxlen=number)
        self._since = clock()

    def start(self) -> None:
        """Work arrived after an idle time."""
        self._since = self._clock()

    def add(self) -> None:
        """An image was completed."""
        self._intervals_s.append(self._clock() - self._since)
        self.start()

    def interval_s(self) -> float:
        """Expected seconds until the next completion, in [1, 600]; `RETRY_AFTER_S` before the first completion.

        The mean of the recent intervals, or the current one if it is longer already.
        """
        if not self._intervals_s:
            return RETRY_AFTER_S
        mean_s = sum(self._intervals_s) / len(self._intervals_s)
        return min(600.0, max(1.0, mean_s, self._clock() - self._since))


class HandleClient:
    """Client of a Ray Serve handle to the "Replica" deployment; see `serving.clients.Client` for the methods.

    Args:
        handle: `serve.get_deployment_handle("Replica", ...)`.
        max_retries: how often an image is restarted after its replica failed. The seed is drawn before the first
            attempt, so that each attempt computes the same image.
        timeout_s: deadline in seconds of requests without one.
        max_images: images of this client that the server can accept at the same time. Further ones raise `QueueFull`
            at once, since Ray Serve may take seconds to refuse them. None leaves this to Ray Serve.
    """

    def __init__(
        self, handle: Any, *, max_retries: int = 2, timeout_s: float = TIMEOUT_S, max_images: int | None = None
    ) -> None:
        self._handle = handle
        self._retries = RetryPolicy(max_retries=max_retries, retry_on=(Unavailable,), delay_s=short_backoff)
        self._timeout_s = timeout_s
        self._max_images, self._num_images = max_images, 0
        self._completions = Completions()
        self._unanswered: dict[object, None] = {}  # requests that no replica has answered yet, in order of arrival
        self._hung: frozenset[str] = frozenset()  # replicas that did not answer the latest probe
        self._probing: asyncio.Future[set[str]] | None = None
        self._queue_length = 0  # of a replica, when it answered the latest request

    async def model(self) -> ModelInfo:
        return await self._call(self._handle.model)

    async def prompt_length(self, prompt: str) -> PromptLength:
        return await self._call(self._handle.prompt_length, prompt)

    async def _call(self, method: Any, *args: Any) -> Any:
        """The answer of a method of any replica. If a replica hangs, the call is repeated."""
        deadline = time.monotonic() + self._timeout_s
        while (remaining_s := deadline - time.monotonic()) > 0:
            hung = self._hung
            answer = asyncio.ensure_future(_answer(method.remote(*args)))
            try:
                while not answer.done() and remaining_s > 0:
                    await asyncio.wait([answer], timeout=min(SILENCE_S, remaining_s))
                    if answer.done():
                        return answer.result()
                    if not await self._find_hung_replicas() <= hung:
                        break
                    remaining_s = deadline - time.monotonic()
            finally:
                answer.cancel()
        raise Unavailable(f"no replica answered within {self._timeout_s:.3g} s.", 30.0)

    def close(self) -> None:
        """Stop the background threads of the handle.

        Call this before `ray.shutdown`; otherwise the threads would start a new Ray instance.
        """
        self._handle.shutdown()

    async def generate(self, request: Request | ResolvedRequest, *, timeout_s: float | None = None) -> Result:
        return await result_of(self.stream(request, previews=False, timeout_s=timeout_s))

    async def stream(
        self, request: Request | ResolvedRequest, *, previews: bool | int = True, timeout_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        if isinstance(request, Request):
            request = request.with_seed()
        if self._max_images is not None and self._num_images >= self._max_images:
            retry_after_s = self._completions.interval_s()
            raise QueueFull(
                f"the server's queue is full ({self._num_images} images); try again in {math.ceil(retry_after_s)} s.",
                retry_after_s,
            )
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        events = resume(lambda: self._attempt(request, previews, deadline, timeout_s), self._retries)
        if self._num_images == 0:
            self._completions.start()
        self._num_images += 1
        try:
            async for event in events:
                if isinstance(event, Result):
                    self._completions.add()
                yield event
        finally:
            self._num_images -= 1
            await events.aclose()

    async def _find_hung_replicas(self) -> frozenset[str]:
        """Update `_hung`. Requests that ask at the same time share the answer."""
        if self._probing is None:
            self._probing = asyncio.ensure_future(hung_replicas(self._handle, PROBE_S))
            self._probing.add_done_callback(self._end_probe)
        await asyncio.wait([self._probing])
        return self._hung

    def _end_probe(self, probe: asyncio.Future[set[str]]) -> None:
        self._probing = None
        if not probe.cancelled():
            self._hung = frozenset(probe.result())

    async def _attempt(
        self, request: Request | ResolvedRequest, previews: bool | int, deadline: float, timeout_s: float
    ) -> AsyncGenerator[Event, None]:
        remaining_s = max(0.0, deadline - time.monotonic())
        response = self._handle.options(stream=True).events.remote(request, previews, remaining_s)
        ticket, position, hung = object(), None, self._hung
        self._unanswered[ticket] = None
        receiving: asyncio.Future[Event | Heartbeat | None] | None = None
        silent_since = time.monotonic()
        try:
            while True:
                receiving = receiving or asyncio.ensure_future(_next(response, self._completions.interval_s()))
                remaining_s = max(0.0, deadline - time.monotonic())
                wait_s = min(QUEUE_POLL_S if ticket in self._unanswered else SILENCE_S, remaining_s)
                done, _ = await asyncio.wait([receiving], timeout=wait_s)
                silent = time.monotonic() - silent_since >= SILENCE_S
                if done:
                    if receiving.cancelled():  # by Ray; a cancellation of this task raises in the line above
                        raise Unavailable("the replica cancelled the image; try again.", 1.0)
                    event, receiving = receiving.result(), None
                    if ticket in self._unanswered:
                        del self._unanswered[ticket]
                        self._queue_length = event.position if isinstance(event, Queued) else 0
                    if event is None:
                        return
                    if not isinstance(event, Heartbeat):
                        yield event
                    silent_since = time.monotonic()
                elif time.monotonic() >= deadline:
                    raise DeadlineExceeded(f"the image was not finished within {timeout_s:.3g} s.")
                elif silent and ticket not in self._unanswered:
                    response.cancel()
                    raise Unavailable(f"the replica has not responded for {SILENCE_S:.0f} s; try again.", 1.0)
                elif silent and not await self._find_hung_replicas() <= hung:
                    response.cancel()  # Ray may have sent the request to a hung replica, where it would stay
                    raise Unavailable("a replica does not respond; try again.", 1.0)
                else:
                    if silent:
                        silent_since += HEARTBEAT_S  # until the next probe
                    estimate = self._queue_length + list(self._unanswered).index(ticket)
                    if estimate != position:
                        position = estimate
                        yield Queued(position)
        except (GeneratorExit, asyncio.CancelledError, DeadlineExceeded):
            response.cancel()
            raise
        finally:
            self._unanswered.pop(ticket, None)
            if receiving is not None:
                receiving.cancel()
                with suppress(BaseException):
                    await receiving


async def _answer(response: Any) -> Any:
    with translate_ray_errors():
        return await response


async def _next(response: Any, retry_after_s: float) -> Event | Heartbeat | None:
    """The next event of a replica; None at the end. Raises the error that the replica reports as its last item."""
    with translate_ray_errors(retry_after_s):
        item = await anext(response, None)
    if isinstance(item, Exception):
        raise item
    return item
