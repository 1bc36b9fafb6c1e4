"""Continuous batching against batching of whole generations and one image at a time, with the same arrivals.

    python benchmarks/serving.py                         # minutes per load; writes benchmarks/results/serving.{json,md}
    python benchmarks/serving.py --seconds 5 --loads 0.8 # a short run

Open loop: images arrive as a Poisson process, or in bursts, whether or not earlier ones are done, so that latencies
include all waiting. The capacity of a mode is its throughput with full batches; loads are fractions of the capacity of
`continuous`, with the same arrivals for all modes. Below capacity, the throughput of every mode is close to the arrival
rate. The modes are measured one after another, within one process.

- continuous: `serving.engine.engine.Engine`; images join and leave between steps.
- serve_batch: Ray Serve's `@serve.batch` around whole generations; a batch is collected and runs to its end.
- work_conserving: whole generations, but a batch closes only when the device is free, which is optimal for batches of
  whole generations. `@serve.batch` closes a batch after a fixed time even if the device is busy.
- sequential: one image after another.
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
from realcustom.request import ResolvedRequest
from serving.engine.engine import Engine
from serving.engine.observer import Observer
from serving.protocol.events import Progress

MODES = ("continuous", "serve_batch", "work_conserving", "sequential")
CAPACITY_TURNS = 4
BATCH_WAIT_S = 0.05  # time that @serve.batch collects, even while an earlier batch runs


@dataclass
class Timing:
    """Times of one image in seconds: arrival, first preview, result."""

    arrived: float
    previewed: float | None = None
    finished: float | None = None


@dataclass
class BatchSizes(Observer):
    """Images in each step."""

    sizes: list[int] = field(default_factory=list)

    def step(self, *, images: int, **_) -> None:
        self.sizes.append(images)


class Continuous:
    """The engine: images join and leave between steps."""

    def __init__(self, pipeline, max_batch_size: int) -> None:
        self.batches = BatchSizes()
        self._engine = Engine(pipeline, max_batch_size=max_batch_size, max_queued=100_000, observer=self.batches)

    async def generate(self, request: ResolvedRequest, timing: Timing) -> None:
        async with aclosing(self._engine.stream(request, previews=True)) as events:
            async for event in events:
                if isinstance(event, Progress) and event.preview is not None and timing.previewed is None:
                    timing.previewed = time.perf_counter()
        timing.finished = time.perf_counter()

    def close(self) -> None:
        self._engine.close()


class WholeGenerations:
    """A batch runs to its end before the next one starts; there are no previews.

    Images with fewer steps wait for those with more, as in any server that calls a pipeline.
    """

    def __init__(self, pipeline) -> None:
        self.batches = BatchSizes()
        self._pipeline = pipeline

    async def _run(self, requests: Sequence[ResolvedRequest]) -> list[float]:
        """Time of each result: the end of the batch."""
        await asyncio.to_thread(self._run_batch, requests)
        return [time.perf_counter()] * len(requests)

    def _run_batch(self, requests: Sequence[ResolvedRequest]) -> None:
        generations = [self._pipeline.prepare(request) for request in requests]
        active = generations
        while active := [g for g in active if not g.done]:
            for size in {g.size for g in active}:
                group = [g for g in active if g.size == size]
                self.batches.step(images=len(group))
                self._pipeline.step(group)
        self._pipeline.decode(generations)

    def close(self) -> None:
        pass


class ServeBatch(WholeGenerations):
    """Batches of `@serve.batch`; with a `max_batch_size` of 1, one image after another."""

    def __init__(self, pipeline, max_batch_size: int) -> None:
        super().__init__(pipeline)
        _set_replica_context()

        @serve.batch(max_batch_size=max_batch_size, batch_wait_timeout_s=BATCH_WAIT_S if max_batch_size > 1 else 0)
        async def batched(requests: list[ResolvedRequest]) -> list[float]:
            return await self._run(requests)

        self._batched = batched

    async def generate(self, request: ResolvedRequest, timing: Timing) -> None:
        timing.finished = await self._batched(request)


class WorkConserving(WholeGenerations):
    """When the device becomes free, the waiting images form the next batch, at most `max_batch_size` of them."""

    def __init__(self, pipeline, max_batch_size: int) -> None:
        super().__init__(pipeline)
        self._max_batch_size = max_batch_size
        self._waiting: list[tuple[ResolvedRequest, Timing]] = []
        self._device = asyncio.Lock()  # first in, first out

    async def generate(self, request: ResolvedRequest, timing: Timing) -> None:
        self._waiting.append((request, timing))
        async with self._device:
            if timing.finished is None:  # it was not part of an earlier batch
                batch, self._waiting = self._waiting[: self._max_batch_size], self._waiting[self._max_batch_size :]
                finished = await self._run([request for request, _ in batch])
                for (_, one), at in zip(batch, finished, strict=True):
                    one.finished = at


def _set_replica_context() -> None:
    """`@serve.batch` reads the number of concurrent requests from its replica; here it runs without one."""
    _set_internal_replica_context(
        replica_id=ReplicaID("benchmark", DeploymentID("benchmark")),
        servable_object=None,
        _deployment_config=DeploymentConfig(max_ongoing_requests=100_000),
        rank=None,
        world_size=1,
    )


def build(mode: str, pipeline, max_batch_size: int):
    if mode == "sequential":
        return ServeBatch(pipeline, 1)
    modes = {"continuous": Continuous, "serve_batch": ServeBatch, "work_conserving": WorkConserving}
    return modes[mode](pipeline, max_batch_size)


# ---- load ---------------------------------------------------------------------------------------------------------


def requests(number: int, pipeline: RealCustomPipeline, seed: int) -> list[ResolvedRequest]:
    """A typical mixture: one or two subjects from a few references; a third of the requests has half of the steps."""
    draw = np.random.default_rng(seed)
    colors = ("red", "green", "blue", "gold")
    steps = pipeline.sampling.num_inference_steps
    drawn = []
    for index in range(number):
        phrases = ("dog", "cat")[: draw.integers(1, 3)]
        subjects = tuple(
            Subject(image=Image.new("RGB", (64, 64), colors[draw.integers(4)]), target_phrase=phrase)
            for phrase in phrases
        )
        drawn.append(
            Request(
                prompt="a dog and a cat on the beach",
                subjects=subjects,
                num_inference_steps=int(draw.choice([steps, steps, max(1, steps // 2)])),
                seed=index,
            ).resolve(pipeline.sampling)
        )
    return drawn


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival times in [0, seconds)."""
    draw, times, now = np.random.default_rng(seed), [], 0.0
    while (now := now + draw.exponential(1 / rate)) < seconds:
        times.append(now)
    return times


def bursts(rate: float, seconds: float, size: int) -> list[float]:
    """Arrival times at the same mean rate, in bursts of `size`."""
    period = size / rate
    return [period * burst for burst in range(max(1, int(seconds / period))) for _ in range(size)]


async def play(
    generate: Callable[[ResolvedRequest, Timing], Awaitable[None]],
    wanted: Sequence[ResolvedRequest],
    times: Sequence[float],
) -> list[Timing]:
    """Send the requests at their times and wait for the last image."""
    start = time.perf_counter()

    async def one(request: ResolvedRequest, at: float) -> Timing:
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        timing = Timing(arrived=start + at)
        await generate(request, timing)
        return timing

    return await asyncio.gather(*map(one, wanted, times))


def capacity(mode: str, pipeline: RealCustomPipeline, max_batch_size: int, seconds: float) -> float:
    """Images per second of a mode while enough images wait for a full batch.

    Counted from the end of the first full batch to the last end within `seconds`, so that the same number of images is
    active, and not counted, at the beginning and at the end.
    """
    server = build(mode, pipeline, max_batch_size)
    wanted = iter(requests(10_000, pipeline, seed=1))

    async def run() -> list[float]:
        start, finished = time.perf_counter(), []

        async def keep_busy() -> None:
            while time.perf_counter() - start < seconds:
                await server.generate(next(wanted), Timing(0))
                finished.append(time.perf_counter() - start)

        await asyncio.gather(*(keep_busy() for _ in range(2 * max_batch_size)))
        return finished

    finished = asyncio.run(run())
    server.close()
    begin = finished[max_batch_size - 1]
    counted = [at for at in finished if begin < at < seconds]
    if not counted:
        raise ValueError(f"{seconds:.0f} s are too short for two batches of {max_batch_size}; increase --seconds.")
    return len(counted) / (counted[-1] - begin)


def capacities(pipeline: RealCustomPipeline, flags: argparse.Namespace) -> dict[str, float]:
    """Capacity of every mode, measured alternately, because the speed of a shared machine changes."""
    for mode in MODES:  # warm-up: libraries initialize for every new batch shape
        capacity(mode, pipeline, flags.max_batch_size, min(20, flags.seconds))
    turns = [
        {mode: capacity(mode, pipeline, flags.max_batch_size, flags.seconds / 2) for mode in MODES[:: (-1) ** turn]}
        for turn in range(CAPACITY_TURNS)
    ]
    return {mode: statistics.fmean(turn[mode] for turn in turns) for mode in MODES}


def summary(rounds: Sequence[Sequence[Timing]], sizes: Sequence[int]) -> dict[str, float]:
    timings = [timing for one in rounds for timing in one]
    latencies = np.array([t.finished - t.arrived for t in timings])
    # Without previews, the finished image counts as the first preview.
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
    pipeline = RealCustomPipeline.from_pretrained(flags.model, dtype=getattr(torch, flags.dtype))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(flags.device)
    pipeline.warm_up()
    rates = capacities(pipeline, flags)
    full = rates["continuous"]
    report = {
        "machine": {
            "platform": platform.platform(),
            "threads": flags.threads,
            "device": flags.device,
            "dtype": flags.dtype,
        },
        "torch": torch.__version__,
        "model": flags.model,
        "max_batch_size": flags.max_batch_size,
        "capacity_per_s": rates,
        "rounds": flags.rounds,
        "loads": {},
    }
    plans = {f"{load:.0%}": load for load in flags.loads} | ({"bursts": 0.6} if flags.bursts else {})
    for name, load in plans.items():
        timings = {mode: [] for mode in MODES}
        sizes = {mode: [] for mode in MODES}
        for round_ in range(flags.rounds):
            order = MODES[round_ % len(MODES) :] + MODES[: round_ % len(MODES)]
            times = (
                bursts(full * load, flags.seconds, flags.max_batch_size)
                if name == "bursts"
                else poisson(full * load, flags.seconds, seed=round_)
            )
            wanted = requests(len(times), pipeline, seed=100 + round_)
            for mode in order:
                pipeline.clear_caches()
                server = build(mode, pipeline, flags.max_batch_size)
                timings[mode].append(asyncio.run(play(server.generate, wanted, times)))
                sizes[mode] += server.batches.sizes
                server.close()
                print(f"{name}, round {round_ + 1}, {mode}: {len(times)} images", file=sys.stderr)
        report["loads"][name] = {mode: summary(timings[mode], sizes[mode]) for mode in MODES}
    return report


def table(report: dict) -> str:
    """The report as Markdown."""
    machine = report["machine"]
    capacities = ", ".join(f"{mode} {rate:.2f}" for mode, rate in report["capacity_per_s"].items())
    columns = ["load", "mode", "number", "images/s", "p50 s", "p95 s", "p99 s", "first preview s", "mean batch"]
    columns += ["p95 / serve_batch", "p95 / work_conserving"]
    lines = [
        f"{report['model']}, {machine['device']}, {machine['threads']} threads, batch at most "
        f"{report['max_batch_size']}. Capacity with full batches, images/s: {capacities}.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for load, modes in report["loads"].items():
        for mode, numbers in modes.items():
            lines.append(
                f"| {load} | {mode} | {numbers['images']} | {numbers['throughput_per_s']:.2f} "
                f"| {numbers['p50_s']:.2f} | {numbers['p95_s']:.2f} | {numbers['p99_s']:.2f} "
                f"| {numbers['first_preview_s']:.2f} | {numbers['mean_batch']:.1f} "
                f"| {numbers['p95_s'] / modes['serve_batch']['p95_s']:.2f} "
                f"| {numbers['p95_s'] / modes['work_conserving']['p95_s']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/mini")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--max-batch-size", type=int, default=8)
    parser.add_argument("--loads", type=float, nargs="*", default=[0.5, 0.8, 0.95], help="fractions of the capacity")
    parser.add_argument("--seconds", type=float, default=120, help="of arrivals, for each load, mode and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-bursts", dest="bursts", action="store_false")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serving")
    flags = parser.parse_args()
    report = measure(flags)
    save(report, table(report), flags.out)


if __name__ == "__main__":
    main()
