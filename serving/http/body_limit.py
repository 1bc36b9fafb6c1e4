"""Limits the number of bytes of a request body as they arrive."""

from contextlib import suppress

from starlette.responses import JSONResponse


class _TooManyBytes(Exception):
    pass


class BodyLimit:
    """ASGI middleware: responds with 413 as soon as a body declares or contains more than `max_bytes` bytes."""

    def __init__(self, app, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await self._reject(scope, receive, send)
            return
        received, started = 0, False

        async def counted_receive():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise _TooManyBytes
            return message

        async def guarded_send(message) -> None:
            nonlocal started
            if received <= self._max_bytes or started:  # the application's response to a truncated body is dropped
                started = True
                await send(message)

        with suppress(_TooManyBytes):
            await self._app(scope, counted_receive, guarded_send)
        if received > self._max_bytes and not started:
            await self._reject(scope, receive, send)

    async def _reject(self, scope, receive, send) -> None:
        message = (
            f"the request has more than the {self._max_bytes} bytes that this server accepts; send smaller images."
        )
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": "too_large"}
        await JSONResponse({"error": error}, 413)(scope, receive, send)
