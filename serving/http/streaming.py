"""Server-sent events: the images of one request as a stream, with the event names and fields of OpenAI's API."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse

from ..protocol.events import Event, Progress, Queued, Result
from ..protocol.image_codec import to_base64
from .edit_form import EditForm
from .responses import error_response, image_data

PEEK_S = 2.0  # seconds to wait for the first step; an error until then is sent as a status instead of an event
HEARTBEAT_S = 0.25  # interval of empty batches, so that `start_stream` notices the end of `PEEK_S`; they send nothing

Batches = AsyncGenerator[list[tuple[int, Event]], None]


async def start_stream(batches: Batches, form: EditForm) -> StreamingResponse:
    """Return a streaming response when a step has finished or `PEEK_S` seconds have passed.

    Args:
        batches: events from `merge_streams` with a heartbeat.
    Raises:
        Exception: an error that occurred before that; `error_response` gives its status code.
    """
    early: list[tuple[int, Event]] = []
    deadline = time.monotonic() + PEEK_S
    try:
        while time.monotonic() < deadline and all(isinstance(event, Queued) for _, event in early):
            batch = await anext(batches, None)
            if batch is None:
                break
            early += batch
    except BaseException:
        await batches.aclose()
        raise
    return StreamingResponse(
        _lines(early, batches, form), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


async def _lines(early: list[tuple[int, Event]], batches: Batches, form: EditForm) -> AsyncGenerator[bytes, None]:
    """The text of the stream. An error after the start of the response is its last event."""
    num_previews: dict[int, int] = {}

    async def encode(index: int, event: Event) -> bytes:
        preview_index = num_previews.get(index, 0)
        if isinstance(event, Progress) and event.preview is not None:
            num_previews[index] = preview_index + 1
        elif not form.progress and isinstance(event, Queued):
            return b""
        elif not form.progress and isinstance(event, Progress):
            return b": working\n\n"  # a comment, which keeps the connection open
        return await asyncio.to_thread(_encode, index, event, form.output_format, preview_index)

    async with aclosing(batches):
        try:
            for index, event in early:
                if text := await encode(index, event):
                    yield text
            async for batch in batches:
                for index, event in batch:
                    if text := await encode(index, event):
                        yield text
        except Exception as error:  # a bug, too, ends the stream with an event; `error_response` logs it
            yield _text("error", error_response(error)[1])


def _encode(index: int, event: Event, output_format: str, preview_index: int) -> bytes:
    name, data = _describe(event, output_format, preview_index)
    return _text(name, {**data, "image_index": index})


def _describe(event: Event, output_format: str, preview_index: int) -> tuple[str, dict[str, Any]]:
    """Name and data of an event."""
    if isinstance(event, Queued):
        return "image_edit.queued", {"position": event.position}
    if isinstance(event, Result):
        return "image_edit.completed", {
            **_header(event.image.size, output_format),
            **image_data(event, output_format),
        }
    step = {"step": event.step, "num_steps": event.num_steps}
    if event.preview is None:
        return "image_edit.progress", step
    return "image_edit.partial_image", {
        **_header(event.preview.size, output_format),
        **step,
        "partial_image_index": preview_index,
        "b64_json": to_base64(event.preview, output_format),
        "masks": [to_base64(mask) for mask in event.masks],
    }


def _header(size: tuple[int, int], output_format: str) -> dict[str, Any]:
    return {
        "created_at": int(time.time()),
        "size": f"{size[0]}x{size[1]}",
        "output_format": output_format,
        "quality": "auto",
        "background": "opaque",
    }


def _text(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()
