"""Both clients: faults of the way there are repeated a bounded number of times, and nothing waits for ever."""

import asyncio
import json
from contextlib import aclosing
from urllib.parse import parse_qs

import httpx
import pytest
from PIL import Image
from ray.exceptions import ActorDiedError

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
from serving.protocol.image_codec import to_base64

REQUEST = Request(prompt="a dog", seed=4)
RESULT = Result(Image.new("RGB", (8, 8), "red"), (), 4)
ITEM = {"b64_json": to_base64(RESULT.image), "seed": 4, "masks": []}


class FakeResponse:
    """What a Ray Serve handle returns: plays a list of events and errors; Ellipsis is silence."""

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
    """Answers the n-th call with the n-th script."""

    def __init__(self, *scripts) -> None:
        self._scripts, self.responses = iter(scripts), []
        self.stream = self.model = self

    def options(self, **_):
        return self

    def remote(self, *_):
        self.responses.append(FakeResponse(next(self._scripts)))
        return self.responses[-1]


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Seconds that were waited before repeating; no time passes."""
    waited = []

    async def sleep(seconds):
        waited.append(seconds)

    monkeypatch.setattr("serving.clients.http.asyncio.sleep", sleep)
    return waited


async def events_of(client) -> list:
    async with aclosing(client.stream(REQUEST)) as events:
        return [event async for event in events]


def test_a_image_is_begun_again_elsewhere_and_never_counts_back(waits):
    """The replica dies at step 3, another gives up, a third finishes: steps are told once, in order."""
    handle = FakeHandle(
        [Progress(1, 4), Progress(2, 4), Progress(3, 4), ActorDiedError()],
        [Progress(1, 4), asyncio.CancelledError()],
        [Progress(step, 4) for step in range(1, 5)] + [RESULT],
    )
    events = asyncio.run(events_of(HandleClient(handle, max_retries=2)))
    assert events == [Progress(step, 4) for step in range(1, 5)] + [RESULT]


def test_attempts_are_bounded(waits):
    """When every replica dies, the caller is told after the last attempt."""
    handle = FakeHandle(*[[ActorDiedError()]] * 5)
    with pytest.raises(Unavailable, match="gone"):
        asyncio.run(events_of(HandleClient(handle, max_retries=2)))
    assert len(handle.responses) == 3


def test_a_request_that_names_no_deadline_has_one():
    """No replica ever answers: DeadlineExceeded, and the request does not stay behind."""
    handle = FakeHandle([...], [...])
    client = HandleClient(handle, timeout_s=0.2)
    with pytest.raises(DeadlineExceeded, match=r"0\.2"):
        asyncio.run(client.generate(REQUEST))
    assert handle.responses[0].cancelled
    with pytest.raises(Unavailable):
        asyncio.run(client.model())


def http_client(*answers, max_retries=5) -> tuple[HttpClient, list[httpx.Request]]:
    """A client whose n-th request gets the n-th answer: a response, or an error of the connection."""
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        answer = answers[len(seen) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    client = HttpClient("http://test", max_retries=max_retries)
    client._options["transport"] = httpx.MockTransport(handle)
    return client, seen


def error(status: int, code: str, retry_after: str | None = None) -> httpx.Response:
    body = {"error": {"message": f"said {code}", "type": "x", "param": None, "code": code}}
    return httpx.Response(status, json=body, headers={"retry-after": retry_after} if retry_after else {})


PROXY_500 = httpx.Response(500, text="Internal Server Error")  # Ray Serve's proxy, when the ingress has died


def test_http_faults_are_repeated_as_the_server_asks(waits):
    """No place, no replica, no connection, no process behind the proxy: again, after at least the time that was asked
    for and longer each time, with the same seed."""
    answer = httpx.Response(200, json={"data": [ITEM]})
    client, seen = http_client(
        error(503, "unavailable", "1"), error(429, "overloaded", "7"), httpx.ConnectError("refused"), PROXY_500, answer
    )
    result = asyncio.run(client.generate(Request(prompt="a dog")))
    assert result.image.tobytes() == RESULT.image.tobytes()
    assert all(least <= waited <= 1.2 * least for waited, least in zip(waits, (1, 7, 4, 8), strict=True))
    assert len(seen) == 5 and len({parse_qs(request.content)[b"seed"][0] for request in seen}) == 1


def test_http_attempts_and_time_are_bounded(waits):
    client, seen = http_client(*[error(503, "unavailable", "1")] * 9, max_retries=3)
    with pytest.raises(Unavailable, match="said unavailable"):
        asyncio.run(client.generate(REQUEST))
    assert len(seen) == 4
    client, seen = http_client(*[error(429, "overloaded", "60")] * 9)
    with pytest.raises(QueueFull) as caught:
        asyncio.run(client.generate(REQUEST, timeout_s=30))
    assert len(seen) == 1 and caught.value.retry_after_s == 60


class Broken(httpx.AsyncByteStream):
    """Server-sent events, and then the connection breaks."""

    def __init__(self, *events) -> None:
        self._events = events

    async def __aiter__(self):
        for event in self._events:
            yield f"data: {json.dumps(event)}\n\n".encode()
        raise httpx.ReadError("reset by peer")


def test_a_broken_stream_is_begun_again(waits):
    """A connection that breaks in mid-image is repeated; the caller hears every step once."""
    step = lambda number: {"type": "image_edit.progress", "step": number, "num_steps": 3}
    done = "".join(
        f"data: {json.dumps(event)}\n\n"
        for event in (step(1), step(2), step(3), {"type": "image_edit.completed", **ITEM})
    )
    client, _ = http_client(httpx.Response(200, stream=Broken(step(1), step(2))), httpx.Response(200, text=done))
    events = asyncio.run(events_of(client))
    assert [event.step for event in events[:-1]] == [1, 2, 3] and isinstance(events[-1], Result)


@pytest.mark.parametrize(
    "answer,kind",
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
def test_errors_are_typed(answer, kind):
    client, _ = http_client(answer, answer, max_retries=0)
    for ask in (client.generate, lambda request: events_of(client)):
        with pytest.raises(kind) as caught:
            asyncio.run(ask(REQUEST))
        assert type(caught.value) is kind
