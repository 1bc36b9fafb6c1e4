"""Limits the size of a request body, the time in which it must arrive, and the number of bodies being received."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

RETRY_AFTER_S = 1  # most bodies arrive within a second


@dataclass(eq=False)
class _Rejection(Exception):
    """An error response that replaces the application's response."""

    status: int
    code: str
    message: str
    headers: dict[str, str] = field(default_factory=dict)

    def response(self) -> JSONResponse:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error: dict[str, Any] = {"message": self.message, "type": kind, "param": None, "code": self.code}
        # The rest of the body may still arrive, so the connection cannot be used for another request
        return JSONResponse({"error": error}, self.status, {**self.headers, "Connection": "close"})


class BodyLimit:
    """ASGI middleware that rejects a body as soon as it exceeds a limit.

    Args:
        max_bytes: maximum number of bytes that a body may declare or contain; otherwise the response is 413.
        max_upload_bytes: the same for paths that end with `upload_path`. All other bodies are small, because the
            application parses them at once, which would delay all requests.
        timeout_s: seconds within which a body must be complete; otherwise the response is 408.
        max_unread: maximum number of incomplete bodies; further requests with a body receive 503.
    """

    def __init__(
        self, app, *, max_bytes: int, max_upload_bytes: int, upload_path: str, timeout_s: float, max_unread: int
    ) -> None:
        self._app, self._timeout_s, self._max_unread = app, timeout_s, max_unread
        self._max_bytes, self._max_upload_bytes, self._upload_path = max_bytes, max_upload_bytes, upload_path
        self._unread: set[object] = set()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        ticket = object()
        try:
            self._check_start(scope)
            self._unread.add(ticket)
            await self._run(scope, receive, send, ticket)
        except _Rejection as rejection:
            await rejection.response()(scope, receive, send)
        finally:
            self._unread.discard(ticket)

    def _check_start(self, scope) -> None:
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._limit(scope):
            raise self._too_large(scope)
        if len(self._unread) >= self._max_unread:
            message = f"the server is receiving {len(self._unread)} other requests; try again."
            raise _Rejection(503, "unavailable", message, {"Retry-After": str(RETRY_AFTER_S)})

    async def _run(self, scope, receive, send, ticket: object) -> None:
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        num_bytes, started = 0, False
        rejection: _Rejection | None = None

        async def limited_receive():
            nonlocal num_bytes, rejection
            if ticket not in self._unread:
                return await receive()
            remaining_s = deadline - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), remaining_s)
            except asyncio.TimeoutError:
                rejection = self._too_slow()
                raise rejection from None
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._limit(scope):
                rejection = self._too_large(scope)
                raise rejection
            if not message.get("more_body", False):
                self._unread.discard(ticket)
            return message

        async def guarded_send(message) -> None:
            nonlocal started
            if rejection is None or started:  # the application's response to a truncated body is dropped
                started = True
                await send(message)

        try:
            await self._app(scope, limited_receive, guarded_send)
        except _Rejection:
            if started:
                return
            raise
        if rejection is not None and not started:  # the application handled the exception
            raise rejection

    def _limit(self, scope) -> int:
        return self._max_upload_bytes if scope["path"].endswith(self._upload_path) else self._max_bytes

    def _too_large(self, scope) -> _Rejection:
        message = (
            f"the request has more than the {self._limit(scope)} bytes that this server accepts here; send smaller "
            "images or shorter texts."
        )
        return _Rejection(413, "too_large", message)

    def _too_slow(self) -> _Rejection:
        message = f"the request did not arrive within {self._timeout_s:.4g} s; send smaller images."
        return _Rejection(408, "timeout", message)


def _has_body(scope) -> bool:
    headers = dict(scope["headers"])
    declares = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
    return declares or scope["method"] not in ("GET", "HEAD")
