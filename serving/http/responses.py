"""What the HTTP interface answers: the bodies of its OpenAPI description, and an error's status and body."""

import logging
import math
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from realcustom.config import SamplingDefaults

from ..protocol.errors import DeadlineExceeded, InvalidRequest, QueueFull, ServerError, TooLarge, Unavailable
from ..protocol.limits import Limits
from .edit_form import sentence

logger = logging.getLogger(__name__)


class ImageState(BaseModel):
    """An image and its guidance masks (gray PNG, one per subject) as base64; `seed` repeats it."""

    b64_json: str
    seed: int
    masks: list[str]


class ImagesState(BaseModel):
    """`n` images, made at `created` (seconds since 1970)."""

    created: int
    data: list[ImageState]
    output_format: Literal["png", "jpeg", "webp"]


class Model(BaseModel):
    """The loaded model; see `model_info.ModelInfo`."""

    id: str
    object: Literal["model"] = "model"
    owned_by: Literal["realcustom"] = "realcustom"
    preset: Literal["paper", "release", "custom"]
    sampling: SamplingDefaults
    limits: Limits
    vocabulary: dict[str, list[str]]


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class Error(BaseModel):
    """Every answer that is not 200, in the shape of OpenAI's errors."""

    error: ErrorDetail


_RETRY_AFTER = {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 0}}}
_STATUSES = {
    401: "no or a wrong API key",
    413: "too many bytes or pixels",
    422: "a request that cannot be made; the message says why",
    429: "no place; see Retry-After",
    500: "a fault of the server",
    503: "no replica can make the image now; see Retry-After",
    504: "the deadline has passed",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an endpoint that may answer with these statuses; none given: with all."""
    return {
        status: {
            "description": _STATUSES[status],
            "model": Error,
            **({"headers": _RETRY_AFTER} if status in (429, 503) else {}),
        }
        for status in statuses or _STATUSES
    }


def error_answer(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers for anything that was raised."""
    if isinstance(error, RequestValidationError):
        reasons = error.errors()
        where = [str(part) for part in reasons[0]["loc"] if part != "body"]
        return _answer(422, sentence(reasons), "invalid_request", param=where[0] if where else None)
    if isinstance(error, TooLarge):
        return _answer(413, str(error), "too_large")
    if isinstance(error, InvalidRequest):
        return _answer(422, str(error), "invalid_request")
    if isinstance(error, QueueFull):
        return _answer(429, str(error), "overloaded", headers={"Retry-After": str(math.ceil(error.retry_after_s))})
    if isinstance(error, Unavailable):
        return _answer(503, str(error), "unavailable", headers={"Retry-After": str(math.ceil(error.retry_after_s))})
    if isinstance(error, DeadlineExceeded):
        return _answer(504, str(error), "timeout")
    if isinstance(error, HTTPException):
        # Starlette's parser of multipart bodies answers 400: bad input is 422 everywhere here
        status = 422 if error.status_code == 400 else error.status_code
        return _answer(status, str(error.detail), "invalid_request", headers=dict(error.headers or {}))
    if isinstance(error, ServerError):
        return _answer(500, str(error), "server_error")
    logger.error("an unexpected error", exc_info=error)
    return _answer(500, "the server failed; try again.", "server_error")


def _answer(status: int, message: str, code: str, *, param: str | None = None, headers: dict[str, str] | None = None):
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers or {}
