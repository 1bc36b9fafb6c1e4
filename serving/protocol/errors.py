"""Errors of a request, the same for Python, HTTP and Ray. They are pickled between processes, so `args` must suffice
to rebuild them."""

import errno


class InvalidRequest(ValueError):
    """The request cannot be fulfilled as given; the message names the value, the limit and the remedy (HTTP 422)."""


class TooLarge(InvalidRequest):
    """An upload has more bytes or pixels than the server accepts (HTTP 413)."""


class ServerError(RuntimeError):
    """The server failed on a valid request (HTTP 500)."""


class DeadlineExceeded(ServerError):
    """The image was not finished before the deadline of the request; it is no longer computed (HTTP 504)."""


class _TryAgain(Exception):
    """Adds `retry_after_s`: seconds to wait before the request is repeated."""

    def __init__(self, message: str, retry_after_s: float = 5.0) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.args[0]


class QueueFull(_TryAgain, RuntimeError):
    """The queue is full; repeat the request after `retry_after_s` seconds (HTTP 429)."""


class Unavailable(_TryAgain, ServerError):
    """No replica is available, or the replica failed; the same request may succeed elsewhere or later (HTTP 503)."""


def is_system_error(error: BaseException | None) -> bool:
    """Whether a resource of the operating system was unavailable, such as memory, disk space or another process.

    False for damaged files: PIL also raises `OSError` for them, but without an error number, and a seek to an invalid
    position in a damaged file is EINVAL.
    """
    if isinstance(error, OSError):
        return error.errno not in (None, errno.EINVAL, errno.EOVERFLOW)
    return isinstance(error, MemoryError)


EXPECTED_ERRORS = (InvalidRequest, QueueFull, ServerError)  # what an interface may raise; anything else is a bug
