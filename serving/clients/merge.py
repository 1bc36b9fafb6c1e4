"""Merges the event streams of several images into one."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merge_streams(
    streams: Sequence[AsyncGenerator[T, None]], *, heartbeat_s: float | None = None
) -> AsyncGenerator[list[tuple[int, T]], None]:
    """Yield the events of all streams in batches, each event with the index of its stream.

    A batch holds every event that arrived since the previous batch, in order of arrival, so a slow consumer gets
    larger batches and no event is lost. The iterator ends when all streams have ended.

    Args:
        streams: async generators that have not been started.
        heartbeat_s: yield an empty batch after this many seconds without an event; None yields no empty batches.
    Raises:
        Exception: the error of the first stream that fails, after the events that arrived before it. All other
            streams are closed then. Closing the iterator or cancelling its task also closes all streams.
    """
    # Not `asyncio.wait_for(queue.get(), heartbeat_s)`: before Python 3.12 it drops a cancellation that coincides with
    # an event.
    pending: list[tuple[int, T]] = []
    wake = asyncio.Event()

    async def follow(index: int, stream: AsyncGenerator[T, None]) -> None:
        async with aclosing(stream):
            async for event in stream:
                pending.append((index, event))
                wake.set()

    tasks = [asyncio.create_task(follow(index, stream)) for index, stream in enumerate(streams)]
    for task in tasks:
        task.add_done_callback(lambda _: wake.set())
    try:
        ended = not tasks
        while not ended:
            await _wait(wake, heartbeat_s)
            wake.clear()
            batch, pending = pending, []
            done = [task for task in tasks if task.done()]
            failed = [task for task in done if task.cancelled() or task.exception()]
            ended = len(done) == len(tasks) or bool(failed)
            if batch or (heartbeat_s is not None and not ended):
                yield batch
            if failed:
                failed[0].result()  # raises
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _wait(event: asyncio.Event, timeout_s: float | None) -> None:
    """Return when the event is set, which happens after `timeout_s` seconds at the latest."""
    timer = None if timeout_s is None else asyncio.get_running_loop().call_later(timeout_s, event.set)
    try:
        await event.wait()
    finally:
        if timer is not None:
            timer.cancel()
