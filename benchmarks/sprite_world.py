"""Pairs of the sprite world per second: drawing the random numbers, and rendering images and references.

    python benchmarks/sprite_world.py                                        # one CPU core
    python benchmarks/sprite_world.py --devices cpu cuda --batch 64 1024 8192

Drawing runs in one process on one core; training spreads it over worker processes. Rendering is timed from packed
arrays in host memory to the finished images on the device. The batch sizes are timed alternately (A B A B ...), and the
medians are printed.
"""

import argparse
import json
import platform
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.report import rounded
from benchmarks.workbench import time_alternately
from train.data.sprite_world.renderer import Renderer
from train.data.sprite_world.world import PairBatch, SpriteWorld

MIN_PAIRS = 64  # per measurement: smaller batches are repeated


def draw(world: SpriteWorld, size: int) -> None:
    """`size` pairs, as often as a measurement needs."""
    for _ in range(-(-MIN_PAIRS // size)):
        world.plan_pairs(range(size))


def render(renderer: Renderer, batch: PairBatch) -> None:
    """Both images of each pair, as often as a measurement needs."""
    for _ in range(-(-MIN_PAIRS // len(batch.captions))):
        renderer.render(batch.images)
        renderer.render(batch.references)


def pairs_per_second(devices: list[str], batch_sizes: list[int], rounds: int) -> dict[str, dict[str, float]]:
    """What is timed -> batch size -> pairs per second."""
    world, cpu = SpriteWorld(), torch.device("cpu")
    batches = {size: world.plan_pairs(range(size)) for size in batch_sizes}
    plans = {str(size): partial(draw, world, size) for size in batch_sizes}
    report = {"draw, one process": time_alternately(plans, cpu, rounds)}
    for device in devices:
        renderer = Renderer(device)
        works = {str(size): partial(render, renderer, batch) for size, batch in batches.items()}
        for work in works.values():
            work()  # prepares the tables of a CPU and loads the kernels of a GPU
        report[f"render, {device}"] = time_alternately(works, renderer.device, rounds)
    pairs = {str(size): -(-MIN_PAIRS // size) * size for size in batch_sizes}
    return {name: {size: pairs[size] / times[size] for size in times} for name, times in report.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=["cpu"])
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[1, 16, 64, 256], help="pairs that are rendered together"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of rendering")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = {
        "machine": f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}",
        "pairs per second": rounded(pairs_per_second(args.devices, args.batch, args.rounds)),
    }
    print(json.dumps(report, indent=2))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
