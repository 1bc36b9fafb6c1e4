"""Training steps with precomputed features relative to steps that compute them.

    python benchmarks/precomputed_features.py            # times of the embedded model, FLOPs of SDXL and SD1.5

A training step is measured as `train/trainer.py` runs it: encoding by the frozen models, forward and backward pass of
the adapter. Each variant looks up other kinds of features; all are timed alternately (A B A B ...) in one run, so that
their ratios do not depend on the machine. For the full-size models, the exact FLOPs per sample are counted instead;
nothing is downloaded.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.full_size import random_pipeline
from benchmarks.report import save
from realcustom import RealCustomAdapter
from realcustom.config import ModelFamily
from train.config import TrainConfig
from train.data.features import FeatureStore, encoder_revisions
from train.data.kinds import KINDS, NAMES, Kind
from train.data.pixels import PixelBatch
from train.data.precompute import Encode, precompute
from train.data.sample import Sample
from train.frozen import FrozenModels, Lookup, load_pipeline, start_adapter
from train.objective import Objective, draw
from train.precision import differentiable_attention
from train.recipes import RECIPES
from train.sources import open_mixture

FAMILIES: dict[str, ModelFamily] = {"sdxl_512": "sdxl", "sdxl_1024": "sdxl", "sd15_512": "sd15"}


def encoders_of(frozen: FrozenModels) -> dict[Kind, Encode]:
    """The function that computes each kind of features."""
    return {
        "latents": frozen.encode_images,
        "text": lambda samples: frozen.encode_texts([sample.caption for sample in samples]),
        "vision": frozen.encode_references,
    }


def forward_backward(
    frozen: FrozenModels,
    objective: Objective,
    adapter: RealCustomAdapter,
    config: TrainConfig,
    samples: Sequence[Sample] | PixelBatch,
) -> None:
    """Encode some samples, compute their loss and add its gradient."""
    encoded = frozen.encode(samples)
    count, device = len(encoded.latents), frozen.device
    draws = draw(
        config.objective, encoded.latents.shape[1:], range(count), seed=0, step=0, batch_size=count,
        num_timesteps=objective.num_timesteps, device=device,
    )  # fmt: skip
    with frozen.autocast():
        keys_values = adapter(encoded.features)
    with objective.attending(keys_values, draws.keep_vision), differentiable_attention(device.type):
        with frozen.autocast():
            losses = objective.losses(encoded, draws)
        losses.mean().backward()


def training_step(
    frozen: FrozenModels, adapter: RealCustomAdapter, config: TrainConfig, samples: list[Sample]
) -> Callable[[], object]:
    """Encoding, forward and backward pass of some samples."""
    objective = Objective(
        frozen.pipeline.unet, frozen.pipeline.scheduler, frozen.empty_text(), config.objective, frozen.device
    )

    def step() -> None:
        forward_backward(frozen, objective, adapter, config, samples)
        adapter.zero_grad(set_to_none=True)

    return step


def noise_sample(size: int, reference_size: int, number: int = 0) -> Sample:
    """A sample of noise; each number has its own images and caption."""
    rng = np.random.default_rng(number)
    return Sample(
        image=rng.integers(0, 256, (size, size, 3), np.uint8), caption=f"a dog number {number}", target_phrase="dog",
        reference=rng.integers(0, 256, (reference_size, reference_size, 3), np.uint8), original_size=(size, size),
        crop=(0, 0), key=str(number),
    )  # fmt: skip


def cpu_seconds(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each work, timed alternately after one round to warm up; other processes hardly matter."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def time_steps(batch_size: int, rounds: int, folder: Path) -> dict[str, float]:
    """Median CPU seconds of a step of the recipe `mini` per variant, and the size of the features per sample."""
    config = replace(RECIPES["mini"](), batch_size=batch_size)
    config = replace(config, curriculum=replace(config.curriculum, first_step=config.curriculum.total_steps))
    pipeline = load_pipeline(config.model, torch.float32)
    adapter = start_adapter(replace(config.model, adapter="base"), pipeline, 0)
    found: dict[str, Lookup] = {"nothing": lambda sample: None}
    frozen = FrozenModels(pipeline, torch.device("cpu"), lambda sample: found[current](sample))
    mixture = open_mixture(config, frozen.reference_size)
    store = FeatureStore(folder, encoder_revisions(pipeline))
    summary = precompute(mixture, store, encoders_of(frozen), num_steps=1)
    variants: tuple[tuple[Kind, ...], ...] = (("latents",), ("vision",), KINDS)
    for kinds in variants:
        names = {name for kind in kinds for name in NAMES[kind]}
        found[", ".join(kinds)] = lambda sample, names=names: {
            name: value for name, value in (store(sample) or {}).items() if name in names
        }
    step = training_step(frozen, adapter, config, mixture.samples(0, range(batch_size)))
    current = "nothing"

    def variant(name: str) -> Callable[[], object]:
        def work() -> None:
            nonlocal current
            current = name
            step()

        return work

    times = cpu_seconds({name: variant(name) for name in found}, rounds)
    return {**times, "bytes per sample": summary.written_bytes / batch_size}


class _MetaModels(FrozenModels):
    """The frozen models on device "meta", which has no autocast; the type does not change the FLOPs."""

    def autocast(self) -> AbstractContextManager:
        return nullcontext()


@cache
def count_flops(recipe: str, gradient_checkpointing: bool = True) -> dict[str, float]:
    """TFLOP per sample of the encoders and of the rest of the step, and the size of the features in MB; not timed."""
    config = RECIPES[recipe]()
    pipeline = random_pipeline(FAMILIES[recipe], "meta", torch.float32)
    adapter = pipeline.adapter.requires_grad_(True).train()
    frozen = _MetaModels(pipeline, torch.device("meta"))
    sample = noise_sample(config.data.resolution, frozen.reference_size)
    if gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    report: dict[str, float] = {}
    num_bytes = 0
    for kind, encode in encoders_of(frozen).items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            (tensors,) = encode([sample])
        report[kind] = counter.get_total_flops() / 1e12
        itemsize = 4 if kind == "latents" else 2  # the autoencoder runs in float32, the other encoders in bfloat16
        num_bytes += sum(tensor.numel() * itemsize for tensor in tensors)
    step = training_step(frozen, adapter, config, [sample])
    with FlopCounterMode(display=False) as counter:
        step()
    report["rest"] = counter.get_total_flops() / 1e12 - sum(report.values())
    return {**report, "feature MB": num_bytes / 1e6}


def markdown(report: dict) -> str:
    times, setup = dict(report["mini"]), report["setup"]
    size = times.pop("bytes per sample")
    lines = [
        f"A training step of {setup['batch']} samples of the recipe `mini` on {setup['cpu']} ({setup['threads']} "
        f"threads, float32, torch {setup['torch']}), CPU time, median of {setup['rounds']} alternating rounds. The "
        f"features need {size / 1e3:.0f} kB per sample. In all variants, the texts are encoded once "
        "and cached.",
        "",
        "| found in the store | step, relative to computing all |",
        "|---|---|",
        *(f"| {name} | {seconds / times['nothing']:.2f} |" for name, seconds in times.items()),
        "",
        "Exact FLOPs per sample of the full-size recipes, with gradient checkpointing (TFLOP; not timed):",
        "",
        "| recipe | latents | text | vision | rest of the step | saved by all features | features, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe, counts in report["flops"].items():
        encoders = sum(counts[kind] for kind in KINDS)
        cells = [*(f"{counts[kind]:.2f}" for kind in KINDS), f"{counts['rest']:.2f}"]
        saved = encoders / (encoders + counts["rest"])
        lines.append(f"| `{recipe}` | {' | '.join(cells)} | {saved:.0%} | {counts['feature MB']:.1f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="samples per step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "precomputed_features")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = time_steps(args.batch, args.rounds, Path(folder))
    setup = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": args.batch,
        "rounds": args.rounds,
    }
    report = {"setup": setup, "mini": times, "flops": {recipe: count_flops(recipe) for recipe in FAMILIES}}
    save(report, markdown(report), args.out)


if __name__ == "__main__":
    main()
