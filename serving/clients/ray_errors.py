"""Translates exceptions of Ray and Ray Serve into the errors of `serving.protocol.errors`."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

from ..protocol.errors import EXPECTED_ERRORS, InvalidRequest, QueueFull, ServerError, Unavailable

logger = logging.getLogger("ray.serve.realcustom")


@contextmanager
def translate_ray_errors(retry_after_s: float = 5.0) -> Iterator[None]:
    """Raise every error of a call to a replica as an error of the protocol; unknown errors are not changed.

    Args:
        retry_after_s: of the error `QueueFull` if Ray Serve's own queue is full.
    """
    try:
        yield
    except Exception as error:
        translated, is_fault = _translate(error, retry_after_s)
        if translated is error:
            raise
        raise translated from (error if is_fault else None)


def _translate(error: Exception, retry_after_s: float) -> tuple[Exception, bool]:
    """The error of the protocol, and whether it is a fault of the server whose cause should be kept."""
    from ray.exceptions import RayError, RayTaskError, TaskCancelledError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

    cause = error.cause if isinstance(error, RayTaskError) else error  # a replica's own error arrives wrapped
    if isinstance(cause, EXPECTED_ERRORS):
        return cause, False
    if isinstance(cause, ValueError):
        return InvalidRequest(str(cause)), False
    if isinstance(cause, BackPressureError):
        return QueueFull(
            f"the server's queue is full; try again in {math.ceil(retry_after_s)} s.", retry_after_s
        ), False
    if isinstance(cause, DeploymentUnavailableError):
        return Unavailable("no replica could be started.", 30.0), True
    if isinstance(cause, TaskCancelledError):
        return ServerError("the request was cancelled."), False
    if isinstance(cause, RayError | RayServeException):  # the replica died or cannot be reached
        logger.warning("a replica died or cannot be reached: %s", type(cause).__name__)
        return Unavailable(f"the replica died or cannot be reached ({type(cause).__name__}); try again.", 1.0), True
    if isinstance(error, RayError):  # a bug: another replica would fail in the same way
        logger.error("the replica failed", exc_info=error)
        return ServerError(f"the replica failed ({type(cause).__name__})."), True
    return error, False
