"""Ask a server over HTTP: the typed client of `POST /v1/images/edits`, with deadline and retries."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx

from realcustom.request import Request

from ..protocol.errors import DeadlineExceeded, InvalidRequest, QueueFull, ServerError, TooLarge, Unavailable
from ..protocol.events import Event, Progress, Queued, Result
from ..protocol.image_codec import encode_image, from_base64
from ..protocol.model_info import ModelInfo


class HttpClient:
    """Client of the HTTP interface; see `client.Client`.

    Args:
        base_url: for example "http://127.0.0.1:8000".
        api_key: sent as a bearer token.
        timeout_s: longest silence while waiting for the server.
        max_retries: how often a request is repeated that found no place (429), no replica (503) or no connection; the
            server says when to come back, and all together half a minute passes, in which a proxy that died is
            replaced. Its seed is drawn before, so the repeated image is the same one.
    """

    def __init__(
        self, base_url: str, *, api_key: str | None = None, timeout_s: float = 600, max_retries: int = 5
    ) -> None:
        self._options = {
            "base_url": base_url,
            "timeout": httpx.Timeout(timeout_s, connect=10),
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
            "trust_env": False,  # a server on this machine is not reached through a proxy
        }
        self._max_retries = max_retries

    async def model(self) -> ModelInfo:
        async with self._http() as http:
            answer = await http.get("/v1/models")
            _raise_for(answer, answer.content)
            return ModelInfo.from_dict(answer.json()["data"][0])

    async def stream(
        self, request: Request, *, previews: bool | int = True, timeout_s: float | None = None
    ) -> AsyncIterator[Event]:
        request, deadline = request.with_seed(), _deadline(timeout_s)
        fields, files = await self._form(request)
        fields |= {"stream": "true", "progress": "true"}
        fields |= {"previews": "true"} if previews is True else {"partial_images": str(int(previews))}
        step = 0
        for attempt in range(self._max_retries + 1):
            try:
                async with aclosing(self._events(fields | _time_left(deadline), files)) as events:
                    async for event in events:
                        if isinstance(event, Progress):  # a second attempt is silent until it is further
                            if event.step < step or (event.step == step and event.preview is None):
                                continue
                            step = event.step
                        yield event
                return
            except (QueueFull, Unavailable) as error:
                await self._before_retry(attempt, error, deadline)

    async def _events(self, fields: dict[str, str], files: list) -> AsyncIterator[Event]:
        async with (
            self._http() as http,
            http.stream("POST", "/v1/images/edits", data=fields, files=files or None) as answer,
        ):
            if answer.status_code != 200:
                _raise_for(answer, await answer.aread())
            event = None
            async for line in answer.aiter_lines():
                if line.startswith("data:"):
                    event = _event(json.loads(line[5:]))
                    yield event
            if not isinstance(event, Result):
                raise Unavailable("the server ended the stream without a result.", 1.0)

    async def generate(self, request: Request, *, timeout_s: float | None = None) -> Result:
        request, deadline = request.with_seed(), _deadline(timeout_s)
        fields, files = await self._form(request)
        for attempt in range(self._max_retries + 1):
            try:
                async with self._http() as http:
                    data = fields | _time_left(deadline)
                    answer = await http.post("/v1/images/edits", data=data, files=files or None)
                    _raise_for(answer, answer.content)
                    return _result(answer.json()["data"][0])
            except (QueueFull, Unavailable) as error:
                await self._before_retry(attempt, error, deadline)
        raise AssertionError("the last attempt returns or raises")

    def generate_sync(self, request: Request, *, timeout_s: float | None = None) -> Result:
        """`generate` for scripts without an event loop."""
        return asyncio.run(self.generate(request, timeout_s=timeout_s))

    def stream_sync(
        self, request: Request, *, previews: bool | int = True, timeout_s: float | None = None
    ) -> Iterator[Event]:
        """`stream` for scripts without an event loop."""
        loop = asyncio.new_event_loop()
        events = self.stream(request, previews=previews, timeout_s=timeout_s)
        try:
            while (event := loop.run_until_complete(anext(events, None))) is not None:
                yield event
        finally:
            loop.run_until_complete(events.aclose())
            loop.close()

    async def _before_retry(self, attempt: int, error: QueueFull | Unavailable, deadline: float | None) -> None:
        """Wait as long as the server asks for, longer each time, and not all callers equally long; raises the error if
        there is no further attempt, or no time for it."""
        wait_s = max(error.retry_after_s, 2.0**attempt) * random.uniform(1, 1.2)
        late = deadline is not None and time.monotonic() + wait_s >= deadline
        if attempt == self._max_retries or late:
            raise error
        await asyncio.sleep(wait_s)

    @asynccontextmanager
    async def _http(self):
        try:
            async with httpx.AsyncClient(**self._options) as http:
                yield http
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(
                f"{self._options['base_url']} was silent for too long ({type(error).__name__})."
            ) from error
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise Unavailable(f"no answer from {self._options['base_url']}: {reason}.", 1.0) from error

    async def _form(self, request: Request) -> tuple[dict[str, str], list]:
        """The request as form fields and files; an image shared by several subjects is sent once."""
        height, width = request.height, request.width
        if (height is None) != (width is None):
            sampling = (await self.model()).sampling
            height, width = height or sampling.height, width or sampling.width
        images: dict[bytes, int] = {}
        files, subjects = [], []
        for subject in request.subjects:
            index = images.setdefault(subject.image.digest, len(files))
            if index == len(files):
                files.append(("image", (f"image{index}.png", encode_image(subject.image.to_pil()), "image/png")))
            subjects.append({"target_phrase": subject.target_phrase, "image": index})
            if subject.scope_ratio is not None:
                subjects[-1]["scope_ratio"] = subject.scope_ratio
        fields: dict[str, Any] = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt or None,
            "size": None if height is None else f"{width}x{height}",
            "num_inference_steps": request.num_inference_steps,
            "early_stop_step": request.early_stop_step,
            "guidance_scale": request.guidance_scale,
            "mask_source": request.mask_source,
            "mask_interval": request.mask_interval,
            "seed": request.seed,
            "subjects": json.dumps(subjects) if subjects else None,
        }
        return {name: str(value) for name, value in fields.items() if value is not None}, files


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s


def _time_left(deadline: float | None) -> dict[str, str]:
    return {} if deadline is None else {"timeout_s": str(max(0.001, deadline - time.monotonic()))}


def _result(item: dict[str, Any]) -> Result:
    return Result(from_base64(item["b64_json"]), tuple(map(from_base64, item["masks"])), item["seed"])


def _event(data: dict[str, Any]) -> Event:
    kinds: dict[str, Callable[[], Event]] = {
        "image_edit.queued": lambda: Queued(data["position"]),
        "image_edit.progress": lambda: Progress(data["step"], data["num_steps"]),
        "image_edit.partial_image": lambda: Progress(
            data["step"], data["num_steps"], from_base64(data["b64_json"]), tuple(map(from_base64, data["masks"]))
        ),
        "image_edit.completed": lambda: _result(data),
    }
    if data["type"] in kinds:
        return kinds[data["type"]]()
    raise _error(data.get("error", {}))


def _error(error: dict[str, Any], status: int = 500, retry_after: str = "5") -> Exception:
    message, code = error.get("message", f"the server answered {status}."), error.get("code")
    wait_s = float(retry_after) if retry_after.isdigit() else 5.0
    if code == "too_large" or status == 413:
        return TooLarge(message)
    if code == "timeout" or status in (408, 504):
        return DeadlineExceeded(message)
    if code == "overloaded" or status == 429:
        return QueueFull(message, wait_s)
    if code == "unavailable" or status in (502, 503):
        return Unavailable(message, wait_s)
    if code == "invalid_request" or 400 <= status < 500:
        return InvalidRequest(message)
    return ServerError(message)


def _raise_for(answer: httpx.Response, body: bytes) -> None:
    if answer.status_code == 200:
        return
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        error = None
    if not isinstance(error, dict):  # not from our interface, but from a proxy on the way
        if answer.status_code == 500:  # of Ray Serve's proxy: the process that answers for us has died
            raise Unavailable("the server's HTTP process has gone; try again.", 1.0)
        error = {}
    raise _error(error, answer.status_code, answer.headers.get("retry-after", "5"))
