"""Repeats a failed attempt and resumes its event stream where the failed attempt stopped."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from ..protocol.errors import QueueFull, Unavailable
from ..protocol.events import Event, Progress

logger = logging.getLogger("ray.serve.realcustom")

RetryableError = QueueFull | Unavailable


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Configuration of retries: which errors, how often, and after what delay.

    Attributes:
        max_retries: attempts after the first one.
        retry_on: error types after which another attempt may succeed.
        delay_s: seconds to wait, given the index of the failed attempt (from 0) and its error.
    """

    max_retries: int
    retry_on: tuple[type[RetryableError], ...]
    delay_s: Callable[[int, RetryableError], float]


def short_backoff(attempt: int, error: RetryableError) -> float:
    """0.1, 0.4, 1.6, ... seconds: the time that Ray Serve's router needs to notice that a replica has died."""
    return 0.1 * 4**attempt


def server_backoff(attempt: int, error: RetryableError) -> float:
    """The delay that the server requests, at least 1, 2, 4, ... seconds, plus up to 20% of jitter."""
    return max(error.retry_after_s, 2.0**attempt) * random.uniform(1, 1.2)


async def resume(
    attempt: Callable[[], AsyncGenerator[Event, None]], policy: RetryPolicy, *, deadline: float | None = None
) -> AsyncGenerator[Event, None]:
    """Yield the events of an attempt; if it fails, those of the next attempt beyond the last step reported.

    The request of all attempts must have the same seed, so that each one computes the same image.

    Args:
        attempt: starts an attempt.
        deadline: `time.monotonic()` after which no attempt is started; None sets no limit.
    Raises:
        RetryableError: the error of the last attempt, if no attempts or no time are left. Other errors are not retried.
    """
    step = 0
    for index in range(policy.max_retries + 1):
        try:
            async with aclosing(attempt()) as events:
                async for event in events:
                    if isinstance(event, Progress):
                        if event.step < step or (event.step == step and event.preview is None):
                            continue  # reported by an earlier attempt
                        step = event.step
                    yield event
            return
        except policy.retry_on as error:
            delay_s = policy.delay_s(index, error)
            if index == policy.max_retries or (deadline is not None and time.monotonic() + delay_s >= deadline):
                raise
            logger.warning("attempt %d failed, retrying in %.1f s: %s", index + 1, delay_s, error)
            await asyncio.sleep(delay_s)
