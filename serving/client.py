"""Ask a server for pictures, over HTTP or a Ray handle, with the same `Request` and the same methods.

Light: httpx and PIL; ray is imported only when a handle raises.
"""

from collections.abc import AsyncIterator
from typing import Protocol

from realcustom.request import Request, Subject
from realcustom.words import words_of

from .errors import InvalidRequest, Overloaded, ServerError, TimedOut, TooLarge, Unavailable
from .events import Event, Progress, Queued, Result
from .handle_client import HandleClient
from .http_client import HttpClient
from .model_info import ModelInfo
from .settings import Limits

__all__ = [
    "Client",
    "Event",
    "HandleClient",
    "HttpClient",
    "InvalidRequest",
    "Limits",
    "ModelInfo",
    "Overloaded",
    "Progress",
    "Queued",
    "Request",
    "Result",
    "ServerError",
    "Subject",
    "TimedOut",
    "TooLarge",
    "Unavailable",
    "words_of",
]


class Client(Protocol):
    """What both clients offer.

    `stream` yields `Queued`, `Progress` and at last `Result`; closing it cancels the picture within one step.
    `timeout_s` is the request's deadline, in seconds from the call; the server has one of its own.
    All raise `InvalidRequest` (a ValueError), `Overloaded`, `TimedOut`, `Unavailable` or `ServerError`.
    """

    async def model(self) -> ModelInfo: ...

    def stream(
        self, request: Request, *, previews: bool | int = True, timeout_s: float | None = None
    ) -> AsyncIterator[Event]: ...

    async def generate(self, request: Request, *, timeout_s: float | None = None) -> Result: ...
