"""Subject-driven generation against plain diffusers text-to-image on the same UNet: time, memory and operations.

    python benchmarks/speed.py                                     # the shipped model on this machine
    python benchmarks/speed.py --model sdxl --size 512 --steps 2 --rounds 2 --compiled --only memory images
    python benchmarks/speed.py --model sdxl --device cuda --batch 1 2 4 8

Both sides are timed in turns (A B A B ...) in one run; what counts is the ratio of the medians. Both run eagerly and
compiled, in blocks or whole, on the same tensors. Nothing is downloaded: SDXL and SD1.5 have random weights.
"""

import argparse
import json
import math
import platform
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.full_size import FAMILIES, default_dtype, let_masks_lie_together, random_pipeline
from benchmarks.workbench import Workbench, peak_bytes, request, side_by_side
from realcustom import RealCustomPipeline, Request
from realcustom.visual_attention import SparseMask

APPROXIMATIONS = {
    "exact": {},
    "mask of the generation branch": {"mask_source": "generation_branch"},
    "mask at every 2nd step": {"mask_interval": 2},
    "mask at every 3rd step": {"mask_interval": 3},
    "mask at every 6th step": {"mask_interval": 6},
}


def time_images(benches: dict[str, Workbench], number: int, rounds: int) -> dict[str, float]:
    """Whole images, every step of them, `number` together; text and references are known."""
    ways = {
        f"{side} {how}": partial(work, number)
        for how, bench in benches.items()
        for side, work in (("plain", bench.text_to_image), ("ours", bench.ours))
    }
    bench = benches["eager"]
    for each in benches.values():
        each.generations(number)  # texts and references are known from here on
    taken = side_by_side(ways, bench.device, rounds)
    fastest = min(value for name, value in taken.items() if name.startswith("ours"))
    report = {f"{name} s": value for name, value in taken.items()}
    for how in benches:
        report[f"ours / plain, {how}"] = taken[f"ours {how}"] / taken[f"plain {how}"]
        if how != "eager":
            report[f"ours {how} / plain eager"] = taken[f"ours {how}"] / taken["plain eager"]
    asked = bench.request
    rows = asked.num_inference_steps * (1 + (asked.guidance_scale > 1))
    report["rows, ours / plain"] = (rows + asked.early_stop_step) / rows
    report["rows per second"] = number * (rows + asked.early_stop_step) / fastest
    return report


def memory(bench: Workbench, number: int) -> dict[str, float]:
    """Most memory of a step with mask beyond weights and cached references, on both sides."""
    short = dict(num_inference_steps=1, early_stop_step=1)
    bench.generations(number)  # the references are cached from here on
    plain = peak_bytes(lambda: bench.text_to_image(number, **short), bench.device)
    ours = peak_bytes(lambda: bench.ours(number, **short), bench.device)
    return {
        "plain MB": plain / 1e6,
        "ours MB": ours / 1e6,
        "ours / plain": ours / plain,
        "keys and values of the references MB": bench.pipeline.reference_cache.num_bytes / 1e6,
        "texts with their keys and values MB": bench.pipeline.text_cache.num_bytes / 1e6,
    }


@torch.no_grad()
def parts(bench: Workbench, rounds: int) -> dict[str, float]:
    """Seconds of each part of the work on one image, and of a step of each kind."""
    pipeline, denoiser = bench.pipeline, bench.pipeline.denoiser
    (generation,) = bench.generations()
    # The first of its two steps records for the second.
    (recording,) = bench.generations(mask_source="generation_branch", num_inference_steps=2, early_stop_step=2)

    def prepare_new() -> None:
        pipeline.clear_caches()
        bench.generations()

    denoiser.guidance_branch([generation])
    relevance = generation.guidance_masks[None]
    recording.set_masks(generation.guidance_masks)
    assert recording.records_next_mask
    works = {
        "prepare, new prompt and reference": prepare_new,
        "prepare, known prompt and reference": bench.generations,
        "guidance branch with mask": lambda: denoiser.guidance_branch([generation]),
        "of which choosing the positions": lambda: denoiser.set_masks([generation], relevance),
        "generation branch": lambda: denoiser.generation_branch([generation]),
        "generation branch, recording the next mask": lambda: denoiser.generation_branch([recording]),
        "plain text-to-image of one step": lambda: bench.text_to_image(num_inference_steps=1, early_stop_step=1),
        "decode": lambda: pipeline.decode([generation]),
    }
    return {f"{name} s": value for name, value in side_by_side(works, bench.device, rounds).items()}


def approximations(bench: Workbench, rounds: int, num_images: int) -> dict[str, dict[str, float]]:
    """Time against plain text-to-image, and how far the final masks are those of the exact mode with the same seeds.

    Args:
        num_images: for the masks; 0 leaves them out, as random weights' tell nothing.
    """
    ways = {name: partial(bench.ours, **changes) for name, changes in APPROXIMATIONS.items()}
    bench.generations()
    taken = side_by_side({"plain": bench.text_to_image, **ways}, bench.device, rounds)
    report = {name: {"ours / plain": taken[name] / taken["plain"]} for name in APPROXIMATIONS}
    if not num_images:
        return report
    masks = {
        name: [mask > 0 for g in bench.ours(num_images, **changes) for mask in g.guidance_masks]
        for name, changes in APPROXIMATIONS.items()
    }
    overlap = lambda one, two: float((one & two).sum() / (one | two).sum())
    for name in APPROXIMATIONS:
        report[name]["mask IoU"] = statistics.mean(map(overlap, masks["exact"], masks[name]))
    return report


def _cpu_attention(query, key, value, *_, out_shape=None, **__) -> int:
    """The counter knows the fused attention of GPUs only."""
    return sdpa_flop_count(query, key, value)


@torch.no_grad()
def operations(pipeline: RealCustomPipeline, asked: Request) -> dict[str, float]:
    """Operations of one image against plain text-to-image with as many steps; exact counts, no timing."""
    generation = pipeline.prepare(asked)
    plain = pipeline.prepare(Request(prompt=asked.prompt, height=asked.height, width=asked.width, seed=0))
    for name in ("text", "negative_text"):  # which plain text-to-image projects anew in every step
        if (text := getattr(plain, name)) is not None:
            setattr(plain, name, replace(text, keys_values=None))
    counts, denoiser = {}, pipeline.denoiser
    if pipeline.unet.device.type == "meta":  # shapes do not tell where a mask is; its share of positions is γ_scope
        generation.sparse_masks = partial(_share_of_positions, generation.request.subjects[0].scope_ratio)
    works = {
        "guidance": lambda: denoiser.guidance_branch([generation]),
        "generation": lambda: denoiser.generation_branch([generation]),
        "plain": lambda: denoiser.generation_branch([plain]),
    }
    known = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}
    for name, work in works.items():
        with FlopCounterMode(display=False, custom_mapping=known) as counter:
            work()
        counts[name] = counter.get_total_flops()
    steps, stop = generation.num_steps, generation.request.early_stop_step
    ours = stop * counts["guidance"] + steps * counts["generation"]
    return {
        "plain step TFLOP": counts["plain"] / 1e12,
        "guidance branch / plain step": counts["guidance"] / counts["plain"],
        "generation branch / plain step": counts["generation"] / counts["plain"],
        "image / plain image": ours / (steps * counts["plain"]),
        "floor in rows": (2 * steps + stop) / (2 * steps),
    }


def _share_of_positions(share: float, size: tuple[int, int], way: str) -> SparseMask:
    count = math.ceil(share * size[0] * size[1])
    return SparseMask(torch.empty(1, count, dtype=torch.int64, device="meta"), torch.empty(1, count, 1, device="meta"))


def load(model: str, device: str, dtype: torch.dtype) -> RealCustomPipeline:
    if model in FAMILIES:
        return random_pipeline(model, device, dtype)
    return RealCustomPipeline.from_pretrained(model, dtype=dtype).to(device)


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} thread(s), no GPU"


def measure(flags: argparse.Namespace) -> dict:
    """The report, printed section by section as it grows."""
    dtype = getattr(torch, flags.dtype) if flags.dtype else default_dtype(flags.device)
    weights_are_random = flags.model in FAMILIES
    shapes_suffice = weights_are_random and set(flags.only) == {"operations"}
    pipeline = load(flags.model, "meta" if shapes_suffice else flags.device, dtype)
    sampling = pipeline.sampling
    steps = flags.steps or sampling.num_inference_steps
    stop = flags.early_stop_step or max(1, round(steps * sampling.early_stop_step / sampling.num_inference_steps))
    asked = request(flags.size or sampling.height, steps, stop, flags.subjects)
    benches = {"eager": Workbench(pipeline, asked)}
    for how in flags.compiled:
        benches[f"compiled {how}"] = Workbench(pipeline, asked, compiled=how)
    if weights_are_random:
        for bench in benches.values():
            let_masks_lie_together(bench.pipeline)
    report: dict = {}

    def add(section: str, values: object) -> None:
        report[section] = _rounded(values)
        print(json.dumps({section: report[section]}, indent=2), flush=True)

    add("machine", f"{machine(flags.device)}; torch {torch.__version__}")
    add(
        "setting",
        f"{flags.model}, {asked.height} px, {steps} steps, T_stop {stop}, {flags.subjects} subject(s), {dtype}",
    )
    if "operations" in flags.only:
        # Shapes alone cost no time; they cannot tell how several subjects share an image, so there is one.
        counted = random_pipeline(flags.model, "meta") if flags.model in FAMILIES else pipeline
        add("operations, one subject", operations(counted, replace(asked, subjects=asked.subjects[:1])))
    if "memory" in flags.only:
        add("memory beyond weights", memory(benches["eager"], flags.batch[0]))
    if "images" in flags.only:
        for number in flags.batch:
            add(f"{number} together", time_images(benches, number, flags.rounds))
    if "parts" in flags.only:
        for how, bench in benches.items():
            add(f"parts, {how}", parts(bench, flags.rounds))
    if "approximations" in flags.only:
        overlap_images = 0 if weights_are_random else flags.overlap_images
        add("approximations", approximations(list(benches.values())[-1], flags.rounds, overlap_images))
    return report


def _rounded(values):
    if isinstance(values, dict):
        return {name: _rounded(value) for name, value in values.items()}
    return float(f"{values:.4g}") if isinstance(values, float) else values


SECTIONS = ("operations", "memory", "images", "parts", "approximations")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/mini", help="folder of a model, or sdxl / sd15 with random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: the fast one)")
    parser.add_argument("--size", type=int, help="px (default: the model's)")
    parser.add_argument("--steps", type=int, help="(default: the model's)")
    parser.add_argument("--early-stop-step", type=int, help="T_stop (default: the model's share of the steps)")
    parser.add_argument("--subjects", type=int, choices=(1, 2), default=1)
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="images that advance together")
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed turns of each side; of more than two the first is not counted"
    )
    parser.add_argument("--overlap-images", type=int, default=8, help="images for the masks' overlap")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections of the report")
    parser.add_argument(
        "--compiled",
        nargs="*",
        choices=("blocks", "whole", "unguarded"),
        default=("blocks", "whole"),
        help="time both sides compiled too: their transformer blocks; their whole UNets; these, diffusers' as well "
        "without the guards that ours does without (nothing: only eagerly)",
    )
    parser.add_argument("--out", type=Path, help="also write the report as JSON")
    flags = parser.parse_args()
    if {"whole", "unguarded"} <= set(flags.compiled):
        parser.error("whole and unguarded would share diffusers' programs; time them in runs of their own.")
    report = measure(flags)
    if flags.out:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        flags.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
