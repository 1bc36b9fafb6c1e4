"""Memory of the server's processes over thousands of requests.

    python benchmarks/soak.py      # 3,000 requests; writes benchmarks/results/soak.{json,md}

Requests for small images of different sizes, references and settings are sent over HTTP, several at a time. Most run to
the end, some are cancelled and some are invalid. The resident memory of each kind of process is sampled. Memory grows
while the caches fill; growth that continues after the first quarter indicates a leak.
"""

import argparse
import asyncio
import sys
from collections import Counter
from contextlib import aclosing
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.chaos import TITLES, processes
from benchmarks.report import save
from serving.clients import HttpClient, InvalidRequest, Progress, Request, Result, Subject
from serving.clients.local import start
from serving.settings import Settings

KINDS = tuple(TITLES)
SIZES = (64, 96, 128)  # px
NUM_REFERENCES, NUM_PROMPTS = 24, 100  # fit into the caches, so that growing caches do not look like a leak


def request(draw: np.random.Generator) -> Request:
    """A cheap request that differs from the others."""
    names = ("dog", "cat")[: draw.integers(0, 3)]
    subjects = []
    for name in names:
        noise = np.random.default_rng(int(draw.integers(NUM_REFERENCES))).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        subjects.append(Subject(image=Image.fromarray(noise), target_phrase=name))
    return Request(
        prompt=f"a dog and a cat on the beach {draw.integers(NUM_PROMPTS)}",
        subjects=tuple(subjects),
        height=int(draw.choice(SIZES)),
        width=int(draw.choice(SIZES)),
        num_inference_steps=int(draw.integers(2, 5)),
        guidance_scale=float(draw.choice([1.0, 4.0])),
        seed=int(draw.integers(1 << 31)),
    )


async def run_request(client: HttpClient, draw: np.random.Generator) -> str:
    """Run one request and return its outcome."""
    valid, style = request(draw), draw.choice(["whole", "stream", "cancel", "invalid"], p=[0.5, 0.3, 0.1, 0.1])
    if style == "invalid":
        try:
            await client.generate(replace(valid, height=(valid.height or 0) + 1))
        except InvalidRequest:
            return "rejected"
        raise AssertionError("a height that is not a multiple of 8 was accepted")
    if style == "whole":
        await client.generate(valid)
        return "finished"
    async with aclosing(client.stream(valid)) as events:
        async for event in events:
            if isinstance(event, Result):
                return "finished"
            if style == "cancel" and isinstance(event, Progress):
                return "cancelled"
    raise AssertionError("the stream ended without a result")


def resident_mb() -> dict[str, float]:
    """Resident memory of all processes of each kind, MB."""
    return {kind: round(sum(p.memory_info().rss for p in processes(kind)) / 1e6, 1) for kind in KINDS}


async def soak(client: HttpClient, number: int, concurrency: int, every: int) -> tuple[list[dict], Counter[str]]:
    """Resident memory after every `every` requests, and the outcomes of the requests."""
    readings, outcomes, index = [{"requests": 0, **resident_mb()}], Counter(), count()

    async def worker() -> None:
        while (i := next(index)) < number:
            outcomes[await run_request(client, np.random.default_rng(i))] += 1
            if (done := sum(outcomes.values())) % every == 0:
                readings.append({"requests": done, **resident_mb()})

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return readings, outcomes


def table(report: dict) -> str:
    """The report as Markdown."""
    ends = ", ".join(f"{number} {outcome}" for outcome, number in sorted(report["outcomes"].items()))
    lines = [
        f"Resident memory in MB over {report['requests']} requests to {report['model']} ({ends}), "
        f"{report['concurrency']} at a time.",
        "",
        f"| requests | {' | '.join(KINDS)} |",
        "|---|" + "---|" * len(KINDS),
        *(f"| {r['requests']} | {' | '.join(str(round(r[kind])) for kind in KINDS)} |" for r in report["readings"]),
        "",
        "Growth per thousand requests after the first quarter, in MB: "
        + ", ".join(f"{kind} {growth:.1f}" for kind, growth in report["growth_mb_per_thousand"].items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def growth(readings: list[dict]) -> dict[str, float]:
    """Slope of a line through the readings after the first quarter, MB per thousand requests."""
    last = readings[-1]["requests"]
    late = [r for r in readings if r["requests"] >= last / 4]
    requests = [r["requests"] / 1000 for r in late]
    return {kind: round(float(np.polyfit(requests, [r[kind] for r in late], 1)[0]), 2) for kind in KINDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/mini")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--concurrency", type=int, default=6, help="concurrent requests")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soak")
    flags = parser.parse_args()
    server = start(Settings(model=flags.model, device=flags.device, cpu_threads=1))
    try:
        run = soak(HttpClient(server.url), flags.requests, flags.concurrency, every=max(1, flags.requests // 20))
        readings, outcomes = asyncio.run(run)
    finally:
        server.shutdown()
    report = {
        "model": flags.model,
        "requests": flags.requests,
        "concurrency": flags.concurrency,
        "outcomes": dict(outcomes),
        "growth_mb_per_thousand": growth(readings),
        "readings": readings,
    }
    save(report, table(report), flags.out)


if __name__ == "__main__":
    main()
