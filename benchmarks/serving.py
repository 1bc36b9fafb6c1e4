"""Continuous batching against request-level batching and one at a time: the same arrivals, on one pipeline.

    python benchmarks/serving.py                         # minutes per load; writes benchmarks/results/serving.{json,md}
    python benchmarks/serving.py --seconds 5 --loads 0.8 # a first look

Open loop: images arrive by a Poisson process, or in bursts, whether or not earlier ones are done, so that waiting is
counted in full. Capacity is what a side makes with full batches; loads are fractions of that of `Engine`, the same
arrivals for all sides. Below capacity every side's throughput is the arrivals', less the wait for the last image.
Each load's arrivals are played to one side after the other in turns, within one process.

- step: `serving.engine.Engine`, images join and leave between steps.
- request: Ray Serve's `@serve.batch` around whole generations: a batch is collected, made to its end, then the next.
- patient: whole generations, too, but a batch closes only when the device is free: the best that request-level batching
  can do. `@serve.batch` closes one after a fixed wait, and while the device is busy the next ones close small.
- single: one image after the other.
"""

import argparse
import asyncio
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from ray import serve
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.context import _set_internal_replica_context

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.report import save
from realcustom import RealCustomPipeline, Request, Subject
from serving.engine.engine import Engine
from serving.engine.observer import Observer
from serving.protocol.events import Progress

SIDES = ("step", "request", "patient", "single")
CAPACITY_TURNS = 4
BATCH_WAIT_S = 0.05  # how long @serve.batch collects, also while an earlier batch is being made


@dataclass
class Timing:
    """Of one image: when it came, was first seen, and was finished; seconds."""

    arrived: float
    previewed: float | None = None
    finished: float | None = None


@dataclass
class BatchSizes(Observer):
    """Images in each step."""

    sizes: list[int] = field(default_factory=list)

    def step(self, *, images: int, **_) -> None:
        self.sizes.append(images)


class StepSide:
    """Images join and leave between steps."""

    def __init__(self, pipeline, max_batch_size: int) -> None:
        self.batches = BatchSizes()
        self._engine = Engine(pipeline, max_batch_size=max_batch_size, max_queued=100_000, observer=self.batches)

    async def make(self, request: Request, timing: Timing) -> None:
        async with aclosing(self._engine.stream(request, previews=True)) as events:
            async for event in events:
                if isinstance(event, Progress) and event.preview is not None and timing.previewed is None:
                    timing.previewed = time.perf_counter()
        timing.finished = time.perf_counter()

    def close(self) -> None:
        self._engine.close()


class Whole:
    """Whole generations: a batch is made to its end before the next one starts; no previews on the way.

    Images of a batch with fewer steps wait for those with more, as in any server that calls a pipeline.
    """

    def __init__(self, pipeline) -> None:
        self.batches = BatchSizes()
        self._pipeline = pipeline

    async def _make(self, requests: Sequence[Request]) -> list[float]:
        """When each was finished: all at once."""
        await asyncio.to_thread(self._generate, requests)
        return [time.perf_counter()] * len(requests)

    def _generate(self, requests: Sequence[Request]) -> None:
        generations = [self._pipeline.prepare(request) for request in requests]
        under_way = generations
        while under_way := [g for g in under_way if not g.done]:
            for size in {g.size for g in under_way}:
                group = [g for g in under_way if g.size == size]
                self.batches.step(images=len(group))
                self._pipeline.step(group)
        self._pipeline.decode(generations)

    def close(self) -> None:
        pass


class RequestSide(Whole):
    """Batches of `@serve.batch`; of one image, with a `max_batch_size` of 1."""

    def __init__(self, pipeline, max_batch_size: int) -> None:
        super().__init__(pipeline)
        _answer_for_the_replica()

        @serve.batch(max_batch_size=max_batch_size, batch_wait_timeout_s=BATCH_WAIT_S if max_batch_size > 1 else 0)
        async def whole(requests: list[Request]) -> list[float]:
            return await self._make(requests)

        self._whole = whole

    async def make(self, request: Request, timing: Timing) -> None:
        timing.finished = await self._whole(request)


class PatientSide(Whole):
    """Whenever the device is free, all who wait by then are the next batch."""

    def __init__(self, pipeline, max_batch_size: int) -> None:
        super().__init__(pipeline)
        self._max_batch_size = max_batch_size
        self._waiting: list[tuple[Request, Timing]] = []
        self._device = asyncio.Lock()  # wakes those who wait in the order in which they came

    async def make(self, request: Request, timing: Timing) -> None:
        self._waiting.append((request, timing))
        async with self._device:
            if timing.finished is None:  # no batch has taken it along
                batch, self._waiting = self._waiting[: self._max_batch_size], self._waiting[self._max_batch_size :]
                finished = await self._make([request for request, _ in batch])
                for (_, one), at in zip(batch, finished, strict=True):
                    one.finished = at


def _answer_for_the_replica() -> None:
    """`@serve.batch` asks its replica how many requests may come at once, and here it runs without one."""
    _set_internal_replica_context(
        replica_id=ReplicaID("benchmark", DeploymentID("benchmark")),
        servable_object=None,
        _deployment_config=DeploymentConfig(max_ongoing_requests=100_000),
        rank=None,
        world_size=1,
    )


def build(side: str, pipeline, max_batch_size: int):
    if side == "single":
        return RequestSide(pipeline, 1)
    sides = {"step": StepSide, "request": RequestSide, "patient": PatientSide}
    return sides[side](pipeline, max_batch_size)


# ---- load ---------------------------------------------------------------------------------------------------------


def requests(number: int, pipeline: RealCustomPipeline, seed: int) -> list[Request]:
    """Images as people ask for them: one or two subjects from a few references, some with fewer steps."""
    draw = np.random.default_rng(seed)
    colors = ("red", "green", "blue", "gold")
    steps = pipeline.sampling.num_inference_steps
    made = []
    for index in range(number):
        phrases = ("dog", "cat")[: draw.integers(1, 3)]
        subjects = tuple(
            Subject(image=Image.new("RGB", (64, 64), colors[draw.integers(4)]), target_phrase=phrase)
            for phrase in phrases
        )
        made.append(
            Request(
                prompt="a dog and a cat on the beach",
                subjects=subjects,
                num_inference_steps=int(draw.choice([steps, steps, max(1, steps // 2)])),
                seed=index,
            )
        )
    return made


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival times in [0, seconds)."""
    draw, times, now = np.random.default_rng(seed), [], 0.0
    while (now := now + draw.exponential(1 / rate)) < seconds:
        times.append(now)
    return times


def bursts(rate: float, seconds: float, size: int) -> list[float]:
    """The same mean rate, in bursts of `size` at once."""
    period = size / rate
    return [period * burst for burst in range(max(1, int(seconds / period))) for _ in range(size)]


async def play(make: Callable[[Request, Timing], Awaitable[None]], wanted: Sequence[Request], times: Sequence[float]):
    """Let the requests arrive at their times, and wait for the last image."""
    start = time.perf_counter()

    async def one(request: Request, at: float) -> Timing:
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        timing = Timing(arrived=start + at)
        await make(request, timing)
        return timing

    return await asyncio.gather(*map(one, wanted, times))


def capacity(side: str, pipeline: RealCustomPipeline, max_batch_size: int, seconds: float) -> float:
    """Images per second of a side that always has enough of them waiting for a full batch.

    Counted from the first full batch's end to the last end within `seconds`: before, places fill, and after, nobody
    comes any more. So as much is under way, and not counted, at the end as at the beginning.
    """
    maker = build(side, pipeline, max_batch_size)
    wanted = iter(requests(10_000, pipeline, seed=1))

    async def run() -> list[float]:
        start, finished = time.perf_counter(), []

        async def keep_busy() -> None:
            while time.perf_counter() - start < seconds:
                await maker.make(next(wanted), Timing(0))
                finished.append(time.perf_counter() - start)

        await asyncio.gather(*(keep_busy() for _ in range(2 * max_batch_size)))
        return finished

    finished = asyncio.run(run())
    maker.close()
    begin = finished[max_batch_size - 1]
    counted = [at for at in finished if begin < at < seconds]
    if not counted:
        raise ValueError(f"{seconds:.0f} s are too short for two batches of {max_batch_size}; ask for more --seconds.")
    return len(counted) / (counted[-1] - begin)


def capacities(pipeline: RealCustomPipeline, flags: argparse.Namespace) -> dict[str, float]:
    """Of all sides; in turns, as a shared machine changes from minute to minute."""
    for side in SIDES:  # not counted: libraries prepare themselves for every new batch shape
        capacity(side, pipeline, flags.max_batch_size, min(20, flags.seconds))
    turns = [
        {side: capacity(side, pipeline, flags.max_batch_size, flags.seconds / 2) for side in SIDES[:: (-1) ** turn]}
        for turn in range(CAPACITY_TURNS)
    ]
    return {side: statistics.fmean(turn[side] for turn in turns) for side in SIDES}


def summary(rounds: Sequence[Sequence[Timing]], sizes: Sequence[int]) -> dict[str, float]:
    timings = [timing for one in rounds for timing in one]
    latencies = np.array([t.finished - t.arrived for t in timings])
    # Without previews on the way, the first look is the finished image.
    previews = [(t.previewed or t.finished) - t.arrived for t in timings]
    span = sum(max(t.finished for t in one) - min(t.arrived for t in one) for one in rounds)
    return {
        "images": len(timings),
        "throughput_per_s": len(timings) / span,
        **{f"p{q}_s": float(np.percentile(latencies, q)) for q in (50, 95, 99)},
        "first_preview_s": statistics.median(previews),
        "mean_batch": statistics.fmean(sizes),
    }


def measure(flags: argparse.Namespace) -> dict:
    torch.set_num_threads(flags.threads)
    pipeline = RealCustomPipeline.from_pretrained(flags.model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(flags.device)
    pipeline.warm_up()
    rates = capacities(pipeline, flags)
    full = rates["step"]
    report = {
        "machine": {"platform": platform.platform(), "threads": flags.threads, "device": flags.device},
        "torch": torch.__version__,
        "model": flags.model,
        "max_batch_size": flags.max_batch_size,
        "capacity_per_s": rates,
        "rounds": flags.rounds,
        "loads": {},
    }
    plans = {f"{load:.0%}": load for load in flags.loads} | ({"bursts": 0.6} if flags.bursts else {})
    for name, load in plans.items():
        timings = {side: [] for side in SIDES}
        sizes = {side: [] for side in SIDES}
        for round_ in range(flags.rounds):
            order = SIDES[round_ % len(SIDES) :] + SIDES[: round_ % len(SIDES)]
            times = (
                bursts(full * load, flags.seconds, flags.max_batch_size)
                if name == "bursts"
                else poisson(full * load, flags.seconds, seed=round_)
            )
            wanted = requests(len(times), pipeline, seed=100 + round_)
            for side in order:
                pipeline.clear_caches()
                maker = build(side, pipeline, flags.max_batch_size)
                timings[side].append(asyncio.run(play(maker.make, wanted, times)))
                sizes[side] += maker.batches.sizes
                maker.close()
                print(f"{name}, round {round_ + 1}, {side}: {len(times)} images", file=sys.stderr)
        report["loads"][name] = {side: summary(timings[side], sizes[side]) for side in SIDES}
    return report


def table(report: dict) -> str:
    """The report as Markdown."""
    machine = report["machine"]
    capacities = ", ".join(f"{side} {rate:.2f}" for side, rate in report["capacity_per_s"].items())
    columns = ["load", "side", "number", "images/s", "p50 s", "p95 s", "p99 s", "first preview s", "mean batch"]
    columns += ["p95 / request", "p95 / patient"]
    lines = [
        f"{report['model']}, {machine['device']}, {machine['threads']} threads, batch at most "
        f"{report['max_batch_size']}. Capacity with full batches, images/s: {capacities}.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for load, sides in report["loads"].items():
        for side, numbers in sides.items():
            lines.append(
                f"| {load} | {side} | {numbers['images']} | {numbers['throughput_per_s']:.2f} "
                f"| {numbers['p50_s']:.2f} | {numbers['p95_s']:.2f} | {numbers['p99_s']:.2f} "
                f"| {numbers['first_preview_s']:.2f} | {numbers['mean_batch']:.1f} "
                f"| {numbers['p95_s'] / sides['request']['p95_s']:.2f} "
                f"| {numbers['p95_s'] / sides['patient']['p95_s']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/mini")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--max-batch-size", type=int, default=8)
    parser.add_argument("--loads", type=float, nargs="*", default=[0.5, 0.8, 0.95], help="fractions of the capacity")
    parser.add_argument("--seconds", type=float, default=120, help="of arrivals, for each load, side and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-bursts", dest="bursts", action="store_false")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serving")
    flags = parser.parse_args()
    report = measure(flags)
    save(report, table(report), flags.out)


if __name__ == "__main__":
    main()
