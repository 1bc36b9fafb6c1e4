"""HTTP: OpenAI-shaped image editing, streaming, errors. It holds no model, only a client."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Form, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException as StarletteHTTPException

from realcustom.request import ResolvedRequest, seed_variations

from ..clients import Client
from ..protocol.errors import InvalidRequest, QueueFull, ServerError, Unavailable
from ..protocol.events import Event, Progress, Queued, Result
from ..protocol.image_codec import to_base64
from ..protocol.model_info import ModelInfo
from ..settings import Settings
from .body_limit import BodyLimit
from .edit_form import EditForm
from .responses import Health, ImagesState, Model, Models, error_answer, errors

PEEK_S = 2.0  # how long a stream waits for its first step, so that a refused request gets a status and not an event
MODEL_INFO_S, MODEL_INFO_WAIT_S = 5.0, 1.0  # age at which it is asked for anew, and how long a new answer may take
EVENT_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}  # with `stream`; see edit_image


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
        except (QueueFull, Unavailable, asyncio.TimeoutError):
            if not known:
                raise Unavailable("no replica answers yet.", 5.0) from None
            info = known[-1][1]
        known[:] = [(time.monotonic(), info)]
        return info

    bearer = HTTPBearer(auto_error=False, description="the server's API key")

    async def check_key(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        expected = settings.api_key.get_secret_value()
        if given is None or not hmac.compare_digest(given.credentials.encode(), expected.encode()):
            message = "the API key is missing or wrong; send 'Authorization: Bearer <key>'."
            raise HTTPException(401, message, {"WWW-Authenticate": "Bearer"})

    locked = [Depends(check_key)] if settings.api_key else []

    @api.post(
        "/v1/images/edits",
        dependencies=locked,
        response_model=ImagesState,
        responses={200: {"content": EVENT_STREAM}, **errors()},
    )
    async def edit_image(form: Annotated[EditForm, Form(media_type="multipart/form-data")]) -> Any:
        """Make images in which subjects become words of the prompt.

        With `stream`, server-sent events: image_edit.partial_image, image_edit.completed, and with `progress` also
        image_edit.queued and image_edit.progress.
        """
        info = await model_info()
        request = (await form.to_request(info.limits, info.id)).resolve(info.sampling)
        info.limits.check(request, num_images=form.n)
        requests = seed_variations(request, form.n)
        timeout_s = info.limits.timeout_s(form.timeout_s)
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
        return JSONResponse({"created": int(time.time()), "data": data, "output_format": form.output_format})

    @api.get("/v1/models", dependencies=locked, responses=errors(401, 500, 503))
    async def list_models() -> Models:
        """The loaded model: defaults, limits, vocabulary."""
        return Models(data=[Model(**(await model_info()).to_dict())])

    @api.get("/healthz", responses=errors(503))
    async def health() -> Health:
        """200 when a replica answers; a server that may have none asleep is not woken by being asked."""
        if settings.min_replicas == 0:
            return Health()
        try:
            await asyncio.wait_for(client.model(), timeout=5)
        except (QueueFull, ServerError, asyncio.TimeoutError):
            raise Unavailable("no replica answers yet.", 5.0) from None
        return Health()

    api.add_middleware(BodyLimit, max_bytes=settings.max_subjects * settings.max_image_bytes + 2**20)
    for kind in (InvalidRequest, QueueFull, ServerError, RequestValidationError, StarletteHTTPException, Exception):
        api.add_exception_handler(kind, _answer_error)
    return api


async def _answer_error(http: HttpRequest, error: Exception) -> JSONResponse:
    status, body, headers = error_answer(error)
    return JSONResponse(body, status, headers)


# ---- images of one request, together ---------------------------------------------------------------------------


async def all_events(
    client: Client, requests: Sequence[ResolvedRequest], previews: bool | int, timeout_s: float
) -> AsyncIterator[tuple[int, Event]]:
    """Events of all images as they come, with their index. If one fails or the caller leaves, all are cancelled."""
    queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()

    async def follow(index: int, request: ResolvedRequest) -> None:
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
        except (InvalidRequest, QueueFull, ServerError) as error:
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
    image = {
        "partial_image_index": preview_index,
        "b64_json": to_base64(event.preview, output_format),
        "masks": [to_base64(mask) for mask in event.masks],
    }
    return "image_edit.partial_image", {**now, **shape, **step, **image}


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
                yield line if isinstance(line, str) else _event_text("error", error_answer(line)[1])
                line = await anext(lines, None)
        finally:
            if following is not None and not following.done():
                following.cancel()
                with suppress(BaseException):
                    await following
            await lines.aclose()

    return StreamingResponse(body(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
