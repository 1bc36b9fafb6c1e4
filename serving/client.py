"""Ask a server for pictures, over HTTP or a Ray handle, with the same `Request` and the same methods.

Light: httpx and PIL; ray is imported only when a handle raises.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import httpx

from realcustom.config import SamplingDefaults
from realcustom.request import Request, Subject
from realcustom.words import words_of

from .errors import InvalidRequest, Overloaded, ServerError, TooLarge
from .events import Event, Progress, Queued, Result
from .images import encode_image, from_base64
from .settings import Limits

logger = logging.getLogger(__name__)

__all__ = [
    "Client",
    "Event",
    "HandleClient",
    "HttpClient",
    "InvalidRequest",
    "Limits",
    "ModelInfo",
    "Overloaded",
    "Progress",
    "Queued",
    "Request",
    "Result",
    "ServerError",
    "Subject",
    "TooLarge",
    "words_of",
]


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The loaded model.

    Attributes:
        id: its name.
        preset: "paper", "release" or "custom": how the method is computed.
        sampling: what a request that says nothing is sampled with.
        limits: what one request may ask for.
        vocabulary: words the model knows, by kind; empty for a model that knows them all.
    """

    id: str
    preset: str
    sampling: SamplingDefaults
    limits: Limits
    vocabulary: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "preset": self.preset,
            "sampling": asdict(self.sampling),
            "limits": self.limits.model_dump(),
            "vocabulary": self.vocabulary,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelInfo":
        return cls(
            id=values["id"],
            preset=values["preset"],
            sampling=SamplingDefaults(**values["sampling"]),
            limits=Limits(**values["limits"]),
            vocabulary=values["vocabulary"],
        )


class Client(Protocol):
    """What both clients offer.

    `stream` yields `Queued`, `Progress` and at last `Result`; closing it cancels the picture within one step.
    All raise `InvalidRequest` (a ValueError), `Overloaded` or `ServerError`.
    """

    async def model(self) -> ModelInfo: ...

    def stream(self, request: Request, *, previews: bool | int = True) -> AsyncIterator[Event]: ...

    async def generate(self, request: Request) -> Result: ...


async def _last(events: AsyncIterator[Event]) -> Result:
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Result):
                return event
    raise ServerError("the server ended the stream without a result.")


class HandleClient:
    """Client of a Ray Serve handle to the "Replica" deployment."""

    def __init__(self, handle) -> None:
        self._handle = handle

    async def model(self) -> ModelInfo:
        with _ray_errors():
            return await self._handle.model.remote()

    async def stream(self, request: Request, *, previews: bool | int = True) -> AsyncIterator[Event]:
        response = self._handle.options(stream=True).stream.remote(request, previews)
        try:
            with _ray_errors():
                async for event in response:
                    yield event
        except (GeneratorExit, asyncio.CancelledError):  # the caller has left
            response.cancel()
            raise

    async def generate(self, request: Request) -> Result:
        return await _last(self.stream(request, previews=False))


class _ray_errors:
    """Turns what Ray raises into the errors of this module: a replica's own error crosses wrapped in a task error."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if not isinstance(error, Exception):  # nothing, or a cancellation
            return
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import BackPressureError, RayServeException

        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, InvalidRequest | Overloaded | ServerError):
            raise cause from None
        if isinstance(cause, ValueError):
            raise InvalidRequest(str(cause)) from None
        if isinstance(cause, BackPressureError):
            raise Overloaded("too many pictures are waiting; try again in a few seconds.") from None
        if isinstance(error, RayError | RayServeException):
            logger.error("the replica failed", exc_info=error)
            raise ServerError(f"the replica failed ({type(cause).__name__}); try again.") from error


class HttpClient:
    """Client of the HTTP interface.

    Args:
        base_url: for example "http://127.0.0.1:8000".
        api_key: sent as a bearer token.
        timeout_s: longest silence while waiting for the server.
    """

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout_s: float = 600) -> None:
        self._options = {
            "base_url": base_url,
            "timeout": httpx.Timeout(timeout_s, connect=10),
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
            "trust_env": False,  # a server on this machine is not reached through a proxy
        }

    async def model(self) -> ModelInfo:
        async with self._http() as http:
            answer = await http.get("/v1/models")
            _raise_for(answer, answer.content)
            return ModelInfo.from_dict(answer.json()["data"][0])

    async def stream(self, request: Request, *, previews: bool | int = True) -> AsyncIterator[Event]:
        fields, files = await self._form(request)
        fields |= {"stream": "true", "progress": "true"}
        fields |= {"previews": "true"} if previews is True else {"partial_images": str(int(previews))}
        async with (
            self._http() as http,
            http.stream("POST", "/v1/images/edits", data=fields, files=files or None) as answer,
        ):
            if answer.status_code != 200:
                _raise_for(answer, await answer.aread())
            async for line in answer.aiter_lines():
                if line.startswith("data:"):
                    yield _event(json.loads(line[5:]))

    async def generate(self, request: Request) -> Result:
        fields, files = await self._form(request)
        async with self._http() as http:
            answer = await http.post("/v1/images/edits", data=fields, files=files or None)
            _raise_for(answer, answer.content)
            return _result(answer.json()["data"][0])

    def generate_sync(self, request: Request) -> Result:
        """`generate` for scripts without an event loop."""
        return asyncio.run(self.generate(request))

    @asynccontextmanager
    async def _http(self):
        try:
            async with httpx.AsyncClient(**self._options) as http:
                yield http
        except httpx.HTTPError as error:
            raise ServerError(
                f"no answer from {self._options['base_url']}: {str(error) or type(error).__name__}."
            ) from error

    async def _form(self, request: Request) -> tuple[dict[str, str], list]:
        """The request as form fields and files; a picture shared by several subjects is sent once."""
        height, width = request.height, request.width
        if (height is None) != (width is None):
            sampling = (await self.model()).sampling
            height, width = height or sampling.height, width or sampling.width
        pictures: dict[bytes, int] = {}
        files, subjects = [], []
        for subject in request.subjects:
            index = pictures.setdefault(repr(subject.image.size).encode() + subject.image.tobytes(), len(files))
            if index == len(files):
                files.append(("image", (f"image{index}.png", encode_image(subject.image), "image/png")))
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
            "seed": request.seed,
            "subjects": json.dumps(subjects) if subjects else None,
        }
        return {name: str(value) for name, value in fields.items() if value is not None}, files


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
    if code == "too_large" or status == 413:
        return TooLarge(message)
    if code == "invalid_request" or (400 <= status < 500 and status != 429):
        return InvalidRequest(message)
    if code == "overloaded" or status in (429, 503):
        return Overloaded(message, float(retry_after) if retry_after.isdigit() else 5.0)
    return ServerError(message)


def _raise_for(answer: httpx.Response, body: bytes) -> None:
    if answer.status_code == 200:
        return
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        error = {}
    raise _error(error, answer.status_code, answer.headers.get("retry-after", "5"))
