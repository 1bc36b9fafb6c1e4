"""The engine: pictures join and leave between steps, and nobody disturbs or waits for ever."""

import asyncio
import threading
import time
from contextlib import aclosing
from itertools import pairwise

import numpy as np
import pytest
from tiny import picture, tiny_pipeline

from realcustom import Request, Subject
from serving.engine import Engine
from serving.errors import InvalidRequest, Overloaded, ServerError
from serving.events import Progress, Queued, Result

PROMPT = "a dog and a cat"


class Watched:
    """The tiny pipeline, with each step's batch written down, and a gate that can hold steps back or break them."""

    def __init__(self) -> None:
        self.pipeline = tiny_pipeline()
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.break_step = None

    def __getattr__(self, name):
        return getattr(self.pipeline, name)

    def step(self, generations) -> None:
        assert self.gate.wait(30)
        self.batches.append([g.request.seed for g in generations])
        if self.break_step:
            raise self.break_step
        self.pipeline.step(generations)


@pytest.fixture(scope="module")
def shared() -> Watched:
    return Watched()


@pytest.fixture
def watched(shared) -> Watched:
    shared.batches.clear()
    shared.break_step = None
    shared.gate.set()
    return shared


@pytest.fixture
def engine(watched):
    engine = Engine(watched, max_batch_size=4, max_queued=4, preview_every=1)
    yield engine
    watched.gate.set()
    engine.close()
    assert not any(thread.is_alive() for thread in engine._threads)


def request(seed: int, **settings) -> Request:
    settings = {"subjects": (Subject(image=picture(), target_phrase="dog"),), "prompt": PROMPT, **settings}
    return Request(seed=seed, **settings)


async def last(engine, wanted, previews=False) -> Result:
    return [event async for event in engine.stream(wanted, previews)][-1]


def alone(watched, wanted) -> np.ndarray:
    generation = watched.pipeline.prepare(wanted)
    while not generation.done:
        watched.pipeline.step([generation])
    return np.asarray(watched.pipeline.decode([generation])[0]).astype(int)


async def until(condition, timeout_s=20) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.005)


def test_pictures_share_steps_and_equal_themselves_alone(engine, watched):
    """Any mixture of sizes, steps, subjects and settings gives each picture what it would get alone."""
    wanted = [
        request(1),
        request(2, num_inference_steps=6, guidance_scale=1.0),
        request(3, subjects=()),
        request(4, height=96, width=64, early_stop_step=1),
        request(5, prompt="a dog", negative_prompt="cat"),
        request(6, height=96, width=64, num_inference_steps=2),
    ]

    async def run():
        return await asyncio.gather(*(last(engine, r) for r in wanted))

    results = asyncio.run(run())
    assert max(map(len, watched.batches)) > 1
    for r, result in zip(wanted, results):
        assert result.seed == r.seed and len(result.masks) == len(r.subjects)
        assert all(mask.size == result.image.size and mask.mode == "L" for mask in result.masks)
        assert np.abs(np.asarray(result.image).astype(int) - alone(watched, r)).max() <= 1


def test_a_picture_joins_between_steps(engine, watched):
    """One that comes later is stepped together with one under way, which is not done yet."""

    async def run():
        first = asyncio.create_task(last(engine, request(1, num_inference_steps=30)))
        await until(lambda: len(watched.batches) > 2)
        await last(engine, request(2, num_inference_steps=2))
        assert not first.done()
        await first

    asyncio.run(run())
    assert watched.batches[0] == [1] and [1, 2] in watched.batches and watched.batches[-1] == [1]


def test_events_count_up_with_previews_and_masks(engine):
    """Position, then every step once in order, previews with their masks between, the result last."""

    async def run():
        return [event async for event in engine.stream(request(1, num_inference_steps=8), previews=True)]

    events = asyncio.run(run())
    assert events[0] == Queued(0) and isinstance(events[-1], Result)
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.step for event in progress if event.preview is None] == list(range(1, 9))
    assert [event.step for event in progress] == sorted(event.step for event in progress)
    seen = [event for event in progress if event.preview is not None]
    assert seen and all(event.preview.size == (64, 64) and len(event.masks) == 1 for event in seen)


def test_cancel_frees_the_place_within_a_step_and_leaves_neighbours_alone(engine, watched):
    """Closing the stream takes the picture out of the next batch; its neighbour's picture is unchanged."""

    async def run():
        neighbour = asyncio.create_task(last(engine, request(1, num_inference_steps=12)))
        async with aclosing(engine.stream(request(2, num_inference_steps=500))) as events:
            async for event in events:
                if isinstance(event, Progress):
                    break
        at = len(watched.batches)
        await until(lambda: engine.stats()["active"] <= 1)
        result = await neighbour
        return result, at

    result, at = asyncio.run(run())
    assert sum(2 in batch for batch in watched.batches[at:]) <= 1
    expected = alone(watched, request(1, num_inference_steps=12))
    assert np.abs(np.asarray(result.image).astype(int) - expected).max() <= 1
    assert engine.stats()["active"] == engine.stats()["waiting"] == 0


def test_a_cancelled_task_frees_its_place(engine):
    """`task.cancel()`, what a dropped connection ends in, empties the engine."""

    async def run():
        tasks = [asyncio.create_task(last(engine, request(i, num_inference_steps=500))) for i in range(6)]
        await until(lambda: engine.stats()["active"] == 4)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: not any(engine.stats()[state] for state in ("waiting", "preparing", "active")))

    asyncio.run(run())


def test_a_bad_request_fails_alone(engine, watched):
    """What the pipeline refuses is told to its caller; the others get their pictures."""

    async def run():
        return await asyncio.gather(
            last(engine, request(1)),
            last(engine, request(2, height=63)),
            last(engine, request(3)),
            return_exceptions=True,
        )

    first, bad, third = asyncio.run(run())
    assert isinstance(first, Result) and isinstance(third, Result)
    assert isinstance(bad, InvalidRequest) and "63" in str(bad)


def test_a_failing_step_is_told_and_the_engine_goes_on(engine, watched):
    """Every picture of the batch gets an error, not silence; the next request works."""

    async def run():
        watched.break_step = RuntimeError("out of memory")
        failed = await asyncio.gather(*(last(engine, request(i)) for i in range(3)), return_exceptions=True)
        assert all(isinstance(error, ServerError) for error in failed)
        watched.break_step = None
        engine.check_health()
        assert isinstance(await last(engine, request(9)), Result)

    asyncio.run(run())


def test_not_a_number_is_an_error_and_not_a_picture(engine, watched, monkeypatch):
    """Latents that became NaN end in a clear error."""
    step = watched.pipeline.step

    def poisoned(generations):
        step(generations)
        for generation in generations:
            generation.latents = generation.latents * float("nan")

    monkeypatch.setattr(watched.pipeline, "step", poisoned)
    with pytest.raises(ServerError, match="not a number"):
        asyncio.run(last(engine, request(1)))


def test_full_is_said_and_positions_move_up(engine, watched):
    """Beyond batch and queue a request is refused at once; those waiting hear their place in line."""

    async def run():
        watched.gate.clear()
        under_way = [asyncio.create_task(last(engine, request(i))) for i in range(4)]
        await until(lambda: engine.stats()["active"] == 4)
        lines: list[list[int]] = [[] for _ in range(4)]

        async def wait_in_line(i):
            async for event in engine.stream(request(10 + i), False):
                if isinstance(event, Queued):
                    lines[i].append(event.position)

        waiting = [asyncio.create_task(wait_in_line(i)) for i in range(4)]
        await until(lambda: engine.stats()["waiting"] == 4)
        with pytest.raises(Overloaded):
            await last(engine, request(99))
        watched.gate.set()
        await asyncio.gather(*under_way, *waiting)
        return lines

    lines = asyncio.run(run())
    assert [line[0] for line in lines] == [0, 1, 2, 3]
    assert all(line == sorted(line, reverse=True) for line in lines)


def test_sizes_take_turns(engine, watched):
    """Two sizes alternate, so neither starves."""

    async def run():
        watched.gate.clear()
        tasks = [asyncio.create_task(last(engine, request(i, num_inference_steps=6))) for i in (1, 2)]
        tasks += [asyncio.create_task(last(engine, request(3, height=96, num_inference_steps=6)))]
        await until(lambda: engine.stats()["active"] == 3)
        watched.batches.clear()
        watched.gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    turns = [3 in batch for batch in watched.batches[1:10]]
    assert all(a != b for a, b in pairwise(turns))


def test_closing_tells_everyone(watched):
    """Shutdown leaves nobody pending: waiting and active callers get an error, and so do later ones."""
    engine = Engine(watched, max_batch_size=2, max_queued=8)

    async def run():
        watched.gate.clear()
        tasks = [asyncio.create_task(last(engine, request(i))) for i in range(5)]
        await until(lambda: engine.stats()["active"] == 2 and engine.stats()["waiting"] == 3)
        closing = asyncio.to_thread(engine.close)
        asyncio.get_running_loop().call_later(0.2, watched.gate.set)
        await closing
        errors = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert all(isinstance(error, ServerError) for error in errors)
        with pytest.raises(ServerError):
            await last(engine, request(9))

    asyncio.run(run())
    with pytest.raises(RuntimeError):
        engine.check_health()


def test_health_means_that_steps_advance(watched):
    """A step that does not end makes the engine unhealthy, and an idle engine is healthy."""
    engine = Engine(watched, stall_timeout_s=0.3)

    async def run():
        engine.check_health()
        watched.gate.clear()
        task = asyncio.create_task(last(engine, request(1)))
        await until(lambda: engine.stats()["active"] == 1)
        await asyncio.sleep(0.5)
        with pytest.raises(RuntimeError, match="not advanced"):
            engine.check_health()
        watched.gate.set()
        await task
        engine.check_health()

    asyncio.run(run())
    engine.close()


def test_a_dead_thread_leaves_nobody_waiting(watched, monkeypatch):
    """A fault in the engine itself is told to everyone and shown by the health check."""
    engine = Engine(watched)

    def broken():
        raise MemoryError

    monkeypatch.setattr(engine, "_next_group", broken)
    with pytest.raises(ServerError, match="MemoryError"):
        asyncio.run(last(engine, request(1)))
    with pytest.raises(RuntimeError):
        engine.check_health()
    engine.close()
