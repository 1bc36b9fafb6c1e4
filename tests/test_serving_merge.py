"""merge_streams: all events in order, one failure or a close ends all streams, and heartbeats keep it responsive."""

import asyncio
import time
from contextlib import aclosing

import pytest

from serving.clients.merge import merge_streams


class Stream:
    """Plays a script: a number is a pause in seconds, an exception is raised, anything else is an event."""

    def __init__(self, *script) -> None:
        self._script = script
        self.closed = False

    async def __call__(self):
        try:
            for item in self._script:
                if isinstance(item, float):
                    await asyncio.sleep(item)
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            self.closed = True


FOREVER = 1e6


async def collect(streams, **options) -> list:
    async with aclosing(merge_streams([stream() for stream in streams], **options)) as batches:
        return [batch async for batch in batches]


def test_all_events_arrive_in_the_order_of_their_stream():
    streams = [Stream("a", 0.01, "b"), Stream(), Stream("c", "d", 0.02, "e")]
    events = [event for batch in asyncio.run(collect(streams)) for event in batch]
    assert [event for index, event in events if index == 0] == ["a", "b"]
    assert [event for index, event in events if index == 2] == ["c", "d", "e"]
    assert len(events) == 5 and all(stream.closed for stream in streams)


def test_no_streams_end_at_once():
    assert asyncio.run(collect([])) == []


def test_a_slow_consumer_gets_one_batch_of_all_events():
    """Events that arrive while the consumer is busy are delivered together; none is lost."""

    async def run():
        sizes = []
        async with aclosing(merge_streams([Stream(*range(50))(), Stream("x", 0.1, "y")()])) as batches:
            async for batch in batches:
                sizes.append(len(batch))
                await asyncio.sleep(0.05)
        return sizes

    sizes = asyncio.run(run())
    assert sum(sizes) == 52 and max(sizes) >= 50 and 0 not in sizes


def test_a_failure_is_raised_after_earlier_events_and_closes_all_streams():
    streams = [Stream("a", FOREVER), Stream("b", 0.01, ValueError("broken"))]
    received = []

    async def run():
        async for batch in merge_streams([stream() for stream in streams]):
            received.extend(batch)

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(run())
    assert sorted(received) == [(0, "a"), (1, "b")] and all(stream.closed for stream in streams)


def test_a_stream_that_is_cancelled_from_inside_does_not_block_the_others():
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(collect([Stream("a", FOREVER), Stream(asyncio.CancelledError())]))


def test_closing_the_iterator_closes_all_streams():
    streams = [Stream("a", FOREVER), Stream(FOREVER)]

    async def run():
        async with aclosing(merge_streams([stream() for stream in streams])) as batches:
            await anext(batches)
        assert all(stream.closed for stream in streams)

    asyncio.run(run())


def test_cancellation_that_coincides_with_an_event_is_not_lost():
    """The task ends as cancelled and all streams are closed, even if an event arrives in the same loop iteration."""
    streams = [Stream("a", 0.01, "b", FOREVER), Stream(FOREVER)]

    async def run():
        async def consume():
            async for batch in merge_streams([stream() for stream in streams], heartbeat_s=1):
                if (0, "b") in batch:
                    raise AssertionError("the cancellation was lost")

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.005)
        time.sleep(0.02)  # the event is due now
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all(stream.closed for stream in streams)

    asyncio.run(run())


def test_heartbeats_are_empty_batches_in_silence():
    batches = asyncio.run(collect([Stream("a", 0.1, "b")], heartbeat_s=0.02))
    assert batches[0] == [(0, "a")] and [(0, "b")] in batches
    assert 1 <= batches.count([]) <= 6


def test_without_heartbeat_no_batch_is_empty():
    assert [] not in asyncio.run(collect([Stream("a", 0.05, "b"), Stream(0.02)]))
