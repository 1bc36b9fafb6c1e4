"""Bodies of the HTTP responses, as models for the OpenAPI description, and the status and body of an error."""

import json
import logging
import math
import time
from collections.abc import Sequence
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from realcustom.config import SamplingDefaults

from ..protocol.errors import (
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    ServerError,
    TooLarge,
    Unavailable,
    is_system_error,
)
from ..protocol.events import Result
from ..protocol.image_codec import to_base64
from ..protocol.limits import Limits
from .edit_form import cut, sentence

logger = logging.getLogger("ray.serve.realcustom")  # below Ray Serve's logger, so that its handlers and format apply


class ImageData(BaseModel):
    """An image and its guidance masks (gray PNG, one per subject) as base64; `seed` reproduces it.

    `warnings` are sentences about parts of the request that had no effect, such as a prompt beyond the token limit.
    """

    b64_json: str
    seed: int
    masks: list[str]
    warnings: list[str]


class ImagesResponse(BaseModel):
    """`n` images, created at `created` (seconds since 1970)."""

    created: int
    data: list[ImageData]
    output_format: Literal["png", "jpeg", "webp"]


class Model(BaseModel):
    """The loaded model; see `model_info.ModelInfo`."""

    id: str
    object: Literal["model"] = "model"
    owned_by: Literal["realcustom"] = "realcustom"
    preset: Literal["paper", "release", "custom"]
    sampling: SamplingDefaults
    limits: Limits
    max_tokens: int
    vocabulary: dict[str, list[str]]


class Models(BaseModel):
    """Response of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Response of `GET /healthz`."""

    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    """The error: a sentence, its category, and the field that it concerns."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class Error(BaseModel):
    """Body of every response other than 200, in the shape of OpenAI's errors."""

    error: ErrorDetail


_RETRY_AFTER = {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 0}}}
_STATUSES = {
    401: "missing or wrong API key",
    403: "the Host header is not trusted",
    408: "the body did not arrive in time",
    413: "too many bytes or pixels",
    422: "invalid request; the message names the value, the limit and the remedy",
    429: "the queue is full; see Retry-After",
    500: "server error",
    503: "no replica is available; see Retry-After",
    504: "the deadline of the request has passed",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI `responses` of an endpoint for these status codes; without arguments, for all of them."""
    return {
        status: {
            "description": _STATUSES[status],
            "model": Error,
            **({"headers": _RETRY_AFTER} if status in (429, 503) else {}),
        }
        for status in statuses or _STATUSES
    }


def image_data(result: Result, output_format: str) -> dict[str, Any]:
    """The fields of `ImageData`. Encodes images, so call it in a thread."""
    return {
        "b64_json": to_base64(result.image, output_format),
        "seed": result.seed,
        "masks": [to_base64(mask) for mask in result.masks],
        "warnings": list(result.warnings),
    }


def images_json(results: Sequence[Result], output_format: str) -> bytes:
    """`ImagesResponse` as JSON. Encodes images, so call it in a thread."""
    data = [image_data(result, output_format) for result in results]
    state = {"created": int(time.time()), "data": data, "output_format": output_format}
    # Encoding in pieces releases the interpreter lock between images; `json.dumps` holds it for the whole body.
    return "".join(json.JSONEncoder(separators=(",", ":")).iterencode(state)).encode()


def error_response(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status code, body and headers for any exception. Only system errors, such as a full disk, and bugs are logged."""
    if is_system_error(error.__cause__) and isinstance(error, HTTPException):
        # FastAPI raises 400 for every error while it parses a form, even if the disk is full
        logger.error("a form could not be read", exc_info=error.__cause__)
        error = Unavailable("the server lacks resources to read the form at the moment; try again later.")
    if isinstance(error, RequestValidationError):
        reasons = error.errors()
        where = [cut(part) for part in reasons[0]["loc"] if part != "body"]
        return _response(422, sentence(reasons), "invalid_request", param=where[0] if where else None)
    if isinstance(error, TooLarge):
        return _response(413, str(error), "too_large")
    if isinstance(error, InvalidRequest):
        return _response(422, str(error), "invalid_request")
    if isinstance(error, QueueFull):
        return _response(429, str(error), "overloaded", headers=_retry_after(error.retry_after_s))
    if isinstance(error, Unavailable):
        return _response(503, str(error), "unavailable", headers=_retry_after(error.retry_after_s))
    if isinstance(error, DeadlineExceeded):
        return _response(504, str(error), "timeout")
    if isinstance(error, HTTPException):
        # Starlette's parser of multipart bodies raises 400; invalid input is 422 throughout this interface
        status = 422 if error.status_code == 400 else error.status_code
        return _response(status, str(error.detail), "invalid_request", headers=dict(error.headers or {}))
    if isinstance(error, ServerError):
        return _response(500, str(error), "server_error")
    logger.error("unexpected error", exc_info=error)
    return _response(500, "the server failed; try again.", "server_error")


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(math.ceil(seconds))}


def _response(
    status: int, message: str, code: str, *, param: str | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any], dict[str, str]]:
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers or {}
