"""Request bodies that arrive slowly or never do not prevent the HTTP interface from serving other requests."""

import asyncio
import itertools
import json

import pytest

from realcustom import SamplingDefaults
from serving.http.app import create_api
from serving.protocol.errors import QueueFull
from serving.protocol.limits import Limits
from serving.protocol.model_info import ModelInfo
from serving.settings import Settings

FORM = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na dog\r\n--x--\r\n'
HEADERS = [(b"content-type", b"multipart/form-data; boundary=x")]
NEVER = None  # in place of a chunk: the client sends nothing more


class NoModel:
    """A backend that rejects every request, so that status 429 shows that the body was read."""

    async def model(self):
        sampling = SamplingDefaults(num_inference_steps=4, early_stop_step=2)
        return ModelInfo(id="none", preset="paper", sampling=sampling, limits=Limits())

    def reserve(self, number, client):
        raise QueueFull("the queue is full.", 7)


def api_with(**settings):
    return create_api(NoModel(), Settings(min_replicas=0, **settings))


async def send(api, chunks, headers=HEADERS, method="POST", path="/v1/images/edits") -> tuple[int, dict, dict]:
    """Status, headers and body of the response to a request whose body arrives in these chunks."""
    scope = {"type": "http", "method": method, "path": path, "root_path": "", "query_string": b"", "headers": headers}
    remaining = list(chunks)
    sent = []

    async def receive():
        if remaining[0] is NEVER:
            await asyncio.Event().wait()
        chunk = remaining.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(remaining)}

    async def record(message):
        sent.append(message)

    await asyncio.wait_for(api(scope, receive, record), 10)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), json.loads(body)


@pytest.mark.parametrize("start", [[], [FORM[:10]], [FORM[:10], FORM[10:-5]], [FORM]], ids=["0", "10", "most", "all"])
def test_a_body_that_stops_arriving_is_408(start):
    """A body that is not complete after `body_timeout_s` gets 408, and the connection is closed."""
    api = api_with(body_timeout_s=0.2)
    status, headers, body = asyncio.run(send(api, [*start, NEVER]))
    assert status == 408 and headers[b"connection"] == b"close"
    assert body["error"]["code"] == "timeout" and "0.2 s" in body["error"]["message"]


def test_a_body_that_arrives_byte_by_byte_is_408():
    """The time limit applies to the whole body, not to the time between its chunks."""

    async def run():
        api = api_with(body_timeout_s=0.3)
        scope = {"type": "http", "method": "POST", "path": "/v1/images/edits", "root_path": "", "query_string": b""}
        scope["headers"] = HEADERS
        sent = []
        chunks = itertools.chain([FORM.partition(b"a dog")[0]], itertools.repeat(b"a"))

        async def receive():
            await asyncio.sleep(0.05)
            return {"type": "http.request", "body": next(chunks), "more_body": True}

        async def record(message):
            sent.append(message)

        await asyncio.wait_for(api(scope, receive, record), 10)
        return sent[0]["status"]

    assert asyncio.run(run()) == 408


def test_unread_bodies_are_bounded_and_leave_the_interface_usable():
    """Beyond `max_unread_bodies`, a request with a body gets 503 at once; others are served. All places become free."""

    async def run():
        api = api_with(body_timeout_s=0.5, max_unread_bodies=3)
        stalled = [asyncio.create_task(send(api, [FORM[:10], NEVER])) for _ in range(3)]
        await asyncio.sleep(0.1)
        status, headers, body = await send(api, [FORM])
        assert status == 503 and int(headers[b"retry-after"]) >= 1 and body["error"]["code"] == "unavailable"
        assert (await send(api, [b""], [], "GET", "/healthz"))[0] == 200
        assert [status for status, _, _ in await asyncio.gather(*stalled)] == [408] * 3
        for _ in range(5):
            assert (await send(api, [FORM[:20], FORM[20:]]))[0] == 429
        cancelled = [asyncio.create_task(send(api, [NEVER])) for _ in range(3)]
        await asyncio.sleep(0.1)
        for task in cancelled:
            task.cancel()
        await asyncio.gather(*cancelled, return_exceptions=True)
        assert (await send(api, [FORM]))[0] == 429

    asyncio.run(run())
