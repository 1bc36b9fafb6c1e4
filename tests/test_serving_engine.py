"""The engine: images join and leave between steps, and nobody disturbs or waits for ever."""

import asyncio
import gc
import threading
import time
from contextlib import aclosing
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import subject_image, tiny_pipeline

from realcustom import Request, Subject
from realcustom.generation import Generation
from serving.engine.engine import Engine
from serving.engine.health import MAX_FAILED_STEPS
from serving.engine.job import Job
from serving.engine.memory import AffineCost, MemoryBudget, MemoryModel
from serving.engine.observer import Observer
from serving.protocol.errors import DeadlineExceeded, InvalidRequest, QueueFull, ServerError, Unavailable
from serving.protocol.events import Progress, Queued, Result

PROMPT = "a dog and a cat"


class Watched:
    """The tiny pipeline, with each step's batch written down, and a gate that can hold steps back or break them."""

    def __init__(self) -> None:
        # In double precision: the last bit of a float sum depends on the batch, and in a random model, where all
        # positions are nearly as relevant, it decides which of them a mask takes. What remains is the engine's doing.
        self.pipeline = tiny_pipeline().to(torch.float64)
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.break_step = None
        self.largest_batch = 100  # images that the memory suffices for

    def __getattr__(self, name):
        return getattr(self.pipeline, name)

    def step(self, generations) -> None:
        assert self.gate.wait(30)
        self.batches.append([g.request.seed for g in generations])
        if self.break_step:
            raise self.break_step
        if len(generations) > self.largest_batch:
            raise MemoryError
        self.pipeline.step(generations)


@pytest.fixture(scope="module")
def shared() -> Watched:
    return Watched()


@pytest.fixture
def watched(shared) -> Watched:
    shared.batches.clear()
    shared.break_step = None
    shared.largest_batch = 100
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
    settings = {"subjects": (Subject(image=subject_image(), target_phrase="dog"),), "prompt": PROMPT, **settings}
    return Request(seed=seed, **settings)


async def last(engine, wanted, previews=False) -> Result:
    return [event async for event in engine.stream(wanted, previews)][-1]


async def previews(engine, seed: int) -> int:
    """How many an image of 30 steps gets."""
    events = [e async for e in engine.stream(request(seed, num_inference_steps=30), previews=True)]
    return sum(isinstance(event, Progress) and event.preview is not None for event in events)


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


def test_images_share_steps_and_equal_themselves_alone(engine, watched):
    """Any mixture of sizes, steps, subjects and settings gives each image what it would get alone."""
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


@pytest.mark.parametrize("case", range(6))
def test_any_neighbours_leave_a_image_as_it_is(watched, case):
    """Property: random requests that come and go at random times, in groups of random sizes, get the image that
    each gets alone; one 8-bit level at most apart."""
    draw = np.random.default_rng(case)
    sizes = [(64, 64), (96, 64), (64, 80)]
    engine = Engine(watched, max_batch_size=int(draw.integers(2, 9)), batch_sizes=[(), (1, 2, 4)][case % 2])

    def random_request(seed: int) -> Request:
        height, width = sizes[draw.integers(len(sizes))]
        phrases = ["dog", "cat"][: draw.integers(0, 3)]
        return Request(
            prompt=PROMPT,
            subjects=tuple(
                Subject(
                    image=subject_image(str(draw.choice(["red", "blue", "lime"]))),
                    target_phrase=phrase,
                    scope_ratio=float(draw.uniform(0.05, 1)),
                )
                for phrase in phrases
            ),
            negative_prompt=str(draw.choice(["", "horse"])),
            height=height,
            width=width,
            num_inference_steps=int(draw.integers(1, 9)),
            early_stop_step=float(draw.choice([0.2, 0.5, 1.0])),
            guidance_scale=float(draw.choice([1.0, 2.5, 7.5])),
            seed=seed,
        )

    async def come(wanted: Request, after_s: float, leaves: bool) -> Result | None:
        await asyncio.sleep(after_s)
        async with aclosing(engine.stream(wanted, previews=bool(draw.integers(2)))) as events:
            async for event in events:
                if isinstance(event, Result):
                    return event
                if leaves and isinstance(event, Progress):
                    return None

    async def run():
        requests = [random_request(seed) for seed in range(10)]
        leaving = [i % 5 == 4 for i in range(10)]
        arrivals = draw.exponential(0.05, size=10).cumsum()
        results = await asyncio.gather(*map(come, requests, arrivals, leaving))
        return zip(requests, results, leaving)

    for wanted, result, left in asyncio.run(run()):
        assert (result is None) == left
        if result is not None:
            assert np.abs(np.asarray(result.image).astype(int) - alone(watched, wanted)).max() <= 1
    assert max(map(len, watched.batches)) > 1
    engine.close()


def test_a_image_joins_between_steps(engine, watched):
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


def test_previews_come_all_along_also_while_others_wait(watched):
    engine = Engine(watched, max_batch_size=2, preview_every=3)

    async def run():
        watched.gate.clear()
        everyone = [asyncio.create_task(previews(engine, seed)) for seed in range(3)]
        await until(lambda: engine.stats()["active"] == 2 and engine.stats()["waiting"] == 1)
        watched.gate.set()
        assert all(3 <= number <= 9 for number in await asyncio.gather(*everyone))  # 9 are due

    asyncio.run(run())
    engine.close()


def test_cancel_frees_the_place_within_a_step_and_leaves_neighbours_alone(engine, watched):
    """Closing the stream takes the image out of the next batch; its neighbor's image is unchanged."""

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
    """What the pipeline refuses is told to its caller; the others get their images."""

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
    """Every image of the batch gets an error, not silence; the next request works."""

    async def run():
        watched.break_step = RuntimeError("out of memory")
        failed = await asyncio.gather(*(last(engine, request(i)) for i in range(3)), return_exceptions=True)
        assert all(isinstance(error, ServerError) for error in failed)
        watched.break_step = None
        engine.check_health()
        assert isinstance(await last(engine, request(9)), Result)

    asyncio.run(run())


def test_steps_that_always_fail_make_the_replica_unhealthy(watched):
    """A broken device shows in the health check, so that Ray replaces the replica; what it held may go elsewhere."""
    engine = Engine(watched)
    watched.break_step = RuntimeError("device-side assert")

    async def run():
        for seed in range(MAX_FAILED_STEPS):
            engine.check_health()
            with pytest.raises(Unavailable):
                await last(engine, request(seed))

    asyncio.run(run())
    with pytest.raises(RuntimeError, match="failed"):
        engine.check_health()
    engine.close()


def test_out_of_memory_in_a_step_halves_the_group(engine, watched):
    """Images that do not fit together step in halves, all are finished, and each is the image it is alone."""
    wanted = [request(i, num_inference_steps=6, early_stop_step=4) for i in range(4)]

    async def run():
        watched.gate.clear()
        tasks = [asyncio.create_task(last(engine, r)) for r in wanted]
        await until(lambda: engine.stats()["active"] == 4)
        watched.largest_batch = 2
        watched.gate.set()
        return await asyncio.gather(*tasks)

    for r, result in zip(wanted, asyncio.run(run())):
        assert np.abs(np.asarray(result.image).astype(int) - alone(watched, r)).max() <= 1
    engine.check_health()


def test_out_of_memory_for_one_image_is_told(engine, watched):
    watched.largest_batch = 0
    with pytest.raises(Unavailable, match="memory"):
        asyncio.run(last(engine, request(1)))
    watched.largest_batch = 100
    assert isinstance(asyncio.run(last(engine, request(1))), Result)


def test_an_encoder_error_is_told_and_may_be_tried_elsewhere(engine, watched, monkeypatch):
    """A fault while preparing ends that image with Unavailable; the others are made."""
    prepare = watched.pipeline.prepare

    def broken(wanted):
        if wanted.seed == 2:
            raise RuntimeError("the encoder has failed")
        return prepare(wanted)

    monkeypatch.setattr(watched.pipeline, "prepare", broken)

    async def run():
        return await asyncio.gather(*(last(engine, request(i)) for i in range(4)), return_exceptions=True)

    assert [type(result) for result in asyncio.run(run())] == [Result, Result, Unavailable, Result]


def test_a_deadline_ends_the_image_and_frees_its_place(engine, watched):
    """Waiting, or under way: after its time the image is given up, and its neighbor's image is unchanged."""

    async def late(wanted):
        with pytest.raises(DeadlineExceeded, match="within"):
            async for _ in engine.stream(wanted, timeout_s=0.5):
                pass

    async def run():
        neighbour = asyncio.create_task(last(engine, request(1, num_inference_steps=40)))
        await asyncio.gather(*(late(request(i, num_inference_steps=1000)) for i in range(2, 8)))
        await until(lambda: engine.stats()["active"] + engine.stats()["waiting"] <= 1)
        return await neighbour

    result = asyncio.run(run())
    expected = alone(watched, request(1, num_inference_steps=40))
    assert np.abs(np.asarray(result.image).astype(int) - expected).max() <= 1


def test_not_a_number_is_an_error_and_not_a_image(engine, watched, monkeypatch):
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
        with pytest.raises(QueueFull) as refused:
            await last(engine, request(99))
        assert 1 <= refused.value.retry_after_s <= 120
        watched.gate.set()
        await asyncio.gather(*under_way, *waiting)
        return lines

    lines = asyncio.run(run())
    assert [line[0] for line in lines] == [0, 1, 2, 3]
    assert all(line == sorted(line, reverse=True) for line in lines)


def batches_of(engine, watched, *wanted: Request) -> list[list[int]]:
    """Seeds that step together, step by step, of images that are all there from the second step on."""

    async def run():
        watched.gate.clear()
        tasks = [asyncio.create_task(last(engine, r)) for r in wanted]
        await until(lambda: engine.stats()["active"] == len(wanted))
        watched.batches.clear()
        watched.gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    return watched.batches[1:]  # the first was decided when one image was there


def test_sizes_take_turns(engine, watched):
    """Two sizes alternate, so neither starves."""
    small = [request(i, num_inference_steps=6) for i in (1, 2)]
    batches = batches_of(engine, watched, *small, request(3, height=96, num_inference_steps=6))
    turns = [3 in batch for batch in batches[:9]]
    assert all(a != b for a, b in pairwise(turns))


def test_groups_are_of_the_allowed_sizes_and_first_come_is_first_served(watched):
    """With batch sizes 1, 2, 4, five images step as 4 until these are done; then the fifth, alone."""
    engine = Engine(watched, max_batch_size=5, batch_sizes=(1, 2, 4))
    engine._pace.efficient_batch_size = len  # as if nothing were known of the device
    batches = batches_of(engine, watched, *(request(i, num_inference_steps=12) for i in range(5)))
    engine.close()
    assert {len(batch) for batch in watched.batches} <= {1, 2, 4}
    assert all(batch == [0, 1, 2, 3] for batch in batches[:10])
    assert all(batch == [4] for batch in batches[-11:])


@pytest.mark.parametrize("fixed_s, together", [(0.0, False), (10.0, True)], ids=["busy with one", "not busy with all"])
def test_images_step_together_only_as_far_as_it_pays(watched, fixed_s, together):
    """Where a step of two takes as long as two steps of one, images are finished one after the other."""
    engine = Engine(watched, max_batch_size=4)
    for pixels in (64 * 64, 4 * 64 * 64, 8 * 64 * 64):
        engine._pace.add(pixels, fixed_s + pixels * 1e-3)
    engine._pace.add = lambda *_: None
    batches = batches_of(engine, watched, *(request(i, num_inference_steps=8) for i in range(3)))
    engine.close()
    if together:
        assert batches[:7] == [[0, 1, 2]] * 7
    else:
        order = [seed for (seed,) in batches]
        assert order == sorted(order)


def test_images_come_in_as_memory_allows_and_in_order(watched):
    """A budget of three small images lets no more in together; a large one is not passed by the small ones behind
    it; one that never fits is refused with a sentence."""
    small, large = 64 * 64, 96 * 96
    none = AffineCost(0, 0)
    memory_model = MemoryModel(resident=AffineCost(0, 1), reference=0, call=none, stepping=none, decoding=none)
    engine = Engine(watched, max_batch_size=8, budget=MemoryBudget(memory_model, 3 * small))
    most, order = 0, []

    async def come(seed, **settings):
        await last(engine, request(seed, subjects=(), **settings))
        order.append(seed)

    async def run():
        nonlocal most
        tasks = [asyncio.create_task(come(i, num_inference_steps=20)) for i in range(3)]
        await until(lambda: engine.stats()["active"] == 3)
        tasks.append(asyncio.create_task(come(10, num_inference_steps=1, height=96, width=96)))
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(come(20 + i, num_inference_steps=1)) for i in range(3)]
        while not all(task.done() for task in tasks):
            with engine._condition:
                most = max(most, sum(job.memory[0] for job in engine._active))
            await asyncio.sleep(0.001)
        await asyncio.gather(*tasks)
        with pytest.raises(InvalidRequest, match="memory"):
            await last(engine, request(9, height=128, width=128))

    assert large <= 3 * small < large + small
    asyncio.run(run())
    assert most <= 3 * small
    assert order.index(10) < min(order.index(20 + i) for i in range(3))
    engine.close()


def test_everything_is_reported(watched):
    """Steps, rows, masks, outcomes, refusals and cached references reach the observer as they happened."""
    closed: list[tuple[str, dict]] = []

    class Listener(Observer):
        def __getattribute__(self, name):
            if name.startswith("_"):
                return super().__getattribute__(name)
            return lambda *values, **named: closed.append((name, {"values": values, **named}))

    engine = Engine(watched, max_batch_size=2, max_queued=1, preview_every=1, observer=Listener())
    watched.pipeline.clear_caches()

    async def run():
        await last(engine, request(1, num_inference_steps=4, early_stop_step=2), previews=True)
        await last(engine, request(2, num_inference_steps=4, guidance_scale=1.0))
        with pytest.raises(InvalidRequest):
            await last(engine, request(3, height=63))
        watched.gate.clear()
        tasks = [asyncio.create_task(last(engine, request(i))) for i in range(3)]
        await until(lambda: engine.stats()["active"] == 2)
        with pytest.raises(QueueFull):
            await last(engine, request(9))
        for task in tasks:
            task.cancel()
        watched.gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())
    outcomes = [named["values"][0] for name, named in closed if name == "image"]
    assert outcomes == ["finished", "finished", "invalid", *["cancelled"] * 3]
    steps = [named for name, named in closed if name == "step"][:8]
    assert [s["rows"] for s in steps] == [3, 3, 2, 2, 2, 2, 1, 1] and [s["mask_rows"] for s in steps][:3] == [1, 1, 0]
    assert sum(name == "rejected" for name, _ in closed) == 1 and any(name == "first_preview" for name, _ in closed)
    references = [named for name, named in closed if name == "references"]
    assert references[0]["misses"] >= 1 and (references[1]["hits"], references[1]["misses"]) == (1, 0)
    engine.close()


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


def test_nothing_of_a_image_stays_behind(engine, watched):
    """Finished, cancelled, refused or late: when its caller is gone, so are the image and its tensors."""

    async def leave(wanted: Request) -> None:
        async with aclosing(engine.stream(wanted)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    return

    async def late(wanted: Request) -> None:
        async for _ in engine.stream(wanted, timeout_s=0.01):
            pass

    async def run() -> None:
        for first in range(0, 40, 8):
            wanted = [request(seed) for seed in range(first, first + 8)]
            asked = [last(engine, r, previews=True) for r in wanted[:4]] + [leave(r) for r in wanted[4:6]]
            asked += [last(engine, request(1, height=63)), late(request(2, num_inference_steps=500))]
            await asyncio.gather(*asked, return_exceptions=True)
        await until(lambda: not sum(engine.stats()[s] for s in ("waiting", "preparing", "active", "decoding")))

    asyncio.run(run())
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) in (Job, Generation)]


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
