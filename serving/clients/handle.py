"""Ask the replicas through a Ray Serve handle: place in line, deadline, and another replica when one fails."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

from realcustom.request import Request

from ..protocol.errors import DeadlineExceeded, InvalidRequest, QueueFull, ServerError, Unavailable
from ..protocol.events import Event, Progress, Queued, Result
from ..protocol.model_info import ModelInfo

logger = logging.getLogger("ray.serve.realcustom")

TIMEOUT_S = 600.0  # deadline of a request that names none: nobody waits for ever for a replica that never comes
AT_DOOR_S = 0.5  # silence after which a request is taken to wait for a replica, and how often its place is looked up


class HandleClient:
    """Client of a Ray Serve handle to the "Replica" deployment; see `client.Client`.

    Args:
        handle: `serve.get_deployment_handle("Replica", ...)`.
        max_retries: how often an image is begun again after its replica failed. Its seed is drawn before, so the
            repeated image is the same one.
        timeout_s: deadline of requests that name none, in seconds.
    """

    def __init__(self, handle, *, max_retries: int = 2, timeout_s: float = TIMEOUT_S) -> None:
        self._handle = handle
        self._max_retries, self._timeout_s = max_retries, timeout_s
        self._at_door: dict[object, None] = {}  # requests that no replica has answered yet, in order
        self._line_length = 0  # how many waited in a replica when the last request entered it

    async def model(self) -> ModelInfo:
        response = self._handle.model.remote()
        try:
            with _ray_errors():
                return await asyncio.wait_for(response, self._timeout_s)
        except asyncio.TimeoutError:
            raise Unavailable(f"no replica has answered within {self._timeout_s:.3g} s.", 30.0) from None

    def close(self) -> None:
        """Stop the background threads of the handle. Call this before `ray.shutdown`: they would start another Ray."""
        self._handle.shutdown()

    async def generate(self, request: Request, *, timeout_s: float | None = None) -> Result:
        async with aclosing(self.stream(request, previews=False, timeout_s=timeout_s)) as events:
            async for event in events:
                if isinstance(event, Result):
                    return event
        raise ServerError("the server ended the stream without a result.")

    async def stream(
        self, request: Request, *, previews: bool | int = True, timeout_s: float | None = None
    ) -> AsyncIterator[Event]:
        if isinstance(request, Request):
            request = request.with_seed()
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        step = 0
        for attempt in range(self._max_retries + 1):
            try:
                async with aclosing(self._attempt(request, previews, deadline, timeout_s)) as events:
                    async for event in events:
                        if isinstance(event, Progress):  # a second attempt is silent until it is further
                            if event.step < step or (event.step == step and event.preview is None):
                                continue
                            step = event.step
                        yield event
                return
            except Unavailable as error:
                if attempt == self._max_retries:
                    raise
                logger.warning("attempt %d failed, beginning again: %s", attempt + 1, error)
                await asyncio.sleep(0.1 * 4**attempt)  # the router learns of a dead replica in the meantime

    async def _attempt(
        self, request: Request, previews: bool | int, deadline: float, timeout_s: float
    ) -> AsyncIterator[Event]:
        left = max(0.0, deadline - time.monotonic())
        response = self._handle.options(stream=True).stream.remote(request, previews, left)
        place, closed = object(), None
        self._at_door[place] = None
        following: asyncio.Future | None = None
        try:
            while True:
                following = following or asyncio.ensure_future(_next(response))
                left = max(0.0, deadline - time.monotonic())
                wait_s = min(AT_DOOR_S, left) if place in self._at_door else left
                done, _ = await asyncio.wait([following], timeout=wait_s)
                if done:
                    if following.cancelled():  # not by us, who are still here
                        raise Unavailable("the replica has given the image up; try again.", 1.0)
                    event, following = following.result(), None
                    if place in self._at_door:
                        del self._at_door[place]
                        self._line_length = event.position if isinstance(event, Queued) else 0
                    if event is None:
                        return
                    yield event
                elif time.monotonic() >= deadline:
                    raise DeadlineExceeded(f"the image was not finished within {timeout_s:.3g} s.")
                elif place in self._at_door:
                    position = self._line_length + list(self._at_door).index(place)
                    if position != closed:
                        closed = position
                        yield Queued(position)
        except (GeneratorExit, asyncio.CancelledError, DeadlineExceeded):  # the caller has left
            response.cancel()
            raise
        finally:
            self._at_door.pop(place, None)
            if following is not None:
                following.cancel()
                with suppress(BaseException):
                    await following


async def _next(response) -> Event | None:
    with _ray_errors():
        return await anext(response, None)


class _ray_errors:
    """Turns what Ray raises into the errors of `serving.protocol.errors`: a replica's own error crosses wrapped in a task
    error."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if not isinstance(error, Exception):  # nothing, or a cancellation
            return
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, InvalidRequest | QueueFull | ServerError):
            raise cause from None
        if isinstance(cause, ValueError):
            raise InvalidRequest(str(cause)) from None
        if isinstance(cause, BackPressureError):
            wait_s = cause.retry_after_s or 5.0
            raise QueueFull("too many images are waiting; try again in a few seconds.", wait_s) from None
        if isinstance(cause, DeploymentUnavailableError):
            raise Unavailable("no replica could be started.", 30.0) from error
        if isinstance(cause, RayError | RayServeException) and not isinstance(cause, TaskCancelledError):
            logger.warning("a replica is gone: %s", type(cause).__name__)  # it died, or cannot be reached
            raise Unavailable(f"the replica has gone ({type(cause).__name__}); try again.", 1.0) from error
        if isinstance(cause, TaskCancelledError):
            raise ServerError("the request was cancelled.") from None
        if isinstance(error, RayError):  # a fault of the program: the same everywhere
            logger.error("the replica failed", exc_info=error)
            raise ServerError(f"the replica failed ({type(cause).__name__}).") from error
