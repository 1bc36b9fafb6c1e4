"""Ask a server for images, over HTTP or a Ray handle, with the same `Request` and the same methods.

Light: httpx and PIL; ray is imported only when a handle raises.
"""

from collections.abc import AsyncGenerator
from typing import Protocol

from realcustom.request import Request, Subject, seed_variations
from realcustom.words import words_of

from ..protocol.errors import DeadlineExceeded, InvalidRequest, QueueFull, ServerError, TooLarge, Unavailable
from ..protocol.events import Event, Progress, Queued, Result
from ..protocol.limits import Limits
from ..protocol.model_info import ModelInfo
from .handle import HandleClient
from .http import HttpClient

__all__ = [
    "Client",
    "DeadlineExceeded",
    "Event",
    "HandleClient",
    "HttpClient",
    "InvalidRequest",
    "Limits",
    "ModelInfo",
    "Progress",
    "QueueFull",
    "Queued",
    "Request",
    "Result",
    "ServerError",
    "Subject",
    "TooLarge",
    "Unavailable",
    "seed_variations",
    "words_of",
]


class Client(Protocol):
    """What both clients offer.

    `stream` yields `Queued`, `Progress` and at last `Result`; closing it cancels the image within one step.
    `timeout_s` is the request's deadline, in seconds from the call; the server has one of its own.
    All raise `InvalidRequest` (a ValueError), `QueueFull`, `DeadlineExceeded`, `Unavailable` or `ServerError`.
    """

    async def model(self) -> ModelInfo: ...

    def stream(
        self, request: Request, *, previews: bool | int = True, timeout_s: float | None = None
    ) -> AsyncGenerator[Event, None]: ...

    async def generate(self, request: Request, *, timeout_s: float | None = None) -> Result: ...
