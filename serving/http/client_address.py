"""client_address: the sender of an HTTP request, for a fair queue."""

import ipaddress
from typing import Any

IPV6_PREFIX = 64  # a machine may use any address of such a network


def client_address(scope: Any, header: str | None = None) -> str:
    """Address of the client of an ASGI request; "" if it is unknown.

    Args:
        header: name of a header that contains it, set by a trusted proxy. Of several addresses, the last one counts,
            because the proxy appends it.
    """
    address = (scope.get("client") or ("",))[0]
    if header is not None:
        values = [value for name, value in scope["headers"] if name == header.lower().encode()]
        address = b",".join(values).decode("latin-1").rpartition(",")[2].strip() or address
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:100]
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is None:
            return str(ipaddress.ip_network((parsed, IPV6_PREFIX), strict=False))
        return str(parsed.ipv4_mapped)
    return address
