"""Both clients retry failed attempts a bounded number of times, and every request has a deadline."""

import asyncio
import json
from contextlib import aclosing
from urllib.parse import parse_qs

import httpx
import pytest
from PIL import Image
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from serving.clients import (
    DeadlineExceeded,
    HandleClient,
    HttpClient,
    InvalidRequest,
    Progress,
    QueueFull,
    Request,
    Result,
    ServerError,
    TooLarge,
    Unavailable,
)
from serving.clients.admission import RETRY_AFTER_S
from serving.protocol.image_codec import to_base64

REQUEST = Request(prompt="a dog", seed=4)
RESULT = Result(Image.new("RGB", (8, 8), "red"), (), 4)
ITEM = {"b64_json": to_base64(RESULT.image), "seed": 4, "masks": [], "warnings": []}


class FakeResponse:
    """Response of a Ray Serve handle: plays a list of events and errors; Ellipsis blocks."""

    def __init__(self, script) -> None:
        self._script, self.cancelled = iter(script), False

    async def __anext__(self):
        item = next(self._script, None)
        if item is ...:
            await asyncio.Event().wait()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def __await__(self):
        return self.__anext__().__await__()

    def cancel(self) -> None:
        self.cancelled = True


class FakeHandle:
    """A handle whose n-th call plays the n-th script. It knows no replicas yet."""

    _router = None

    def __init__(self, *scripts) -> None:
        self._scripts, self.responses = iter(scripts), []
        self.events = self.model = self

    def options(self, **_):
        return self

    def remote(self, *_):
        self.responses.append(FakeResponse(next(self._scripts)))
        return self.responses[-1]


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Delays before the retries in seconds, without actual waiting."""
    waited: list[float] = []

    async def sleep(seconds):
        waited.append(seconds)

    monkeypatch.setattr("serving.clients.retry.asyncio.sleep", sleep)
    return waited


async def events_of(client) -> list:
    async with aclosing(client.stream(REQUEST)) as events:
        return [event async for event in events]


def test_image_restarts_on_another_replica_without_repeating_steps(waits):
    """The first replica dies at step 3, the second cancels, the third finishes: each step is reported once."""
    handle = FakeHandle(
        [Progress(1, 4), Progress(2, 4), Progress(3, 4), ActorDiedError()],
        [Progress(1, 4), asyncio.CancelledError()],
        [Progress(step, 4) for step in range(1, 5)] + [RESULT],
    )
    events = asyncio.run(events_of(HandleClient(handle, max_retries=2)))
    assert events == [Progress(step, 4) for step in range(1, 5)] + [RESULT]


def test_images_beyond_the_queue_are_refused_at_once():
    """Images beyond all places raise `QueueFull` before Ray is asked. An image that ends in any way frees its place."""
    handle = FakeHandle([Progress(1, 4), ...], [Progress(1, 4), ...], [InvalidRequest("no")], [RESULT])
    client = HandleClient(handle, images_per_replica=2)

    async def run():
        running = [client.stream(REQUEST) for _ in range(2)]
        for events in running:
            await anext(events)
        with pytest.raises(QueueFull, match="2 images"):
            await events_of(client)
        assert len(handle.responses) == 2
        await running[0].aclose()
        with pytest.raises(InvalidRequest):
            await events_of(client)
        assert await events_of(client) == [RESULT]
        await running[1].aclose()

    asyncio.run(run())


def test_a_full_queue_of_ray_has_the_same_delay():
    handle = FakeHandle([BackPressureError(num_queued_requests=3, max_queued_requests=3)])
    with pytest.raises(QueueFull, match=f"{RETRY_AFTER_S:.0f} s") as error:
        asyncio.run(events_of(HandleClient(handle)))
    assert error.value.retry_after_s == RETRY_AFTER_S


def test_attempts_are_bounded(waits):
    """If every replica dies, the error of the last attempt is raised."""
    handle = FakeHandle(*[[ActorDiedError()]] * 5)
    with pytest.raises(Unavailable, match="died or cannot be reached"):
        asyncio.run(events_of(HandleClient(handle, max_retries=2)))
    assert len(handle.responses) == 3


def test_errors_that_a_replica_reports_as_values_are_raised(waits):
    """`Replica.events` reports an error as its last item: a retryable one starts another attempt, others are raised."""
    handle = FakeHandle([Progress(1, 4), Unavailable("no memory", 1.0)], [Progress(2, 4), InvalidRequest("too large")])
    with pytest.raises(InvalidRequest, match="too large"):
        asyncio.run(events_of(HandleClient(handle)))
    assert len(handle.responses) == 2


def test_requests_without_a_deadline_get_the_default():
    """If no replica responds, the request fails with DeadlineExceeded and is cancelled on the server."""
    handle = FakeHandle([...], [...])
    client = HandleClient(handle, timeout_s=0.2)
    with pytest.raises(DeadlineExceeded, match=r"0\.2"):
        asyncio.run(client.generate(REQUEST))
    assert handle.responses[0].cancelled
    with pytest.raises(Unavailable):
        asyncio.run(client.model())


def http_client(*responses, max_retries=5) -> tuple[HttpClient, list[httpx.Request]]:
    """A client whose n-th request gets the n-th response, or raises it if it is an error of the connection."""
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        response = responses[len(seen) - 1]
        if isinstance(response, Exception):
            raise response
        return response

    return HttpClient("http://test", max_retries=max_retries, transport=httpx.MockTransport(handle)), seen


def error(status: int, code: str, retry_after: str | None = None) -> httpx.Response:
    body = {"error": {"message": f"said {code}", "type": "x", "param": None, "code": code}}
    return httpx.Response(status, json=body, headers={"retry-after": retry_after} if retry_after else {})


PROXY_500 = httpx.Response(500, text="Internal Server Error")  # Ray Serve's proxy, when the ingress has died


def test_http_retries_wait_at_least_as_long_as_the_server_requests(waits):
    """Full queue, no replica, no connection, no process behind the proxy: each is retried with the same seed, after
    at least the requested delay and after longer delays each time."""
    response = httpx.Response(200, json={"data": [ITEM]})
    client, seen = http_client(
        error(503, "unavailable", "1"),
        error(429, "overloaded", "7"),
        httpx.ConnectError("refused"),
        PROXY_500,
        response,
    )
    result = asyncio.run(client.generate(Request(prompt="a dog")))
    assert result.image.tobytes() == RESULT.image.tobytes()
    assert all(least <= waited <= 1.2 * least for waited, least in zip(waits, (1, 7, 4, 8), strict=True))
    assert len(seen) == 5 and len({parse_qs(request.content)[b"seed"][0] for request in seen}) == 1


def test_http_attempts_and_time_are_bounded(waits):
    """The last error is raised after `max_retries` retries, or when the next delay would exceed the deadline."""
    client, seen = http_client(*[error(503, "unavailable", "1")] * 9, max_retries=3)
    with pytest.raises(Unavailable, match="said unavailable"):
        asyncio.run(client.generate(REQUEST))
    assert len(seen) == 4
    client, seen = http_client(*[error(429, "overloaded", "60")] * 9)
    with pytest.raises(QueueFull) as caught:
        asyncio.run(client.generate(REQUEST, timeout_s=30))
    assert len(seen) == 1 and caught.value.retry_after_s == 60


class Broken(httpx.AsyncByteStream):
    """Server-sent events, then a connection error."""

    def __init__(self, *events) -> None:
        self._events = events

    async def __aiter__(self):
        for event in self._events:
            yield f"data: {json.dumps(event)}\n\n".encode()
        raise httpx.ReadError("reset by peer")


def test_broken_stream_is_resumed(waits):
    """After a connection error during an image, the request is repeated; each step is reported once."""
    step = lambda number: {"type": "image_edit.progress", "step": number, "num_steps": 3}
    done = "".join(
        f"data: {json.dumps(event)}\n\n"
        for event in (step(1), step(2), step(3), {"type": "image_edit.completed", **ITEM})
    )
    client, _ = http_client(httpx.Response(200, stream=Broken(step(1), step(2))), httpx.Response(200, text=done))
    events = asyncio.run(events_of(client))
    assert [event.step for event in events[:-1]] == [1, 2, 3] and isinstance(events[-1], Result)


@pytest.mark.parametrize(
    "response,kind",
    [
        (error(422, "invalid_request"), InvalidRequest),
        (error(413, "too_large"), TooLarge),
        (error(429, "overloaded"), QueueFull),
        (error(503, "unavailable"), Unavailable),
        (error(504, "timeout"), DeadlineExceeded),
        (error(500, "server_error"), ServerError),
        (httpx.Response(502, text="Bad Gateway"), Unavailable),
        (httpx.Response(500, json={"error": "of something else"}), Unavailable),
        (httpx.Response(404, text="no"), InvalidRequest),
        (httpx.ReadTimeout("silence"), DeadlineExceeded),
        (httpx.RemoteProtocolError("closed"), Unavailable),
    ],
)
def test_errors_are_typed(response, kind):
    """Each status code and connection error raises its own type, with and without streaming."""
    client, _ = http_client(response, response, max_retries=0)
    for ask in (client.generate, lambda request: events_of(client)):
        with pytest.raises(kind) as caught:
            asyncio.run(ask(REQUEST))
        assert type(caught.value) is kind
