"""Rejects requests with a foreign Host header, so that a website cannot reach a local server by DNS rebinding.

The website's name is made to resolve to 127.0.0.1. The visitor's browser then sends the website's requests to the local
server and lets the website read the responses, since both have the same name. Their Host header is that name.
"""

import ipaddress
import socket
from collections.abc import Sequence

from starlette.responses import JSONResponse

LOCAL_NAMES = ("localhost", socket.gethostname().lower())


class TrustedHosts:
    """ASGI middleware: responds with 403 unless the Host header is trusted.

    Args:
        hosts: names that are trusted, without a port; "*" trusts all, "*.example.com" all subdomains. None accepts any
            name for connections from other machines. For connections from this machine, it accepts the names of this
            machine and IP addresses, which need no DNS.
    """

    def __init__(self, app, hosts: Sequence[str] | None = None) -> None:
        self._app = app
        self._hosts = None if hosts is None else tuple(host.lower() for host in hosts)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] not in ("http", "websocket") or self._is_trusted(scope):
            await self._app(scope, receive, send)
            return
        message = (
            f"the host {_host(scope)[:100]!r} is not trusted; use 'localhost', or add it to the setting trusted_hosts "
            "(app.py: --trusted-host)."
        )
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": "untrusted_host"}
        await JSONResponse({"error": error}, 403, {"Connection": "close"})(scope, receive, send)

    def _is_trusted(self, scope) -> bool:
        host = _host(scope)
        if self._hosts is not None:
            return any(host == trusted or _is_subdomain(host, trusted) for trusted in self._hosts)
        server = (scope.get("server") or ("",))[0]
        return not _is_loopback(server) or host in LOCAL_NAMES or _address(host) is not None


def _host(scope) -> str:
    """The host of the Host header in lower case, without its port."""
    value = dict(scope["headers"]).get(b"host", b"").decode("latin-1").strip().lower()
    if value.startswith("["):  # an IPv6 address
        return value.partition("]")[0].removeprefix("[")
    return value.partition(":")[0]


def _is_subdomain(host: str, pattern: str) -> bool:
    return pattern == "*" or (pattern.startswith("*.") and host.endswith(pattern[1:]))


def _is_loopback(server: str) -> bool:
    address = _address(server)
    mapped = getattr(address, "ipv4_mapped", None)  # of an IPv6 socket
    return address is not None and (mapped or address).is_loopback


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
