"""Start the demo: `python app.py`. Flags and wiring only."""

import argparse
import asyncio
import os


def parse_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="RealCustom++ in the browser.")
    parser.add_argument("--url", help="use a running server by its HTTP address, such as http://127.0.0.1:8000")
    parser.add_argument("--address", help="use a server running on a Ray cluster, such as auto or ray://HOST:10001")
    parser.add_argument("--api-key", default=os.environ.get("REALCUSTOM_API_KEY"), help="sent to the server of --url")
    parser.add_argument("--model", default=None, help="model of the local server (default: the one that is shipped)")
    parser.add_argument(
        "--memory", choices=("high", "medium", "low"), help="of the local server's model (default: high)"
    )
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
    flags = parser.parse_args(arguments)
    if sum(map(bool, (flags.url, flags.address, flags.model or flags.memory))) > 1:
        parser.error("--url, --address and --model or --memory exclude each other: a running server has its own model.")
    return flags


def connect(flags: argparse.Namespace):
    """A client of the server the flags name; without one, of a Ray Serve of our own on this machine."""
    if flags.url:
        from serving.clients import HttpClient

        return HttpClient(flags.url, api_key=flags.api_key)
    if flags.address:
        from serving.clients.local import join

        return join(flags.address)
    from serving.clients.local import start
    from serving.settings import Settings

    given = {"model": flags.model, "memory": flags.memory}
    return start(Settings(**{name: value for name, value in given.items() if value}))


def main() -> None:
    flags = parse_flags()
    client = connect(flags)

    from demo.theme import CSS, THEME
    from demo.ui import build_demo

    info = asyncio.run(client.model())
    build_demo(client, info).launch(
        server_name=flags.host,
        server_port=flags.port,
        theme=THEME,
        css=CSS,
        share=False,
        max_file_size=info.limits.max_image_bytes,
        footer_links=["api"],
        ssr_mode=False,
    )


if __name__ == "__main__":
    main()
