"""Generates an image on a running server and prints its progress. Usage: python -m examples.http_client [URL] [OUT.png]

Start a server with `serve run serving:app` first.
"""

import asyncio
import sys

from PIL import Image

from realcustom.assets import EXAMPLE_IMAGES
from serving.clients import HttpClient, Progress, Request, Result, Subject


async def main(url: str = "http://127.0.0.1:8000", out: str = "http_client.png") -> None:
    dog = Subject(image=Image.open(EXAMPLE_IMAGES / "dog.png"), target_phrase="dog")
    request = Request(prompt="a dog on the beach", subjects=(dog,), seed=7)
    async for event in HttpClient(url).stream(request):
        if isinstance(event, Progress):
            print(f"step {event.step} of {event.num_steps}")
        elif isinstance(event, Result):
            event.image.save(out)


asyncio.run(main(*sys.argv[1:]))
