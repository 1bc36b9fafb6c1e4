"""The ways a request can fail, the same behind every door. They cross process borders, so `args` rebuild them."""


class InvalidRequest(ValueError):
    """The caller asked for something that cannot be made; the message says what and what to do (HTTP 422)."""


class TooLarge(InvalidRequest):
    """More bytes than the server takes (HTTP 413)."""


class ServerError(RuntimeError):
    """The server failed; the request itself was fine (HTTP 500)."""


class DeadlineExceeded(ServerError):
    """The request's deadline has passed; its place is free again (HTTP 504)."""


class _TryAgain:
    """Carries `retry_after_s`: when to ask again, in seconds."""

    def __init__(self, message: str, retry_after_s: float = 5.0) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.args[0]


class QueueFull(_TryAgain, RuntimeError):
    """Every place is taken; try again after `retry_after_s` seconds (HTTP 429)."""


class Unavailable(_TryAgain, ServerError):
    """A replica died, stops or failed at this image; the same request may succeed elsewhere or later (HTTP 503)."""
