"""Entry point of the demo: `python app.py`. Parses flags, connects to a server, and serves the page until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.clients import Client, ModelInfo

log = logging.getLogger("app")

EXIT_ERROR = 2  # as argparse


def parse_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="RealCustom++ in the browser.")
    parser.add_argument("--url", help="connect to a running server over HTTP, for example http://127.0.0.1:8000")
    parser.add_argument("--address", help="connect to a server on a Ray cluster, for example auto or ray://HOST:10001")
    parser.add_argument("--api-key", default=os.environ.get("REALCUSTOM_API_KEY"), help="API key of the --url server")
    parser.add_argument("--model", help="model of the local server (default: the embedded model)")
    parser.add_argument(
        "--memory", choices=("high", "medium", "low"), help="memory tier of the local server (default: high)"
    )
    parser.add_argument(
        "--execution",
        choices=("auto", "eager", "graphs"),
        help="how the local server runs the model: auto replays CUDA graphs on a GPU (default: auto)",
    )
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
    parser.add_argument(
        "--trusted-host",
        action="append",
        help="name by which browsers reach the page through a proxy on this machine; may be repeated",
    )
    parser.add_argument("--mcp", action="store_true", help="also serve the tabs as tools for MCP clients")
    flags = parser.parse_args(arguments)
    if flags.mcp and find_spec("mcp") is None:
        parser.error("--mcp requires the package mcp; install it: pip install 'mcp>=1.21,<2'")
    if sum(map(bool, (flags.url, flags.address, flags.model or flags.memory or flags.execution))) > 1:
        parser.error(
            "--url, --address and --model/--memory/--execution exclude each other: a running server has its own model."
        )
    return flags


def connect(flags: argparse.Namespace) -> Client:
    """Connect to the server that the flags name. By default, start a server on this machine, which loads the model."""
    if flags.url:
        from serving.clients import HttpClient

        log.info("Connecting to %s…", flags.url)
        return HttpClient(flags.url, api_key=flags.api_key)
    log.info("Connecting to Ray at %s…" if flags.address else "Loading the model…", *filter(None, [flags.address]))
    from serving.clients.local import join, start
    from serving.settings import Settings

    if flags.address:
        return join(flags.address)
    options = {"model": flags.model, "memory": flags.memory, "execution": flags.execution}
    return start(Settings(**{name: value for name, value in options.items() if value}))


def serve_page(client: Client, info: ModelInfo, flags: argparse.Namespace) -> None:
    """Serve the page until SIGINT or SIGTERM."""
    from starlette.middleware import Middleware

    from demo.ui import build_demo, launch_demo
    from serving.http.trusted_hosts import TrustedHosts

    page = build_demo(client, info)
    middleware = [Middleware(TrustedHosts, hosts=flags.trusted_host)]
    try:
        address = launch_demo(page, info.limits, host=flags.host, port=flags.port, middleware=middleware, mcp=flags.mcp)
        log.info("Open %s in a browser. Press Ctrl-C to stop.", address)
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def disconnect(client: Client) -> None:
    """Stop the local server, or close the connection to a Ray cluster."""
    from serving.clients import HandleClient, HttpClient

    if isinstance(client, HttpClient):
        return
    from serving.clients.local import LocalServer

    if isinstance(client, LocalServer):
        client.shutdown()
    elif isinstance(client, HandleClient):
        client.close()


def main() -> int:
    """Run the demo. Returns the exit code: 0 after Ctrl-C, 2 if the server cannot be reached or started."""
    flags = parse_flags()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no hints about optional image processors
    from serving.clients import InvalidRequest, QueueFull, ServerError

    client = None
    try:
        client = connect(flags)
        serve_page(client, asyncio.run(client.model()), flags)
    except (InvalidRequest, QueueFull, ServerError, OSError) as error:
        log.error("app.py: error: %s", error)
        return EXIT_ERROR
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process immediately
        log.info("Stopping…")
        return 0
    finally:
        if client is not None:
            disconnect(client)
    return 0


if __name__ == "__main__":
    sys.exit(main())
