"""Clients of a server, over HTTP or a Ray Serve handle, with the same `Request` and the same methods.

Imports httpx, numpy and PIL, but not torch; ray is imported only to translate its errors.
"""

from collections.abc import AsyncGenerator
from typing import Protocol

from realcustom.reference_image import ReferenceImage
from realcustom.request import Request, Subject, seed_variations
from realcustom.words import PromptLength, words_of

from ..protocol.errors import DeadlineExceeded, InvalidRequest, QueueFull, ServerError, TooLarge, Unavailable
from ..protocol.events import Event, Progress, Queued, Result
from ..protocol.image_codec import INPUT_FORMATS, decode_image
from ..protocol.limits import Limits
from ..protocol.model_info import ModelInfo
from .handle import HandleClient
from .http import HttpClient

__all__ = [
    "INPUT_FORMATS",
    "Client",
    "DeadlineExceeded",
    "Event",
    "HandleClient",
    "HttpClient",
    "InvalidRequest",
    "Limits",
    "ModelInfo",
    "Progress",
    "PromptLength",
    "QueueFull",
    "Queued",
    "ReferenceImage",
    "Request",
    "Result",
    "ServerError",
    "Subject",
    "TooLarge",
    "Unavailable",
    "decode_image",
    "seed_variations",
    "words_of",
]


class Client(Protocol):
    """The interface of both clients.

    All methods raise `InvalidRequest` (a ValueError), `QueueFull`, `DeadlineExceeded`, `Unavailable` or `ServerError`.
    """

    async def model(self) -> ModelInfo:
        """The loaded model: defaults, limits, vocabulary."""
        ...

    async def prompt_length(self, prompt: str) -> PromptLength:
        """How much of a prompt the text encoder reads; `prompt[:num_chars_read]` is the part that has an effect."""
        ...

    def stream(
        self, request: Request, *, previews: bool | int = True, timeout_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """Yield `Queued` and `Progress` events and finally a `Result`. Closing cancels the image within one step.

        Args:
            previews: True requests one every few steps, False none, an int this many in total.
            timeout_s: deadline in seconds from the call; the server's `max_timeout_s` also applies.
        """
        ...

    async def generate(self, request: Request, *, timeout_s: float | None = None) -> Result:
        """Return the finished image; see `stream` for `timeout_s`."""
        ...
