"""The HTTP interface: endpoints and error handling. It has no model, only a backend."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, ExitStack, aclosing
from typing import Annotated, Any, Protocol

from fastapi import Body, Depends, FastAPI, Form
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException as StarletteHTTPException

from realcustom.request import ResolvedRequest, seed_variations
from realcustom.words import PromptLength

from ..clients.admission import Reservation
from ..clients.merge import merge_streams
from ..protocol.errors import EXPECTED_ERRORS, QueueFull, ServerError, Unavailable
from ..protocol.events import Event, Result
from ..protocol.model_info import ModelInfo
from ..settings import Settings
from .authentication import Authentication
from .body_limit import BodyLimit
from .client_address import client_address
from .edit_form import JSON_BYTES_PER_CHAR, EditForm
from .reference_memory import ReferenceMemory
from .responses import Health, ImagesResponse, Model, Models, error_response, errors, images_json
from .streaming import HEARTBEAT_S, Batches, start_stream
from .trusted_hosts import TrustedHosts

MODEL_INFO_AGE_S = 5.0  # age after which the model information is requested again
MODEL_INFO_WAIT_S = 1.0  # time to wait for newer model information before the old one is used
SERVER_SENT_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": "a JSON object"}},
}
EDITS_PATH = "/v1/images/edits"
EVENT_STREAM = {"text/event-stream": {"schema": SERVER_SENT_EVENT}}  # content of a response with `stream`, per event


class Backend(Protocol):
    """Computes resolved requests: `HandleClient`, or a `Replica` in the same process. Errors as in `Client`."""

    async def model(self) -> ModelInfo: ...

    async def prompt_length(self, prompt: str) -> PromptLength: ...

    def reserve(self, number: int, client: str) -> AbstractContextManager[Reservation]: ...

    def stream(
        self,
        request: ResolvedRequest,
        *,
        previews: bool | int = True,
        timeout_s: float | None = None,
        client: str = "",
        reservation: Reservation | None = None,
    ) -> AsyncGenerator[Event, None]: ...


def create_api(backend: Backend, settings: Settings) -> FastAPI:
    """Create the HTTP interface to `backend`."""
    api = FastAPI(title="RealCustom++", version="0.1", docs_url="/docs", redoc_url=None)
    # Only describes the key in the OpenAPI schema; `Authentication` checks it
    described_key = [Depends(HTTPBearer(auto_error=False, description="the server's API key"))]
    dependencies = described_key if settings.api_key else []
    references = ReferenceMemory(settings.reference_memory_gb * 2**30)
    cached: list[tuple[float, ModelInfo]] = []  # at most one: time of the request, and its response

    async def model_info() -> ModelInfo:
        """Cached model information, updated every few seconds because limits can change (`user_config`)."""
        if cached and time.monotonic() - cached[0][0] < MODEL_INFO_AGE_S:
            return cached[0][1]
        try:
            info = await asyncio.wait_for(backend.model(), MODEL_INFO_WAIT_S if cached else settings.max_timeout_s)
        except (QueueFull, Unavailable, asyncio.TimeoutError):
            if not cached:
                raise Unavailable("no replica has responded yet.", 5.0) from None
            info = cached[0][1]
        cached[:] = [(time.monotonic(), info)]
        return info

    @api.post(
        EDITS_PATH,
        dependencies=dependencies,
        response_model=ImagesResponse,
        responses={200: {"content": EVENT_STREAM}, **errors()},
    )
    async def edit_image(http: HttpRequest, form: Annotated[EditForm, Form(media_type="multipart/form-data")]) -> Any:
        """Generate images in which subjects replace words of the prompt.

        With `stream`, the response is a stream of server-sent events: image_edit.partial_image, image_edit.completed,
        and with `progress` also image_edit.queued and image_edit.progress.
        """
        info = await model_info()
        request, entries = form.resolve(info)
        client = client_address(http.scope, settings.client_header)
        deadline = time.monotonic() + info.limits.timeout_s(form.timeout_s)
        num_pixels = await form.count_pixels(info.limits)
        with ExitStack() as held, backend.reserve(form.n, client) as reservation:
            held.enter_context(references.hold(num_pixels))
            request = await form.with_images(request, entries, info.limits, deadline)
            timeout_s = max(0.0, deadline - time.monotonic())
            previews = (form.previews or form.partial_images) if form.stream else False
            streams = [
                backend.stream(
                    variation, previews=previews, timeout_s=timeout_s, client=client, reservation=reservation
                )
                for variation in seed_variations(request, form.n)
            ]
            if form.stream:
                batches = merge_streams(streams, heartbeat_s=HEARTBEAT_S)
                return await start_stream(_holding(batches, held.pop_all()), form)
            results: dict[int, Result] = {}
            async with aclosing(merge_streams(streams)) as batches:
                async for batch in batches:
                    results |= {index: event for index, event in batch if isinstance(event, Result)}
        content = await asyncio.to_thread(images_json, [results[i] for i in range(form.n)], form.output_format)
        return Response(content, media_type="application/json")

    @api.get("/v1/models", dependencies=dependencies, responses=errors(401, 403, 500, 503))
    async def list_models() -> Models:
        """The loaded model: defaults, limits, vocabulary."""
        return Models(data=[Model(**(await model_info()).to_dict())])

    @api.post("/v1/prompt_length", dependencies=dependencies, responses=errors())
    async def prompt_length(prompt: Annotated[str, Body(embed=True)]) -> PromptLength:
        """How many tokens a prompt has, and how many of its characters the text encoder reads; the rest is ignored."""
        info = await model_info()
        info.limits.check_text("prompt", prompt)
        return await backend.prompt_length(prompt)

    @api.get("/healthz", responses=errors(403, 503))
    async def health() -> Health:
        """200 if a replica responds. With `min_replicas=0`, always 200, because the check would start a replica."""
        if settings.min_replicas == 0:
            return Health()
        try:
            await asyncio.wait_for(backend.model(), timeout=5)
        except (QueueFull, ServerError, asyncio.TimeoutError):
            raise Unavailable("no replica responds.", 5.0) from None
        return Health()

    api.add_middleware(
        BodyLimit,
        max_bytes=JSON_BYTES_PER_CHAR * settings.max_prompt_chars + 2**10,
        max_upload_bytes=settings.max_subjects * settings.max_image_bytes + 2**20,
        upload_path=EDITS_PATH,
        timeout_s=settings.body_timeout_s,
        max_unread=settings.max_unread_bodies,
    )
    if settings.api_key:  # the middleware that is added last runs first
        api.add_middleware(Authentication, api_key=settings.api_key)
    api.add_middleware(TrustedHosts, hosts=settings.trusted_hosts)
    for kind in (*EXPECTED_ERRORS, RequestValidationError, StarletteHTTPException, Exception):
        api.add_exception_handler(kind, _handle_error)
    return api


async def _holding(batches: Batches, held: ExitStack) -> Batches:
    """The batches of a stream; `held` is released at its end."""
    with held:
        async with aclosing(batches):
            async for batch in batches:
                yield batch


async def _handle_error(http: HttpRequest, error: Exception) -> JSONResponse:
    status, body, headers = error_response(error)
    return JSONResponse(body, status, headers)
