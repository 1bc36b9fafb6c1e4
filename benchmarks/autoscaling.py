"""Autoscaling from 1 to 3 replicas and back on a local cluster of three Ray nodes; no request may fail.

    python benchmarks/autoscaling.py      # 4 minutes; writes benchmarks/results/autoscaling.{json,md,png}

Open loop: requests arrive as a Poisson process at a low rate, then at a rate above the capacity of one replica, then at
the low rate again. Every image is compared with the image generated from the same seed before the run. Each node has
resources for one replica.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import ray
from ray import serve
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.chaos import Response, check_request, requests
from benchmarks.report import save
from serving.build import REPLICA
from serving.clients import Client
from serving.clients.local import NAME, start
from serving.settings import Settings

NUM_NODES = 3
SAMPLE_S = 0.5
DEADLINE_S = 300


def running() -> int:
    """Number of replicas that accept requests."""
    states = serve.status().applications[NAME].deployments[REPLICA].replica_states
    return states.get("RUNNING", 0)


async def capacity(client: Client, number: int = 16) -> float:
    """Throughput of one saturated replica in images per second."""
    variants = requests()
    await client.generate(variants[0])
    start_ = time.perf_counter()
    await asyncio.gather(*(client.generate(variants[i % len(variants)]) for i in range(number)))
    return number / (time.perf_counter() - start_)


async def record(client: Client, phases: list[tuple[float, float]]) -> dict:
    """Run the phases (rate, seconds) and sample the number of replicas until all requests are finished."""
    variants = requests()
    images = [np.asarray((await client.generate(request)).image).astype(int) for request in variants]
    draw, begin = np.random.default_rng(0), time.monotonic()
    tasks: list[asyncio.Task[Response]] = []
    samples: list[dict[str, float]] = []

    async def watch() -> None:
        while True:
            replicas = await asyncio.to_thread(running)
            outstanding = sum(not task.done() for task in tasks)
            at = round(time.monotonic() - begin, 2)
            samples.append({"at_s": at, "replicas": replicas, "outstanding": outstanding})
            await asyncio.sleep(SAMPLE_S)

    watching = asyncio.create_task(watch())
    for rate, seconds in phases:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            index = int(draw.integers(len(variants)))
            tasks.append(
                asyncio.create_task(check_request(client, variants[index], images[index], "whole", DEADLINE_S))
            )
            await asyncio.sleep(min(draw.exponential(1 / rate), max(0.0, end - time.monotonic())))
    responses = await asyncio.gather(*tasks)
    watching.cancel()
    return {
        "phases": [{"rate_per_s": round(rate, 3), "seconds": seconds} for rate, seconds in phases],
        "requests": len(responses),
        "outcomes": dict(Counter(response.outcome for response in responses)),
        "samples": samples,
    }


def moments(report: dict) -> dict[str, float]:
    """Seconds from the load increase to the second and the last replica, and from the decrease to one replica."""
    rise = report["phases"][0]["seconds"]
    fall = rise + report["phases"][1]["seconds"]
    first = lambda condition: next((s["at_s"] for s in report["samples"] if condition(s)), float("nan"))
    return {
        "second_replica_s": first(lambda s: s["at_s"] > rise and s["replicas"] >= 2) - rise,
        "all_replicas_s": first(lambda s: s["at_s"] > rise and s["replicas"] >= NUM_NODES) - rise,
        "one_replica_again_s": first(lambda s: s["at_s"] > fall and s["replicas"] == 1) - fall,
    }


def plot(report: dict, path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    at = [sample["at_s"] for sample in report["samples"]]
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 5), layout="constrained")
    top.plot(at, [sample["outstanding"] for sample in report["samples"]], color="tab:orange")
    top.set_ylabel("images outstanding")
    bottom.step(at, [sample["replicas"] for sample in report["samples"]], where="post", color="tab:blue")
    bottom.set(ylabel="replicas", xlabel="seconds", yticks=range(NUM_NODES + 1))
    edge = 0.0
    for phase in report["phases"]:
        for axis in (top, bottom):
            axis.axvline(edge, color="gray", linewidth=0.5)
        top.annotate(f"{phase['rate_per_s']:.2g}/s", (edge, 1), xycoords=("data", "axes fraction"), va="top")
        edge += phase["seconds"]
    figure.savefig(path, dpi=120)


def table(report: dict) -> str:
    """The report as Markdown."""
    low, high, _ = report["phases"]
    outcomes = ", ".join(f"{number} {outcome}" for outcome, number in report["outcomes"].items())
    times = report["moments"]
    return (
        f"{report['model']}, capacity of one replica: {report['capacity_per_s']:.2f} images/s; arrivals: "
        f"{low['rate_per_s']:.2f}, then {high['rate_per_s']:.2f}, then {low['rate_per_s']:.2f} images/s. "
        f"{report['requests']} requests: {outcomes}.\n\n"
        f"After the load increased, the second replica was ready after {times['second_replica_s']:.1f} s and all "
        f"{NUM_NODES} after {times['all_replicas_s']:.1f} s, including start and loading. After the load "
        f"decreased, one replica was left after {times['one_replica_again_s']:.1f} s "
        f"(downscale_delay_s: {report['downscale_delay_s']:.0f}).\n\n"
        "![replicas over time](autoscaling.png)\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/mini")
    parser.add_argument("--low", type=float, default=0.2, help="low load, relative to the capacity of one replica")
    parser.add_argument("--high", type=float, default=1.5, help="high load, relative to the capacity of one replica")
    parser.add_argument("--seconds", type=float, nargs=3, default=[20, 60, 100], help="duration of the three phases")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "autoscaling")
    flags = parser.parse_args()
    settings = Settings(
        model=flags.model, device="cpu", cpu_threads=1, min_replicas=1, max_replicas=NUM_NODES, max_queued=200,
        target_backlog_s=3, upscale_delay_s=1, downscale_delay_s=15,
    )  # fmt: skip
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(NUM_NODES - 1):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        server = start(settings)
        full = asyncio.run(capacity(server))
        while running() > 1:  # the measurement itself may have added replicas
            time.sleep(1)
        rates = [full * flags.low, full * flags.high, full * flags.low]
        report = {"model": flags.model, "capacity_per_s": full, "downscale_delay_s": settings.downscale_delay_s}
        report |= asyncio.run(record(server, list(zip(rates, flags.seconds))))
        report["moments"] = moments(report)
        server.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()
    save(report, table(report), flags.out)
    plot(report, flags.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
