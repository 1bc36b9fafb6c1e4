"""HTTP: OpenAI-shaped picture editing, streaming, errors. It holds no model, only a client."""

import asyncio
import hmac
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Form, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from realcustom.request import Request

from .client import Client
from .errors import InvalidRequest, Overloaded, ServerError, TimedOut, TooLarge, Unavailable
from .events import Event, Progress, Queued, Result
from .form import EditForm, sentence
from .images import to_base64
from .middleware import BodyLimit
from .model_info import ModelInfo
from .settings import Settings

logger = logging.getLogger(__name__)

PEEK_S = 2.0  # how long a stream waits for its first step, so that a refused request gets a status and not an event
MODEL_INFO_S, MODEL_INFO_WAIT_S = 5.0, 1.0  # age at which it is asked for anew, and how long a new answer may take
ERRORS = {
    status: {"description": text, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    for status, text in {
        401: "no or a wrong API key",
        413: "too many bytes or pixels",
        422: "a request that cannot be made; the message says why",
        429: "no place; see Retry-After",
        500: "a fault of the server",
        503: "no replica can make the picture now; see Retry-After",
        504: "the deadline has passed",
    }.items()
}
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def create_api(client: Client, settings: Settings) -> FastAPI:
    """The HTTP interface to `client`."""
    api = FastAPI(title="RealCustom++", version="0.1", docs_url="/docs", redoc_url=None)
    known: list[tuple[float, ModelInfo]] = []  # when it was asked for, and the answer

    async def model_info() -> ModelInfo:
        """Limits may change while the server runs (`user_config`), but busy replicas need not be asked every time."""
        if known and time.monotonic() - known[-1][0] < MODEL_INFO_S:
            return known[-1][1]
        try:
            info = await asyncio.wait_for(client.model(), MODEL_INFO_WAIT_S if known else settings.max_timeout_s)
        except (Overloaded, Unavailable, asyncio.TimeoutError):
            if not known:
                raise Unavailable("no replica answers yet.", 5.0) from None
            info = known[-1][1]
        known[:] = [(time.monotonic(), info)]
        return info

    async def check_key(http: HttpRequest) -> None:
        expected = settings.api_key and f"Bearer {settings.api_key.get_secret_value()}"
        given = http.headers.get("authorization", "")
        if expected and not hmac.compare_digest(given.encode(), expected.encode()):
            raise HTTPException(401, "the API key is missing or wrong; send 'Authorization: Bearer <key>'.")

    @api.post("/v1/images/edits", dependencies=[Depends(check_key)], responses=ERRORS)
    async def edit_image(form: Annotated[EditForm, Form(media_type="multipart/form-data")]) -> dict[str, Any]:
        """Make pictures in which subjects become words of the prompt.

        With `stream`, server-sent events: image_edit.partial_image, image_edit.completed, and with `progress` also
        image_edit.queued and image_edit.progress.
        """
        info = await model_info()
        requests = await form.to_requests(info.limits, info.id)
        for request in requests:
            info.limits.check(request, info.sampling, pictures=len(requests))
        timeout_s = info.limits.timeout(form.timeout_s)
        if form.stream:
            previews = form.previews or form.partial_images
            events = all_events(client, requests, previews, timeout_s)
            return await _start_stream(_server_sent(events, form))
        results: dict[int, Result] = {}
        async with aclosing(all_events(client, requests, False, timeout_s)) as events:
            async for index, event in events:
                if isinstance(event, Result):
                    results[index] = event
        data = [await asyncio.to_thread(_item, results[i], form.output_format) for i in range(len(requests))]
        return {"created": int(time.time()), "data": data, "output_format": form.output_format}

    @api.get("/v1/models", dependencies=[Depends(check_key)], responses={s: ERRORS[s] for s in (401, 500, 503)})
    async def list_models() -> dict[str, Any]:
        """The loaded model: defaults, limits, vocabulary."""
        info = await model_info()
        return {"object": "list", "data": [{"object": "model", "owned_by": "realcustom", **info.to_dict()}]}

    @api.get("/healthz", responses={503: ERRORS[503]})
    async def health() -> dict[str, str]:
        """200 when a replica answers."""
        try:
            await asyncio.wait_for(client.model(), timeout=5)
        except (Overloaded, ServerError, asyncio.TimeoutError):
            raise Unavailable("no replica answers yet.", 5.0) from None
        return {"status": "ok"}

    api.add_middleware(BodyLimit, max_bytes=settings.max_subjects * settings.max_image_bytes + 2**20)
    for kind in (InvalidRequest, Overloaded, ServerError, RequestValidationError, StarletteHTTPException, Exception):
        api.add_exception_handler(kind, _answer_error)
    standard_schema = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            standard_schema()["components"]["schemas"]["Error"] = ERROR_SCHEMA
        return api.openapi_schema

    api.openapi = openapi
    return api


# ---- pictures of one request, together ---------------------------------------------------------------------------


async def all_events(
    client: Client, requests: Sequence[Request], previews: bool | int, timeout_s: float
) -> AsyncIterator[tuple[int, Event]]:
    """Events of all pictures as they come, with their index. If one fails or the caller leaves, all are cancelled."""
    queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()

    async def follow(index: int, request: Request) -> None:
        try:
            async with aclosing(client.stream(request, previews=previews, timeout_s=timeout_s)) as events:
                async for event in events:
                    queue.put_nowait((index, event))
            queue.put_nowait((index, None))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(follow(i, request)) for i, request in enumerate(requests)]
    try:
        remaining = len(tasks)
        while remaining:
            index, event = await queue.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                remaining -= 1
            else:
                yield index, event
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


def _item(result: Result, output_format: str) -> dict[str, Any]:
    return {
        "b64_json": to_base64(result.image, output_format),
        "seed": result.seed,
        "masks": [to_base64(mask) for mask in result.masks],
    }


# ---- streaming ---------------------------------------------------------------------------------------------------


async def _server_sent(events: AsyncIterator[tuple[int, Event]], form: EditForm) -> AsyncIterator[str]:
    """Events in the text/event-stream format, named as OpenAI names them; a late error is an event too."""
    num_previews: dict[int, int] = {}
    async with aclosing(events):
        try:
            async for index, event in events:
                if isinstance(event, Progress) and event.preview is not None:
                    num_previews[index] = num_previews.get(index, -1) + 1
                name, data = await asyncio.to_thread(_describe, event, form.output_format, num_previews.get(index, 0))
                if form.progress or name in ("image_edit.partial_image", "image_edit.completed"):
                    yield _event_text(name, {**data, "image_index": index})
                elif name == "image_edit.progress":
                    yield ": working\n\n"  # a comment: keeps the connection open, and a proxy sees that work goes on
        except (InvalidRequest, Overloaded, ServerError) as error:
            yield error  # the head of the stream may still become a status; see _start_stream


def _describe(event: Event, output_format: str, preview_index: int) -> tuple[str, dict[str, Any]]:
    if isinstance(event, Queued):
        return "image_edit.queued", {"position": event.position}
    now = {"created_at": int(time.time())}
    if isinstance(event, Result):
        size = f"{event.image.width}x{event.image.height}"
        shape = {"size": size, "output_format": output_format, "quality": "auto", "background": "opaque"}
        return "image_edit.completed", {**now, **shape, **_item(event, output_format)}
    step = {"step": event.step, "num_steps": event.num_steps}
    if event.preview is None:
        return "image_edit.progress", step
    size = f"{event.preview.width}x{event.preview.height}"
    shape = {"size": size, "output_format": output_format, "quality": "auto", "background": "opaque"}
    picture = {
        "partial_image_index": preview_index,
        "b64_json": to_base64(event.preview, output_format),
        "masks": [to_base64(mask) for mask in event.masks],
    }
    return "image_edit.partial_image", {**now, **shape, **step, **picture}


def _event_text(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"


async def _start_stream(lines: AsyncIterator[str | Exception]) -> StreamingResponse:
    """Answer 200 once a step was made or `PEEK_S` have passed; an error before that is raised and gets its status."""
    early: list[str] = []
    deadline = time.monotonic() + PEEK_S
    following = None
    try:
        while time.monotonic() < deadline:
            following = following or asyncio.ensure_future(anext(lines, None))
            done, _ = await asyncio.wait([following], timeout=max(0, deadline - time.monotonic()))
            if not done:
                break
            line, following = following.result(), None
            if isinstance(line, Exception):
                raise line
            if line is None:
                break
            early.append(line)
            if "image_edit.queued" not in line[:40]:
                break
    except BaseException:
        if following is not None:
            following.cancel()
            with suppress(BaseException):
                await following
        await lines.aclose()
        raise

    async def body() -> AsyncIterator[str]:
        try:
            for line in early:
                yield line
            line = await following if following is not None else await anext(lines, None)
            while line is not None:
                yield line if isinstance(line, str) else _event_text("error", _error_body(line)[1])
                line = await anext(lines, None)
        finally:
            if following is not None and not following.done():
                following.cancel()
                with suppress(BaseException):
                    await following
            await lines.aclose()

    return StreamingResponse(body(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


# ---- errors ------------------------------------------------------------------------------------------------------


def _error_body(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    if isinstance(error, RequestValidationError):
        errors = error.errors()
        where = [str(part) for part in errors[0]["loc"] if part != "body"]
        return _body(422, sentence(errors), "invalid_request", param=where[0] if where else None)
    if isinstance(error, TooLarge):
        return _body(413, str(error), "too_large")
    if isinstance(error, InvalidRequest):
        return _body(422, str(error), "invalid_request")
    if isinstance(error, Overloaded):
        return _body(429, str(error), "overloaded", headers={"Retry-After": str(math.ceil(error.retry_after_s))})
    if isinstance(error, Unavailable):
        return _body(503, str(error), "unavailable", headers={"Retry-After": str(math.ceil(error.retry_after_s))})
    if isinstance(error, TimedOut):
        return _body(504, str(error), "timeout")
    if isinstance(error, StarletteHTTPException):
        # Starlette's parser of multipart bodies answers 400: bad input is 422 everywhere here
        status = 422 if error.status_code == 400 else error.status_code
        return _body(status, str(error.detail), "invalid_request", headers=dict(error.headers or {}))
    if not isinstance(error, ServerError):
        logger.error("an unexpected error", exc_info=error)
    return _body(500, str(error) if isinstance(error, ServerError) else "the server failed; try again.", "server_error")


def _body(status: int, message: str, code: str, *, param: str | None = None, headers: dict[str, str] | None = None):
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers or {}


async def _answer_error(http: HttpRequest, error: Exception) -> JSONResponse:
    status, body, headers = _error_body(error)
    return JSONResponse(body, status, headers)
