"""Time, memory and FLOPs of subject-driven generation relative to text-to-image by diffusers with the same UNet.

    python benchmarks/speed.py                                     # the embedded model on this machine
    python benchmarks/speed.py --model sdxl --size 512 --steps 2 --rounds 2 --compiled --only memory images
    python benchmarks/speed.py --model sdxl --device cuda --batch 1 2 4 8

Both pipelines use the same tensors and are timed alternately (A B A B ...) in one run, eagerly and compiled. Compare
the ratios of the medians; absolute times depend on the machine. SDXL and SD1.5 have random weights, so nothing is
downloaded.
"""

import argparse
import json
import math
import platform
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.full_size import FAMILIES, default_dtype, make_masks_compact, random_pipeline
from benchmarks.report import rounded
from benchmarks.workbench import (
    APPROXIMATIONS,
    Workbench,
    benchmark_request,
    mask_iou,
    peak_bytes,
    time_alternately,
)
from realcustom import Generation, RealCustomPipeline, Request
from realcustom.assets import MINI_MODEL
from realcustom.denoiser import Denoiser
from realcustom.visual_attention import SortedMask


def time_images(benches: dict[str, Workbench], batch_size: int, rounds: int) -> dict[str, float]:
    """Seconds of all steps of `batch_size` images that are generated together, with cached texts and references.

    Args:
        benches: execution mode ("eager", "compiled blocks", ...) -> its workbench.
    """
    works = {
        f"{pipeline} {mode}": partial(work, batch_size)
        for mode, bench in benches.items()
        for pipeline, work in (("text_to_image", bench.text_to_image), ("realcustom", bench.realcustom))
    }
    eager = benches["eager"]
    for bench in benches.values():
        bench.prepare(batch_size)  # fills the caches
    times = time_alternately(works, eager.device, rounds)
    report = {f"{name} s": value for name, value in times.items()}
    for mode in benches:
        report[f"realcustom / text_to_image, {mode}"] = times[f"realcustom {mode}"] / times[f"text_to_image {mode}"]
        if mode != "eager":
            ratio = times[f"realcustom {mode}"] / times["text_to_image eager"]
            report[f"realcustom {mode} / text_to_image eager"] = ratio
    request = eager.request
    text_to_image_rows = request.num_inference_steps * (1 + (request.guidance_scale > 1))
    rows = text_to_image_rows + request.early_stop_step
    report["rows, realcustom / text_to_image"] = rows / text_to_image_rows
    fastest = min(value for name, value in times.items() if name.startswith("realcustom"))
    report["rows per second"] = batch_size * rows / fastest
    return report


def memory(bench: Workbench, batch_size: int) -> dict[str, float]:
    """Peak memory of a step with a new mask, without weights and cached references; and the size of the caches."""
    one_step = dict(num_inference_steps=1, early_stop_step=1)
    bench.prepare(batch_size)  # fills the caches
    text_to_image = peak_bytes(lambda: bench.text_to_image(batch_size, **one_step), bench.device)
    realcustom = peak_bytes(lambda: bench.realcustom(batch_size, **one_step), bench.device)
    return {
        "text_to_image MB": text_to_image / 1e6,
        "realcustom MB": realcustom / 1e6,
        "realcustom / text_to_image": realcustom / text_to_image,
        "reference cache MB": bench.pipeline.reference_cache.num_bytes / 1e6,
        "text cache MB": bench.pipeline.text_cache.num_bytes / 1e6,
    }


@torch.no_grad()
def parts(bench: Workbench, rounds: int) -> dict[str, float]:
    """Seconds of each part of the work on one image."""
    pipeline, denoiser = bench.pipeline, bench.pipeline.denoiser
    (generation,) = bench.prepare()
    # The first of its two steps records the mask of the second.
    (recording,) = bench.prepare(mask_source="generation_branch", num_inference_steps=2, early_stop_step=2)

    def prepare_uncached() -> None:
        pipeline.clear_caches()
        bench.prepare()

    denoiser.guidance_branch([generation])
    assert generation.guidance_masks is not None
    relevance = generation.guidance_masks[None]
    recording.set_masks(generation.guidance_masks)
    assert recording.records_next_mask
    works = {
        "prepare, new prompt and reference": prepare_uncached,
        "prepare, cached prompt and reference": bench.prepare,
        "guidance branch with mask": lambda: denoiser.guidance_branch([generation]),
        "mask selection, part of the guidance branch": lambda: denoiser.set_masks([generation], relevance),
        "generation branch": lambda: denoiser.generation_branch([generation]),
        "generation branch, recording the next mask": lambda: denoiser.generation_branch([recording]),
        "text_to_image, one step": lambda: bench.text_to_image(num_inference_steps=1, early_stop_step=1),
        "decode": lambda: pipeline.decode([generation]),
    }
    return {f"{name} s": value for name, value in time_alternately(works, bench.device, rounds).items()}


def approximations(bench: Workbench, rounds: int, num_images: int) -> dict[str, dict[str, float]]:
    """Time of each approximate mode relative to text-to-image, and the IoU of its final masks with the exact ones.

    Args:
        num_images: images to average the IoU over; 0 omits it, because masks of random weights are meaningless.
    """
    works = {name: partial(bench.realcustom, **settings) for name, settings in APPROXIMATIONS.items()}
    bench.prepare()  # fills the caches
    times = time_alternately({"text_to_image": bench.text_to_image, **works}, bench.device, rounds)
    report = {name: {"realcustom / text_to_image": times[name] / times["text_to_image"]} for name in APPROXIMATIONS}
    if not num_images:
        return report
    images = {name: bench.realcustom(num_images, **settings) for name, settings in APPROXIMATIONS.items()}
    for name in APPROXIMATIONS:
        report[name]["mask IoU"] = mask_iou(images["exact"], images[name])
    return report


@torch.no_grad()
def operations(pipeline: RealCustomPipeline, request: Request) -> dict[str, float]:
    """Exact FLOPs of one image relative to text-to-image with the same number of steps; nothing is timed."""
    generation = pipeline.prepare(request)
    text_only = pipeline.prepare(replace(request, subjects=()))
    # A stock pipeline computes the keys and values of the text in every step.
    text_only.text = replace(text_only.text, keys_values=None)
    if text_only.negative_text is not None:
        text_only.negative_text = replace(text_only.negative_text, keys_values=None)
    denoiser = pipeline.denoiser
    if pipeline.unet.device.type == "meta":
        _assume_mask_area(denoiser, generation)
    works = {
        "guidance": lambda: denoiser.guidance_branch([generation]),
        "generation": lambda: denoiser.generation_branch([generation]),
        "text_to_image": lambda: denoiser.generation_branch([text_only]),
    }
    # torch only registers the fused attention kernels of GPUs.
    cpu_kernel = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops}
    flops = {}
    for name, work in works.items():
        with FlopCounterMode(display=False, custom_mapping=cpu_kernel) as counter:
            work()
        flops[name] = counter.get_total_flops()
    steps, stop = generation.num_steps, generation.request.early_stop_step
    realcustom = stop * flops["guidance"] + steps * flops["generation"]
    return {
        "text_to_image step TFLOP": flops["text_to_image"] / 1e12,
        "guidance branch / text_to_image step": flops["guidance"] / flops["text_to_image"],
        "generation branch / text_to_image step": flops["generation"] / flops["text_to_image"],
        "realcustom / text_to_image": realcustom / (steps * flops["text_to_image"]),
        "rows, realcustom / text_to_image": (2 * steps + stop) / (2 * steps),
    }


def _cpu_attention_flops(query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _assume_mask_area(denoiser: Denoiser, generation: Generation) -> None:
    """Give a generation on the meta device masks of the right area: γ_scope of the positions at each resolution."""
    scope_ratio = generation.request.subjects[0].scope_ratio

    for size in denoiser.sizes(generation):
        num_positions = size[0] * size[1]
        count = math.ceil(scope_ratio * num_positions)
        index = torch.empty(num_positions, dtype=torch.int64, device="meta")
        weight = torch.empty(num_positions, 1, dtype=denoiser.dtype, device="meta")
        generation.sorted_masks[size] = [SortedMask(index, weight, count)]
        generation.largest_masks[size] = count


def load(model: str, device: str, dtype: torch.dtype) -> RealCustomPipeline:
    if model in FAMILIES:
        return random_pipeline(model, device, dtype)
    folder = MINI_MODEL if model == "mini" else model
    return RealCustomPipeline.from_pretrained(folder, dtype=dtype).to(device)


def describe_machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} thread(s), no GPU"


def measure(args: argparse.Namespace) -> dict:
    """Measure the selected sections and print each one when it is complete."""
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(args.device)
    has_random_weights = args.model in FAMILIES
    only_flops = has_random_weights and set(args.only) == {"operations"}
    pipeline = load(args.model, "meta" if only_flops else args.device, dtype)
    sampling = pipeline.sampling
    steps = args.steps or sampling.num_inference_steps
    stop = args.early_stop_step or max(1, round(steps * sampling.early_stop_step / sampling.num_inference_steps))
    request = benchmark_request(args.size or sampling.height, steps, stop, args.subjects)
    benches = {"eager": Workbench(pipeline, request)}
    for unit in args.compiled:
        benches[f"compiled {unit}"] = Workbench(pipeline, request, compiled=unit)
    if has_random_weights:
        for bench in benches.values():
            make_masks_compact(bench.pipeline)
    report: dict = {}

    def add(section: str, values: object) -> None:
        report[section] = rounded(values)
        print(json.dumps({section: report[section]}, indent=2), flush=True)

    add("machine", f"{describe_machine(args.device)}; torch {torch.__version__}")
    add(
        "setting",
        f"{args.model}, {request.height} px, {steps} steps, T_stop {stop}, {args.subjects} subject(s), {dtype}",
    )
    if "operations" in args.only:
        # Counting FLOPs requires only shapes, so random weights need no memory here. The selection for several
        # subjects requires values, so there is one subject.
        counted = random_pipeline(args.model, "meta") if has_random_weights else pipeline
        add("operations, one subject", operations(counted, replace(request, subjects=request.subjects[:1])))
    if "memory" in args.only:
        add("memory beyond weights", memory(benches["eager"], args.batch[0]))
    if "images" in args.only:
        for batch_size in args.batch:
            add(f"batch size {batch_size}", time_images(benches, batch_size, args.rounds))
    if "parts" in args.only:
        for mode, bench in benches.items():
            add(f"parts, {mode}", parts(bench, args.rounds))
    if "approximations" in args.only:
        num_images = 0 if has_random_weights else args.iou_images
        add("approximations", approximations(list(benches.values())[-1], args.rounds, num_images))
    return report


SECTIONS = ("operations", "memory", "images", "parts", "approximations")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="mini, sdxl or sd15 (random weights), or a folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="(default: bfloat16 if the device has instructions for it, otherwise float32)",
    )
    parser.add_argument("--size", type=int, help="image size in px (default: the model's)")
    parser.add_argument("--steps", type=int, help="(default: the model's)")
    parser.add_argument("--early-stop-step", type=int, help="T_stop (default: the model's fraction of the steps)")
    parser.add_argument("--subjects", type=int, choices=(1, 2), default=1)
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes to measure (default: 1)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="measurements of each pipeline; with more than two, the first one is discarded (default: %(default)s)",
    )
    parser.add_argument("--iou-images", type=int, default=8, help="images for the IoU of masks (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to measure")
    parser.add_argument(
        "--compiled",
        nargs="*",
        choices=("blocks", "resnets"),
        default=("blocks",),
        help="also time both pipelines with compiled transformer blocks, or with compiled transformer and residual "
        "blocks; no value: eager only (default: blocks)",
    )
    parser.add_argument("--out", type=Path, help="write the report to this JSON file")
    args = parser.parse_args()
    return args


def main() -> None:
    args = parse_args()
    report = measure(args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
