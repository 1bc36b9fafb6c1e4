"""Client of the HTTP interface `POST /v1/images/edits`, with deadline and retries."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from realcustom.request import Request
from realcustom.words import PromptLength

from ..protocol.errors import DeadlineExceeded, InvalidRequest, QueueFull, ServerError, TooLarge, Unavailable
from ..protocol.events import Event, Progress, Queued, Result, result_of
from ..protocol.image_codec import encode_image, from_base64
from ..protocol.model_info import ModelInfo
from .retry import RetryPolicy, resume, server_backoff

Fields = dict[str, str]
Files = list[tuple[str, tuple[str, bytes, str]]]


class HttpClient:
    """Client of the HTTP interface; see `serving.clients.Client` for the methods.

    Args:
        base_url: for example "http://127.0.0.1:8000".
        api_key: sent as a bearer token.
        timeout_s: seconds without any data from the server after which a request fails.
        max_retries: how often a request is repeated after 429 (queue full), 503 (no replica) or a lost connection. The
            delay is at least the Retry-After of the server and grows with each attempt. Five retries take about 30 s,
            enough for Ray Serve to replace a proxy that died. The seed is drawn before the first attempt, so that each
            attempt computes the same image.
        transport: used in place of the network, for tests.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600,
        max_retries: int = 5,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._base_url = base_url
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = httpx.Timeout(timeout_s, connect=10)
        self._transport = transport
        self._retries = RetryPolicy(max_retries=max_retries, retry_on=(QueueFull, Unavailable), delay_s=server_backoff)

    async def model(self) -> ModelInfo:
        async with self._http() as http:
            response = await http.get("/v1/models")
            _raise_for_status(response, response.content)
            return ModelInfo.from_dict(response.json()["data"][0])

    async def prompt_length(self, prompt: str) -> PromptLength:
        async with self._http() as http:
            response = await http.post("/v1/prompt_length", json={"prompt": prompt})
            _raise_for_status(response, response.content)
            return PromptLength(**response.json())

    async def stream(
        self, request: Request, *, previews: bool | int = True, timeout_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        deadline = _deadline(timeout_s)
        fields, files = await self._form(request.with_seed())
        fields |= {"stream": "true", "progress": "true"}
        fields |= {"previews": "true"} if previews is True else {"partial_images": str(int(previews))}
        events = resume(
            lambda: self._stream_once(fields | _remaining_time(deadline), files), self._retries, deadline=deadline
        )
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def generate(self, request: Request, *, timeout_s: float | None = None) -> Result:
        deadline = _deadline(timeout_s)
        fields, files = await self._form(request.with_seed())
        return await result_of(
            resume(
                lambda: self._generate_once(fields | _remaining_time(deadline), files), self._retries, deadline=deadline
            )
        )

    async def _stream_once(self, fields: Fields, files: Files) -> AsyncGenerator[Event, None]:
        async with (
            self._http() as http,
            http.stream("POST", "/v1/images/edits", data=fields, files=files or None) as response,
        ):
            if response.status_code != 200:
                _raise_for_status(response, await response.aread())
            event = None
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    event = await asyncio.to_thread(_parse_event, line)  # decodes images
                    yield event
            if not isinstance(event, Result):
                raise Unavailable("the server ended the stream without a result.", 1.0)

    async def _generate_once(self, fields: Fields, files: Files) -> AsyncGenerator[Event, None]:
        async with self._http() as http:
            response = await http.post("/v1/images/edits", data=fields, files=files or None)
            _raise_for_status(response, response.content)
            yield await asyncio.to_thread(lambda: _result(response.json()["data"][0]))

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

    @asynccontextmanager
    async def _http(self) -> AsyncIterator[httpx.AsyncClient]:
        try:
            async with httpx.AsyncClient(
                base_url=self._base_url,
                headers=self._headers,
                timeout=self._timeout,
                transport=self._transport,
                trust_env=False,  # a proxy from the environment cannot reach a server on this machine
            ) as http:
                yield http
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(f"{self._base_url} did not respond in time ({type(error).__name__}).") from error
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise Unavailable(f"no response from {self._base_url}: {reason}.", 1.0) from error

    async def _form(self, request: Request) -> tuple[Fields, Files]:
        """The request as form fields and files; an image shared by several subjects is sent once."""
        height, width = request.height, request.width
        if (height is None) != (width is None):
            sampling = (await self.model()).sampling
            height, width = height or sampling.height, width or sampling.width
        files, indices = await asyncio.to_thread(_encode_references, request)
        subjects: list[dict[str, Any]] = []
        for subject, index in zip(request.subjects, indices):
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


def _encode_references(request: Request) -> tuple[Files, list[int]]:
    """The distinct reference images as PNG files, and for each subject the index of its file."""
    indices: dict[bytes, int] = {}
    files: Files = []
    for subject in request.subjects:
        index = indices.setdefault(subject.image.digest, len(files))
        if index == len(files):
            files.append(("image", (f"image{index}.png", encode_image(subject.image.to_pil()), "image/png")))
    return files, [indices[subject.image.digest] for subject in request.subjects]


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s


def _remaining_time(deadline: float | None) -> Fields:
    return {} if deadline is None else {"timeout_s": str(max(0.001, deadline - time.monotonic()))}


def _result(item: dict[str, Any]) -> Result:
    return Result(
        from_base64(item["b64_json"]), tuple(map(from_base64, item["masks"])), item["seed"], tuple(item["warnings"])
    )


def _parse_event(line: str) -> Event:
    """Parse a `data:` line of the event stream. Raises the error if the line contains one."""
    data = json.loads(line.removeprefix("data:"))
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
    message, code = error.get("message", f"the server responded with status {status}."), error.get("code")
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


def _raise_for_status(response: httpx.Response, body: bytes) -> None:
    if response.status_code == 200:
        return
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        error = None
    if not isinstance(error, dict):  # sent by a proxy instead of the HTTP interface
        if response.status_code == 500:  # Ray Serve's proxy, when the process of the HTTP interface has died
            raise Unavailable("the server's HTTP process has stopped; try again.", 1.0)
        error = {}
    raise _error(error, response.status_code, response.headers.get("retry-after", "5"))
