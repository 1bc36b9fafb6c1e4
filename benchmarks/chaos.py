"""Kills processes of the server under load and checks every image.

    python benchmarks/chaos.py      # 5 minutes; writes benchmarks/results/chaos.{json,md}
    python benchmarks/chaos.py --kinds replica ingress proxy controller --every 10

Open loop: requests arrive as a Poisson process over HTTP and a Ray handle, streamed or not, and some are cancelled.
Meanwhile, a process is killed (SIGKILL) every few seconds. Each request must return the same image as before any
process was killed, or raise a documented error of the client. A wrong image or a missing response is a failure.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.report import save
from serving.clients import (
    Client,
    HttpClient,
    InvalidRequest,
    Progress,
    QueueFull,
    Request,
    Result,
    ServerError,
    Subject,
)
from serving.clients.local import NAME, start
from serving.settings import Settings

TITLES = {  # first words of the command lines of Ray Serve's processes
    "replica": f"ray::ServeReplica:{NAME}:Replica",
    "ingress": f"ray::ServeReplica:{NAME}:Ingress",
    "proxy": "ray::ProxyActor",
    "controller": "ray::ServeController",
}
MAX_DIFFERENCE = 1  # of 8-bit pixel values: the batch changes the order of floating-point sums
GRACE_S = 30  # a request without a response this long after its deadline counts as lost
STYLES = ("whole", "stream", "cancel")


def processes(kind: str) -> list[psutil.Process]:
    """Processes of this kind that belong to the Ray of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(TITLES[kind]):
                found.append(process)
        except psutil.Error:  # the process has ended
            continue
    return found


@dataclass(frozen=True)
class Response:
    """Outcome of a request: "correct", "wrong", "cancelled", "lost", or the name of an error, with its message."""

    outcome: str
    seconds: float
    message: str = ""


def requests() -> list[Request]:
    """Requests that differ in subjects, sizes and settings. Each has a seed, so that its image is reproducible."""
    prompt = "a dog and a cat on the beach"
    dog, cat = (
        Subject(image=Image.new("RGB", (64, 64), color), target_phrase=phrase)
        for color, phrase in (("red", "dog"), ("blue", "cat"))
    )
    return [
        Request(prompt=prompt, subjects=(dog,), seed=1),
        Request(prompt=prompt, subjects=(dog, cat), seed=2),
        Request(prompt=prompt, seed=3, num_inference_steps=12),
        Request(prompt=prompt, subjects=(cat,), seed=4, guidance_scale=1.0, num_inference_steps=16),
        Request(prompt=prompt, subjects=(dog,), seed=5, height=96, width=128, negative_prompt="a house"),
        Request(prompt=prompt, subjects=(dog,), seed=6, mask_source="generation_branch", early_stop_step=0.5),
    ]


async def run_request(client: Client, request: Request, style: str, deadline_s: float) -> Image.Image | None:
    """Return the image; None if the request was cancelled, which style "cancel" does after the second step."""
    if style == "whole":
        return (await client.generate(request, timeout_s=deadline_s)).image
    async with aclosing(client.stream(request, timeout_s=deadline_s)) as events:
        async for event in events:
            if isinstance(event, Result):
                return event.image
            if style == "cancel" and isinstance(event, Progress) and event.step >= 2:
                return None
    raise AssertionError("the stream ended without a result")


async def check_request(
    client: Client, request: Request, expected: np.ndarray, style: str, deadline_s: float
) -> Response:
    """Run the request and compare its image."""
    start, message = time.monotonic(), ""
    try:
        image = await asyncio.wait_for(run_request(client, request, style, deadline_s), deadline_s + GRACE_S)
        if image is None:
            outcome = "cancelled"
        else:
            difference = np.abs(np.asarray(image).astype(int) - expected).max()
            outcome = "correct" if difference <= MAX_DIFFERENCE else "wrong"
            message = "" if outcome == "correct" else f"seed {request.seed}: pixels differ by up to {difference}"
    except asyncio.TimeoutError:
        outcome = "lost"
    except (InvalidRequest, QueueFull, ServerError) as error:
        outcome, message = type(error).__name__, str(error)
    return Response(outcome, time.monotonic() - start, message)


async def chaos(
    clients: Sequence[Client],
    requests: Sequence[Request],
    *,
    rate: float,
    seconds: float,
    kinds: Sequence[str],
    every_s: float,
    deadline_s: float,
    seed: int = 0,
) -> tuple[list[Response], Counter[str]]:
    """Send `rate` requests per second for `seconds`, and kill one process of one of `kinds` every `every_s` seconds.

    Returns:
        The response to every request, and how many processes of each kind were killed.
    """
    images = [np.asarray((await clients[0].generate(request)).image).astype(int) for request in requests]
    draw = np.random.default_rng(seed)
    killed: Counter[str] = Counter()

    async def kill_processes() -> None:
        while True:
            await asyncio.sleep(every_s)
            kind = kinds[sum(killed.values()) % len(kinds)]
            if found := processes(kind):
                found[int(draw.integers(len(found)))].kill()
                killed[kind] += 1

    killing = asyncio.create_task(kill_processes())
    responses, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        index = int(draw.integers(len(requests)))
        client, style = clients[int(draw.integers(len(clients)))], STYLES[int(draw.choice(3, p=[0.45, 0.45, 0.1]))]
        checked = check_request(client, requests[index], images[index], style, deadline_s)
        responses.append(asyncio.create_task(checked))
        await asyncio.sleep(draw.exponential(1 / rate))
    killing.cancel()
    return await asyncio.gather(*responses), killed


def summary(responses: Sequence[Response], killed: Counter[str]) -> dict:
    correct = [response.seconds for response in responses if response.outcome == "correct"]
    return {
        "requests": len(responses),
        "outcomes": dict(Counter(response.outcome for response in responses)),
        "messages": dict(Counter(response.message for response in responses if response.message)),
        "killed": dict(killed),
        "seconds": {f"p{q}": round(float(np.percentile(correct, q)), 2) for q in (50, 95, 100)} if correct else {},
    }


def table(report: dict) -> str:
    """The report as Markdown."""
    kills = ", ".join(f"{number} x {kind}" for kind, number in report["killed"].items())
    lines = [
        f"{report['requests']} requests in {report['arrivals_s']:.0f} s, {report['replicas']} replicas of "
        f"{report['model']}; killed: {kills}.",
        "",
        "| outcome | requests |",
        "|---|---|",
        *(f"| {outcome} | {number} |" for outcome, number in sorted(report["outcomes"].items())),
        "",
        f"Latency of correct images: {report['seconds']['p50']} s (p50), {report['seconds']['p95']} s (p95), "
        f"{report['seconds']['p100']} s (maximum).",
        *(f"\n{number} x: {message}" for message, number in report["messages"].items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/mini")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rate", type=float, default=0.5, help="requests per second")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--every", type=float, default=5, help="seconds between two kills")
    parser.add_argument("--kinds", nargs="+", choices=TITLES, default=["replica"])
    parser.add_argument("--deadline", type=float, default=120, help="deadline of each request in seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "chaos")
    flags = parser.parse_args()
    server = start(
        Settings(
            model=flags.model, device=flags.device, num_replicas=flags.replicas, num_cpus=0.5, cpu_threads=1,
            max_retries=5,
        )
    )  # fmt: skip
    try:
        responses, killed = asyncio.run(
            chaos(
                [server, HttpClient(server.url)],
                requests(),
                rate=flags.rate,
                seconds=flags.seconds,
                kinds=flags.kinds,
                every_s=flags.every,
                deadline_s=flags.deadline,
            )
        )
    finally:
        server.shutdown()
    report = {"model": flags.model, "replicas": flags.replicas, "arrivals_s": flags.seconds, "every_s": flags.every}
    report |= summary(responses, killed)
    save(report, table(report), flags.out)


if __name__ == "__main__":
    main()
