"""Client of a Ray Serve handle, with queue positions, deadlines and retries on another replica."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing, suppress
from typing import Any

from realcustom.request import Request, ResolvedRequest
from realcustom.words import PromptLength

from ..protocol.cost import image_cost
from ..protocol.errors import DeadlineExceeded, Unavailable
from ..protocol.events import HEARTBEAT_S, Event, Heartbeat, Queued, Result, result_of
from ..protocol.model_info import ModelInfo
from ..ray_private import forget_queue_lengths, hung_replicas, running_replicas
from .admission import Admission, Reservation, Ticket
from .ray_errors import translate_ray_errors
from .retry import RetryPolicy, resume, short_backoff

TIMEOUT_S = 600.0  # default deadline of a request, so that no request waits indefinitely for a replica
QUEUE_POLL_S = 0.5  # seconds without an event after which the position of a waiting request is updated
ADMISSION_POLL_S = 0.1  # seconds between two checks whether a waiting image may be sent
SILENCE_S = 6 * HEARTBEAT_S  # seconds without any item after which a replica is considered hung
PROBE_S = 3.0  # seconds within which a replica must answer whether it is alive


class HandleClient:
    """Client of a Ray Serve handle to the "Replica" deployment; see `serving.clients.Client` for the methods.

    Args:
        handle: `serve.get_deployment_handle("Replica", ...)`.
        max_retries: how often an image is restarted after its replica failed. The seed is drawn before the first
            attempt, so that each attempt computes the same image.
        timeout_s: deadline in seconds of requests without one.
        images_per_replica, max_queued: a replica holds `images_per_replica` images. If the running replicas are full,
            up to `max_queued` further images wait here, and others raise `QueueFull` at once. None sends all images,
            and Ray Serve queues or refuses them.
    """

    def __init__(
        self,
        handle: Any,
        *,
        max_retries: int = 2,
        timeout_s: float = TIMEOUT_S,
        images_per_replica: int | None = None,
        max_queued: int = 0,
    ) -> None:
        self._handle = handle
        self._retries = RetryPolicy(max_retries=max_retries, retry_on=(Unavailable,), delay_s=short_backoff)
        self._timeout_s = timeout_s
        self._client = uuid.uuid4().hex  # sender of the images without another one
        self._admission = Admission()
        if images_per_replica is not None:
            self._admission = Admission(
                places=lambda: images_per_replica * max(1, len(running_replicas(handle))), max_queued=max_queued
            )
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

    def reserve(self, number: int, client: str = "") -> AbstractContextManager[Reservation]:
        """Hold places for `number` images of a client while their references are decoded.

        Raises:
            QueueFull: there are not enough places.
        """
        return self._admission.reserve(number, client or self._client)

    async def generate(
        self, request: Request | ResolvedRequest, *, timeout_s: float | None = None, client: str = ""
    ) -> Result:
        return await result_of(self.stream(request, previews=False, timeout_s=timeout_s, client=client))

    async def stream(
        self,
        request: Request | ResolvedRequest,
        *,
        previews: bool | int = True,
        timeout_s: float | None = None,
        client: str = "",
        reservation: Reservation | None = None,
    ) -> AsyncGenerator[Event, None]:
        """See `serving.clients.Client.stream`.

        Args:
            client: name of the sender; senders share the server equally. By default, each `HandleClient` is one.
            reservation: a place from `reserve` is used if one is left.
        """
        if isinstance(request, Request):
            request = request.with_seed()
        client = client or self._client
        cost = image_cost(request) if isinstance(request, ResolvedRequest) else 1.0
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        ticket = self._admission.enter(client, cost, reservation)
        events = resume(lambda: self._attempt(request, previews, deadline, timeout_s, ticket), self._retries)
        try:
            async with aclosing(self._wait_for_place(ticket, deadline, timeout_s)) as positions:
                async for position in positions:
                    yield position
            async for event in events:
                if isinstance(event, Result):
                    self._admission.completions.add()
                yield event
        finally:
            self._admission.leave(ticket)
            await events.aclose()

    async def _wait_for_place(self, ticket: Ticket, deadline: float, timeout_s: float) -> AsyncGenerator[Queued, None]:
        """Yield the positions of an image until it may be sent."""
        position = None
        while ticket.sent_at is None:
            if (estimate := self._position(ticket)) != position:
                position = estimate
                yield Queued(position)
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(f"the image was not finished within {timeout_s:.3g} s.")
            await asyncio.sleep(min(ADMISSION_POLL_S, max(0.0, deadline - time.monotonic())))
            self._admission.send()

    def _position(self, ticket: Ticket) -> int:
        return self._queue_length + self._admission.num_ahead(ticket)

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
            forget_queue_lengths(self._handle)

    async def _attempt(
        self,
        request: Request | ResolvedRequest,
        previews: bool | int,
        deadline: float,
        timeout_s: float,
        ticket: Ticket,
    ) -> AsyncGenerator[Event, None]:
        remaining_s = max(0.0, deadline - time.monotonic())
        response = self._handle.options(stream=True).events.remote(request, previews, remaining_s, ticket.client)
        position, hung, ticket.answered = None, self._hung, False
        receiving: asyncio.Future[Event | Heartbeat | None] | None = None
        silent_since = time.monotonic()
        try:
            while True:
                receiving = receiving or asyncio.ensure_future(
                    _next(response, self._admission.completions.interval_s())
                )
                remaining_s = max(0.0, deadline - time.monotonic())
                wait_s = min(QUEUE_POLL_S if not ticket.answered else SILENCE_S, remaining_s)
                done, _ = await asyncio.wait([receiving], timeout=wait_s)
                silent = time.monotonic() - silent_since >= SILENCE_S
                if done:
                    if receiving.cancelled():  # by Ray; a cancellation of this task raises in the line above
                        raise Unavailable("the replica cancelled the image; try again.", 1.0)
                    event, receiving = receiving.result(), None
                    if not ticket.answered:
                        ticket.answered = True
                        self._queue_length = event.position if isinstance(event, Queued) else 0
                    if event is None:
                        return
                    if not isinstance(event, Heartbeat):
                        yield event
                    silent_since = time.monotonic()
                elif time.monotonic() >= deadline:
                    raise DeadlineExceeded(f"the image was not finished within {timeout_s:.3g} s.")
                elif silent and ticket.answered:
                    forget_queue_lengths(self._handle)
                    response.cancel()
                    raise Unavailable(f"the replica has not responded for {SILENCE_S:.0f} s; try again.", 1.0)
                elif silent and not await self._find_hung_replicas() <= hung:
                    response.cancel()  # Ray may have sent the request to a hung replica, where it would stay
                    raise Unavailable("a replica does not respond; try again.", 1.0)
                else:
                    if silent:
                        silent_since += HEARTBEAT_S  # until the next probe
                    if not ticket.answered and (estimate := self._position(ticket)) != position:
                        position = estimate
                        yield Queued(position)
        except (GeneratorExit, asyncio.CancelledError, DeadlineExceeded):
            response.cancel()
            raise
        finally:
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
