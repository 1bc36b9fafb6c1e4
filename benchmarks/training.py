"""Training speed, memory and utilization of the recipes, with random weights at full size.

    python benchmarks/training.py --out training          # on a GPU
    python benchmarks/training.py --recipes mini_gpu --batch 16 --steps 2 --device cpu --out training

A step is measured as `train/trainer.py` runs it: rendering (sprite world), frozen encoders, forward and backward pass,
optimizer and EMA. Loading samples is not included. The variants of a recipe run one after the other on the same
weights. Results are written after each variant; one that does not fit into memory is reported as such.

Model FLOPs utilization (MFU) is reported for the full-size recipes: the FLOPs that the step requires, counted on device
"meta" without the recomputation of gradient checkpointing, divided by time and by the peak of the device. The peak is
the data sheet's for dense bfloat16 (`PEAK_TFLOPS`) or that of `--peak-tflops`.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.full_size import random_pipeline
from benchmarks.precomputed_features import FAMILIES, count_flops, encoders_of, forward_backward, noise_sample
from benchmarks.report import rounded, save
from benchmarks.workbench import seconds
from train.arguments import at_least, torch_device
from train.config import TrainConfig
from train.data.kinds import KINDS, NAMES
from train.data.sprite_world.batches import SpriteMixture
from train.data.sprite_world.rendered import BatchRenderer
from train.ema import EMA
from train.frozen import FrozenModels, load_pipeline, start_adapter
from train.objective import Objective
from train.precision import frozen_dtype
from train.recipes import RECIPES
from train.sources import open_training_data
from train.startup import prepare_unet

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
FULL_SIZE_VARIANTS: dict[str, dict[str, bool]] = {
    "as the recipe": {},
    "without gradient checkpointing": {"gradient_checkpointing": False},
    "precomputed features": {"features": True},
    "precomputed features, compiled blocks": {"features": True, "compile_blocks": True},
}
MINI_VARIANTS: dict[str, dict[str, bool]] = {"as the recipe": {}, "compiled blocks": {"compile_blocks": True}}


def make_step(config: TrainConfig, device: torch.device, features: bool) -> Callable[[], None]:
    """A complete training step on fixed samples.

    Args:
        features: whether the features of the frozen encoders are in memory before the step.
    """
    family, dtype = FAMILIES.get(config.name), frozen_dtype(config.precision, device.type)
    pipeline = load_pipeline(config.model, dtype) if family is None else random_pipeline(family, str(device), dtype)
    adapter = start_adapter(replace(config.model, adapter="base"), pipeline, 0)
    found: dict[str, dict[str, Tensor]] = {}
    frozen = FrozenModels(pipeline, device, lambda sample: found.get(sample.key))
    adapter.to(device)
    prepare_unet(pipeline.unet, config.model)
    objective = Objective(pipeline.unet, pipeline.scheduler, frozen.empty_text(), config.objective, device)
    parameters = list(adapter.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, betas=config.optimizer.betas, fused=device.type != "cpu")
    ema = EMA(adapter, config.optimizer.ema_decay)
    batch_size = config.micro_batch_size
    render: Callable[[Any], Any] = lambda samples: samples
    if family is None:
        mixture = open_training_data(config, frozen.reference_size)
        assert isinstance(mixture, SpriteMixture)
        samples: Any = mixture.samples(0, range(batch_size))
        render = BatchRenderer(config.data.resolution, frozen.reference_size, device)
    else:
        samples = [noise_sample(config.data.resolution, frozen.reference_size, i) for i in range(batch_size)]
    if features:
        for kind, encode in encoders_of(frozen).items():
            with torch.no_grad():
                for sample in samples:
                    (values,) = encode([sample])
                    found.setdefault(sample.key, {}).update(zip(NAMES[kind], values))

    def step() -> None:
        forward_backward(frozen, objective, adapter, config, render(samples))
        torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(adapter, 0)

    return step


def measure(step: Callable[[], None], steps: int, device: torch.device) -> dict[str, float]:
    """Median seconds of a step after two to warm up, and on CUDA the peak memory in GB."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    times = [seconds(step, device) for _ in range(steps + 2)]
    result = {"seconds": statistics.median(times[2:])}
    return {**result, "peak GB": torch.cuda.max_memory_allocated(device) / 1e9} if on_cuda else result


def measure_variant(
    config: TrainConfig, changes: dict[str, bool], steps: int, device: torch.device, peak: float | None
) -> dict[str, Any]:
    """One row of the report."""
    features = changes.get("features", False)
    model = replace(config.model, **{name: value for name, value in changes.items() if name != "features"})
    # Release what the variant before needed, also if it ran out of memory.
    gc.collect()
    torch.cuda.empty_cache()
    torch.compiler.reset()
    try:
        result: dict[str, Any] = measure(make_step(replace(config, model=model), device, features), steps, device)
    except torch.cuda.OutOfMemoryError:
        return {"error": "out of memory"}
    result["samples/s"] = config.micro_batch_size / result.pop("seconds")
    if peak is not None and config.name in FAMILIES:
        counts = count_flops(config.name, gradient_checkpointing=False)
        tflops = counts["rest"] + (0 if features else sum(counts[kind] for kind in KINDS))
        result["MFU"] = tflops * result["samples/s"] / peak
    return result


def markdown(report: dict[str, Any]) -> str:
    setup = report["setup"]
    lines = [
        f"{setup['device']}, torch {setup['torch']}, median of {setup['steps']} steps.",
        "",
        "| recipe | variant | samples per step | samples/s | peak memory, GB | MFU |",
        "|---|---|---|---|---|---|",
    ]
    for recipe, variants in report["recipes"].items():
        for variant, row in variants.items():
            if "error" in row:
                cells = [row["error"], "", ""]
            else:
                mfu = f"{row['MFU']:.0%}" if "MFU" in row else ""
                cells = [f"{row['samples/s']:.4g}", str(row.get("peak GB", "")), mfu]
            lines.append(f"| `{recipe}` | {variant} | {row['samples per step']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["mini_gpu", "sdxl_512", "sdxl_1024"])
    parser.add_argument("--batch", type=at_least(1), help="samples per step (default: the recipe's micro-batch)")
    parser.add_argument(
        "--steps", type=at_least(1), default=5, help="measured steps per variant (default: %(default)s)"
    )
    parser.add_argument("--device", type=torch_device, default="cuda", help="torch device (default: %(default)s)")
    parser.add_argument("--peak-tflops", type=at_least(1.0), help="dense bfloat16 peak of a device that is not listed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else args.device
    peak = args.peak_tflops
    if peak is None:
        peak = next((value for key, value in PEAK_TFLOPS.items() if key in name), None)
    setup = {"device": name, "torch": torch.__version__, "steps": args.steps, "peak TFLOPS": peak}
    report: dict[str, Any] = {"setup": setup, "recipes": {}}
    for recipe in args.recipes:
        config = RECIPES[recipe]()
        batch = config.micro_batch_size if args.batch is None else args.batch
        config = replace(config, batch_size=batch, micro_batch_size=batch)
        rows = report["recipes"].setdefault(recipe, {})
        for variant, changes in (FULL_SIZE_VARIANTS if recipe in FAMILIES else MINI_VARIANTS).items():
            row = measure_variant(config, changes, args.steps, device, peak)
            rows[variant] = rounded({"samples per step": batch, **row})
            save(report, markdown(report), args.out)


if __name__ == "__main__":
    main()
