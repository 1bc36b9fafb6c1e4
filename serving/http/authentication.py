"""Checks the API key of a request before its body is read."""

import hmac

from pydantic import SecretStr
from starlette.responses import JSONResponse

PUBLIC_PATHS = ("/healthz", "/docs", "/docs/oauth2-redirect", "/openapi.json")  # accessible without a key


class Authentication:
    """ASGI middleware: responds with 401 unless the request has the header `Authorization: Bearer <api_key>`."""

    def __init__(self, app, api_key: SecretStr) -> None:
        self._app, self._api_key = app, api_key

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or self._is_public(scope) or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        message = "the API key is missing or wrong; send 'Authorization: Bearer <key>'."
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
        # The connection is closed so that the server does not receive the rest of the body
        headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
        await JSONResponse({"error": error}, 401, headers)(scope, receive, send)

    def _is_public(self, scope) -> bool:
        return scope["path"].removeprefix(scope.get("root_path", "")) in PUBLIC_PATHS

    def _has_key(self, scope) -> bool:
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        expected = self._api_key.get_secret_value().encode()
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), expected)
