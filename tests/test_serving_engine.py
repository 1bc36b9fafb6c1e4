"""Engine: images join and leave between steps, do not affect each other, and every caller gets a result or an error."""

import asyncio
import gc
import threading
import time
from contextlib import aclosing

import numpy as np
import pytest
import torch
from tiny import PROMPT, cat, dog, tiny_pipeline

from realcustom.execution import GraphCaptureError
from realcustom.generation import Generation
from realcustom.request import Request, ResolvedRequest
from serving.engine.engine import Engine
from serving.engine.health import MAX_FAILED_STEPS
from serving.engine.job import Job
from serving.engine.memory import AffineCost, MemoryBudget, MemoryModel
from serving.engine.observer import Observer
from serving.engine.step_time import StepTimeModel
from serving.protocol.errors import DeadlineExceeded, InvalidRequest, QueueFull, ServerError, Unavailable
from serving.protocol.events import Progress, Queued, Result

SAMPLING = tiny_pipeline().sampling


class Watched:
    """The tiny pipeline in float64. Records the seeds of each step's batch, and can hold or fail steps.

    In lower precision the last bit of a sum depends on the batch, and in a random model, where all positions are almost
    equally relevant, that bit decides which positions a mask selects.
    """

    def __init__(self) -> None:
        self.pipeline = tiny_pipeline().to(torch.float64)
        self.batches: list[list[int]] = []
        self.gate = threading.Event()  # steps wait until it is set
        self.gate.set()
        self.step_error: Exception | None = None
        self.largest_batch = 100  # images that fit into memory

    def __getattr__(self, name):
        return getattr(self.pipeline, name)

    def step(self, generations) -> None:
        assert self.gate.wait(30)
        self.batches.append([g.request.seed for g in generations])
        if self.step_error:
            raise self.step_error
        if len(generations) > self.largest_batch:
            raise MemoryError
        self.pipeline.step(generations)


class AlwaysTogether(StepTimeModel):
    """A model without measurements, so that all images of a size step together."""

    def add(self, calls: int, row_pixels: float, seconds: float, pixels: float) -> None:
        pass


@pytest.fixture(scope="module")
def shared() -> Watched:
    return Watched()


@pytest.fixture
def watched(shared) -> Watched:
    shared.batches.clear()
    shared.step_error = None
    shared.largest_batch = 100
    shared.gate.set()
    return shared


@pytest.fixture
def engine(watched):
    engine = Engine(watched, max_batch_size=4, max_queued=4, preview_every=1, step_time=AlwaysTogether())
    yield engine
    watched.gate.set()
    engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine-")]


def request(seed: int, **settings) -> ResolvedRequest:
    return resolved(Request(**{"prompt": PROMPT, "subjects": (dog(),), "seed": seed, **settings}))


def resolved(wanted: Request) -> ResolvedRequest:
    return wanted.resolve(SAMPLING)


async def last(engine, wanted, previews=False) -> Result:
    return [event async for event in engine.stream(wanted, previews)][-1]


async def count_previews(engine, seed: int) -> int:
    """Previews of an image of 30 steps."""
    events = [e async for e in engine.stream(request(seed, num_inference_steps=30), previews=True)]
    return sum(isinstance(event, Progress) and event.preview is not None for event in events)


def pixels_alone(watched, wanted) -> np.ndarray:
    """The image of a request that runs alone."""
    generation = watched.pipeline.prepare(wanted)
    watched.pipeline.run([generation])
    return np.asarray(watched.pipeline.decode([generation])[0]).astype(int)


def difference(image, expected: np.ndarray) -> int:
    """Largest difference in 8-bit levels."""
    return np.abs(np.asarray(image).astype(int) - expected).max()


async def until(condition, timeout_s=20) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition did not become true in time"
        await asyncio.sleep(0.005)


def test_images_that_share_steps_equal_the_images_generated_alone(engine, watched):
    """For mixtures of sizes, steps, subjects and settings, the images differ by at most one 8-bit level."""
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
        assert difference(result.image, pixels_alone(watched, r)) <= 1


@pytest.mark.parametrize("case", range(6))
def test_an_image_does_not_depend_on_the_others_in_its_batches(watched, case):
    """Property: requests that arrive and are removed at random times, in batches of random sizes, return the image that
    each returns alone, up to one 8-bit level."""
    draw = np.random.default_rng(case)
    sizes = [(64, 64), (96, 64), (64, 80)]
    engine = Engine(watched, max_batch_size=int(draw.integers(2, 9)), batch_sizes=[(), (1, 2, 4)][case % 2])

    def random_request(seed: int) -> ResolvedRequest:
        height, width = sizes[draw.integers(len(sizes))]
        colors = draw.choice(["red", "blue", "lime"], size=2)
        scope_ratios = draw.uniform(0.05, 1, size=2)
        subjects = (dog(str(colors[0]), scope_ratios[0]), cat(str(colors[1]), scope_ratios[1]))
        return resolved(
            Request(
                prompt=PROMPT,
                subjects=subjects[: draw.integers(0, 3)],
                negative_prompt=str(draw.choice(["", "horse"])),
                height=height,
                width=width,
                num_inference_steps=int(draw.integers(1, 9)),
                early_stop_step=float(draw.choice([0.2, 0.5, 1.0])),
                guidance_scale=float(draw.choice([1.0, 2.5, 7.5])),
                seed=seed,
            )
        )

    async def send(wanted: ResolvedRequest, after_s: float, leaves: bool) -> Result | None:
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
        results = await asyncio.gather(*map(send, requests, arrivals, leaving))
        return zip(requests, results, leaving)

    for wanted, result, left in asyncio.run(run()):
        assert (result is None) == left
        if result is not None:
            assert difference(result.image, pixels_alone(watched, wanted)) <= 1
    assert max(map(len, watched.batches)) > 1
    engine.close()


def test_an_image_joins_between_steps(engine, watched):
    """A later image steps together with one that is active, and is done before it."""

    async def run():
        first = asyncio.create_task(last(engine, request(1, num_inference_steps=30)))
        await until(lambda: len(watched.batches) > 2)
        await last(engine, request(2, num_inference_steps=2))
        assert not first.done()
        await first

    asyncio.run(run())
    assert watched.batches[0] == [1] and [1, 2] in watched.batches and watched.batches[-1] == [1]


def test_events_count_up_with_previews_and_masks(engine):
    """Events are the queue position, each step once and in order, some previews with masks, and finally the result."""

    async def run():
        return [event async for event in engine.stream(request(1, num_inference_steps=8), previews=True)]

    events = asyncio.run(run())
    assert events[0] == Queued(0) and isinstance(events[-1], Result)
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.step for event in progress if event.preview is None] == list(range(1, 9))
    assert [event.step for event in progress] == sorted(event.step for event in progress)
    seen = [event for event in progress if event.preview is not None]
    assert seen and all(event.preview.size == (64, 64) and len(event.masks) == 1 for event in seen)


def test_previews_are_sent_while_other_images_wait(watched):
    """All images get previews, and at most the 9 that are due."""
    engine = Engine(watched, max_batch_size=2, preview_every=3)

    async def run():
        watched.gate.clear()
        tasks = [asyncio.create_task(count_previews(engine, seed)) for seed in range(3)]
        await until(lambda: engine.stats()["active"] == 2 and engine.stats()["waiting"] == 1)
        watched.gate.set()
        assert all(3 <= number <= 9 for number in await asyncio.gather(*tasks))

    asyncio.run(run())
    engine.close()


def test_closing_the_stream_removes_the_image_before_the_next_step(engine, watched):
    """The closed image is in at most the current step, and the other image is unchanged."""

    async def run():
        other = asyncio.create_task(last(engine, request(1, num_inference_steps=12)))
        async with aclosing(engine.stream(request(2, num_inference_steps=500))) as events:
            async for event in events:
                if isinstance(event, Progress):
                    break
        at = len(watched.batches)
        await until(lambda: engine.stats()["active"] <= 1)
        return await other, at

    result, at = asyncio.run(run())
    assert sum(2 in batch for batch in watched.batches[at:]) <= 1
    assert difference(result.image, pixels_alone(watched, request(1, num_inference_steps=12))) <= 1
    assert engine.stats()["active"] == engine.stats()["waiting"] == 0


def test_cancelled_tasks_leave_the_engine(engine):
    """After `task.cancel()`, as after a dropped connection, the engine has no images."""

    async def run():
        tasks = [asyncio.create_task(last(engine, request(i, num_inference_steps=500))) for i in range(6)]
        await until(lambda: engine.stats()["active"] == 4)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: not any(engine.stats()[state] for state in ("waiting", "preparing", "active")))

    asyncio.run(run())


def test_an_invalid_request_fails_alone(engine):
    """A ValueError of the pipeline is raised as InvalidRequest for its request; the other requests return images."""

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


def test_a_failing_step_raises_for_its_images_and_the_engine_continues(engine, watched):
    """Every image of the batch ends with an error; the next request succeeds."""

    async def run():
        watched.step_error = RuntimeError("out of memory")
        failed = await asyncio.gather(*(last(engine, request(i)) for i in range(3)), return_exceptions=True)
        assert all(isinstance(error, ServerError) for error in failed)
        watched.step_error = None
        engine.check_health()
        assert isinstance(await last(engine, request(9)), Result)

    asyncio.run(run())


def test_steps_that_always_fail_make_the_replica_unhealthy(watched):
    """The health check reports a broken device; its images end with Unavailable, so that another replica may retry."""
    engine = Engine(watched)
    watched.step_error = RuntimeError("device-side assert")

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
    """Images that do not fit together step in halves; each finished image is the one generated alone."""
    wanted = [request(i, num_inference_steps=6, early_stop_step=4) for i in range(4)]

    async def run():
        watched.gate.clear()
        tasks = [asyncio.create_task(last(engine, r)) for r in wanted]
        await until(lambda: engine.stats()["active"] == 4)
        watched.largest_batch = 2
        watched.gate.set()
        return await asyncio.gather(*tasks)

    for r, result in zip(wanted, asyncio.run(run())):
        assert difference(result.image, pixels_alone(watched, r)) <= 1
    engine.check_health()


def test_out_of_memory_for_one_image_raises_unavailable(engine, watched):
    """The error mentions memory, and a later request succeeds."""
    watched.largest_batch = 0
    with pytest.raises(Unavailable, match="memory"):
        asyncio.run(last(engine, request(1)))
    watched.largest_batch = 100
    assert isinstance(asyncio.run(last(engine, request(1))), Result)


def test_an_error_while_preparing_raises_unavailable(engine, watched, monkeypatch):
    """The image ends with Unavailable, so that another replica may retry; the other images are generated."""
    prepare = watched.pipeline.prepare

    def broken(wanted):
        if wanted.seed == 2:
            raise RuntimeError("the encoder has failed")
        return prepare(wanted)

    monkeypatch.setattr(watched.pipeline, "prepare", broken)

    async def run():
        return await asyncio.gather(*(last(engine, request(i)) for i in range(4)), return_exceptions=True)

    assert [type(result) for result in asyncio.run(run())] == [Result, Result, Unavailable, Result]


def test_a_deadline_removes_the_image(engine, watched):
    """Waiting or active, the image ends with DeadlineExceeded after its time; the other image is unchanged."""

    async def late(wanted):
        with pytest.raises(DeadlineExceeded, match="within"):
            async for _ in engine.stream(wanted, timeout_s=0.5):
                pass

    async def run():
        other = asyncio.create_task(last(engine, request(1, num_inference_steps=40)))
        await asyncio.gather(*(late(request(i, num_inference_steps=1000)) for i in range(2, 8)))
        await until(lambda: engine.stats()["active"] + engine.stats()["waiting"] <= 1)
        return await other

    result = asyncio.run(run())
    assert difference(result.image, pixels_alone(watched, request(1, num_inference_steps=40))) <= 1


def test_latents_that_are_not_finite_raise_a_server_error(engine, watched, monkeypatch):
    """NaN in the latents raises an error instead of returning a black image."""
    step = watched.pipeline.step

    def poisoned(generations):
        step(generations)
        for generation in generations:
            generation.latents = generation.latents * float("nan")

    monkeypatch.setattr(watched.pipeline, "step", poisoned)
    with pytest.raises(ServerError, match="not a number"):
        asyncio.run(last(engine, request(1)))


def test_a_full_queue_rejects_and_positions_count_down(engine, watched):
    """Requests beyond batch and queue are rejected immediately; waiting callers receive each new position."""

    async def run():
        watched.gate.clear()
        active = [asyncio.create_task(last(engine, request(i))) for i in range(4)]
        await until(lambda: engine.stats()["active"] == 4)
        positions: list[list[int]] = [[] for _ in range(4)]

        async def receive_positions(i):
            async for event in engine.stream(request(10 + i), False):
                if isinstance(event, Queued):
                    positions[i].append(event.position)

        waiting = [asyncio.create_task(receive_positions(i)) for i in range(4)]
        await until(lambda: engine.stats()["waiting"] == 4)
        with pytest.raises(QueueFull) as refused:
            await last(engine, request(99))
        assert 1 <= refused.value.retry_after_s <= 120
        watched.gate.set()
        await asyncio.gather(*active, *waiting)
        return positions

    positions = asyncio.run(run())
    assert [received[0] for received in positions] == [0, 1, 2, 3]
    assert all(received == sorted(received, reverse=True) for received in positions)


def test_memory_limits_the_images_in_the_engine(watched):
    """A budget of three small images admits at most three together, and an image that never fits is rejected."""
    small = 64 * 64
    none = AffineCost(0, 0)
    memory_model = MemoryModel(resident=AffineCost(0, 1), reference=0, call=none, stepping=none, decoding=none)
    engine = Engine(watched, max_batch_size=8, budget=MemoryBudget(memory_model, 3 * small))
    most = 0

    async def run():
        nonlocal most
        tasks = [asyncio.create_task(last(engine, request(i, subjects=(), num_inference_steps=20))) for i in range(7)]
        await until(lambda: engine.stats()["active"] == 3)
        while not all(task.done() for task in tasks):
            most = max(most, engine.stats()["active"])
            await asyncio.sleep(0.001)
        await asyncio.gather(*tasks)
        with pytest.raises(InvalidRequest, match="memory"):
            await last(engine, request(9, height=128, width=128))

    asyncio.run(run())
    assert most == 3
    engine.close()


def test_an_image_that_runs_out_of_memory_in_prepare_waits(watched, monkeypatch):
    """Running out of memory while another image is active returns the image to the queue; both are generated."""
    none = AffineCost(0, 0)
    memory_model = MemoryModel(resident=AffineCost(1, 0), reference=0, call=none, stepping=none, decoding=none)
    engine = Engine(watched, budget=MemoryBudget(memory_model, 100))
    prepare, failures = watched.pipeline.prepare, []

    def limited(wanted):
        if wanted.seed == 2 and not failures:
            failures.append(wanted)
            raise MemoryError
        return prepare(wanted)

    monkeypatch.setattr(watched.pipeline, "prepare", limited)

    async def run():
        watched.gate.clear()
        first = asyncio.create_task(last(engine, request(1)))
        await until(lambda: engine.stats()["active"] == 1)
        second = asyncio.create_task(last(engine, request(2)))
        await until(lambda: failures and engine.stats()["waiting"] == 1)
        watched.gate.set()
        return await asyncio.gather(first, second)

    assert [result.seed for result in asyncio.run(run())] == [1, 2]
    assert len(failures) == 1 and all(len(batch) == 1 for batch in watched.batches)
    engine.close()


def test_the_backlog_is_predicted_from_measured_steps(watched):
    """After the first image, the backlog is predicted in seconds; before, it is 0."""
    engine = Engine(watched, step_time=(step_time := StepTimeModel()))

    async def run():
        watched.gate.clear()
        tasks = [asyncio.create_task(last(engine, request(i))) for i in range(2)]
        await until(lambda: engine.stats()["active"] == 2)
        assert engine.stats()["backlog_s"] == 0 and step_time.cost is None
        watched.gate.set()
        await asyncio.gather(*tasks)
        assert engine.stats()["backlog_s"] == 0
        watched.gate.clear()
        task = asyncio.create_task(last(engine, request(3)))
        await until(lambda: engine.stats()["active"] == 1)
        assert 0 < engine.stats()["backlog_s"] < 60
        watched.gate.set()
        await task

    asyncio.run(run())
    engine.close()


def test_the_observer_receives_every_number(watched):
    """Steps, rows, mask rows, outcomes, rejections and reference cache hits reach the observer."""
    received: list[tuple[str, dict]] = []

    class Listener(Observer):
        def __getattribute__(self, name):
            if name.startswith("_"):
                return super().__getattribute__(name)
            return lambda *values, **named: received.append((name, {"values": values, **named}))

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
    outcomes = [named["values"][0] for name, named in received if name == "image"]
    assert outcomes == ["finished", "finished", "invalid", *["cancelled"] * 3]
    steps = [named for name, named in received if name == "step"][:8]
    assert [s["rows"] for s in steps] == [3, 3, 2, 2, 2, 2, 1, 1] and [s["mask_rows"] for s in steps][:3] == [1, 1, 0]
    assert sum(name == "rejected" for name, _ in received) == 1 and any(name == "first_preview" for name, _ in received)
    references = [named for name, named in received if name == "references"]
    assert references[0]["misses"] >= 1 and (references[1]["hits"], references[1]["misses"]) == (1, 0)
    engine.close()


def test_closing_ends_every_request_with_an_error(watched):
    """Waiting, active and later requests raise an error at shutdown."""
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


def test_no_image_is_kept_after_its_stream_ends(engine):
    """After finished, cancelled, rejected and expired requests, the engine keeps neither the job nor its generation."""

    async def leave(wanted: ResolvedRequest) -> None:
        async with aclosing(engine.stream(wanted)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    return

    async def late(wanted: ResolvedRequest) -> None:
        async for _ in engine.stream(wanted, timeout_s=0.01):
            pass

    async def run() -> None:
        for first in range(0, 40, 8):
            wanted = [request(seed) for seed in range(first, first + 8)]
            calls = [last(engine, r, previews=True) for r in wanted[:4]] + [leave(r) for r in wanted[4:6]]
            calls += [last(engine, request(1, height=63)), late(request(2, num_inference_steps=500))]
            await asyncio.gather(*calls, return_exceptions=True)
        await until(lambda: not sum(engine.stats()[s] for s in ("waiting", "preparing", "active", "decoding")))

    asyncio.run(run())
    gc.collect()
    assert not [kept for kept in gc.get_objects() if type(kept) in (Job, Generation)]


def test_a_step_that_does_not_end_makes_the_engine_unhealthy(watched):
    """An idle engine is healthy, as is one whose slow step has ended."""
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


def test_a_slow_step_of_a_large_image_is_not_a_hang(watched):
    """A step may take longer than `stall_timeout_s` if this is expected from measured steps of another size. A step of
    the same duration that is expected to be fast is a hang."""

    def run_with(seconds: float) -> None:
        step_time = StepTimeModel()
        step_time.add(1, 32 * 32, seconds, 32 * 32)
        engine = Engine(watched, stall_timeout_s=0.1, step_time=step_time)

        async def run():
            watched.gate.clear()
            task = asyncio.create_task(last(engine, request(1)))
            await until(lambda: engine.stats()["active"] == 1)
            await asyncio.sleep(0.5)
            try:
                engine.check_health()
            finally:
                watched.gate.set()
                await task

        asyncio.run(run())
        engine.close()

    run_with(seconds=1.0)
    with pytest.raises(RuntimeError, match="not advanced"):
        run_with(seconds=1e-5)


def test_an_internal_error_ends_every_request_and_makes_the_engine_unhealthy(watched):
    """If a thread of the engine dies, all requests raise an error, and the health check reports it."""

    class Broken(Observer):
        def step(self, **_) -> None:
            raise MemoryError

    engine = Engine(watched, observer=Broken())
    with pytest.raises(ServerError, match="MemoryError"):
        asyncio.run(last(engine, request(1)))
    with pytest.raises(RuntimeError, match="MemoryError"):
        engine.check_health()
    engine.close()


def test_a_failed_graph_capture_is_not_retried(watched):
    """A failed capture ends the engine instead of being tried with fewer images: the process cannot use its device."""
    watched.step_error = GraphCaptureError("a UNet call could not be captured as a CUDA graph")
    engine = Engine(watched)
    with pytest.raises(ServerError):
        asyncio.run(last(engine, request(1)))
    with pytest.raises(RuntimeError, match="GraphCaptureError"):
        engine.check_health()
    assert len(watched.batches) == 1
    engine.close()
