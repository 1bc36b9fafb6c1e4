"""Subject-driven generation against plain diffusers text-to-image on the same UNet: time, memory and operations.

    python benchmarks/speed.py                                     # the shipped model on this machine
    python benchmarks/speed.py --model sdxl --size 512 --steps 2   # SDXL's shapes with random weights
    python benchmarks/speed.py --model sdxl --device cuda --compile --batch 1 2 4 8

Both sides are timed in turns (A B A B ...) in one run; what counts is the ratio of the medians. Nothing is downloaded.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.full_size import random_pipeline
from realcustom import RealCustomPipeline, Request, Subject

# The counter knows the fused attention of GPUs only.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop}
PROMPT, PHRASE = "a dog on the beach", "dog"
APPROXIMATIONS = {
    "exact": {},
    "mask of the generation branch": {"mask_source": "generation_branch"},
    "mask at every 3rd step": {"mask_interval": 3},
}


class Workbench:
    """A pipeline, and plain diffusers on the same weights with diffusers' own attention."""

    def __init__(self, pipeline: RealCustomPipeline, size: int, steps: int, stop: int, subjects: int, compiled: bool):
        self.pipeline, self.steps = pipeline, steps
        self.device = pipeline.unet.device
        phrases = [PHRASE, "beach"][:subjects]
        self.request = Request(
            prompt=PROMPT,
            subjects=tuple(Subject(image=Image.new("RGB", (64, 64), "red"), target_phrase=p) for p in phrases),
            height=size,
            width=size,
            num_inference_steps=steps,
            early_stop_step=stop,
            seed=0,
        ).with_defaults(pipeline.sampling)
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(pipeline.unet.config)
        unet.load_state_dict(pipeline.unet.state_dict(), assign=True)  # the same tensors, not a copy
        self.plain_unet = unet.eval().requires_grad_(False)
        if compiled:
            pipeline.compile()
            self.plain_unet.compile_repeated_blocks(fullgraph=True)
        shared = dict(vae=None, text_encoder=None, tokenizer=None, unet=self.plain_unet)
        scheduler = copy.deepcopy(pipeline.scheduler)
        if pipeline.text_encoder_2 is None:
            extras = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
            self.plain = StableDiffusionPipeline(**shared, **extras, scheduler=scheduler)
        else:
            self.plain = StableDiffusionXLPipeline(**shared, text_encoder_2=None, tokenizer_2=None, scheduler=scheduler)
        self.plain.set_progress_bar_config(disable=True)

    def generations(self, number: int = 1, **changes):
        request = replace(self.request, **changes)
        return [self.pipeline.prepare(r) for r in request.variations(number)]

    def ours(self, number: int = 1, **changes) -> list[torch.Tensor]:
        """Every step of `number` pictures, text and references being known already."""
        generations = self.generations(number, **changes)
        while not generations[0].done:
            self.pipeline.step(generations)
        return generations

    def text_to_image(self, number: int = 1) -> None:
        """The same steps by diffusers' own pipeline, without subjects."""
        (generation,) = self.generations(subjects=())
        text, negative = generation.text, generation.negative_text
        side = generation.latents.shape[-1] * 8  # the stock class believes in 8 px per latent
        options = dict(
            prompt_embeds=text.embeds[None].repeat(number, 1, 1),
            latents=generation.latents[None].repeat(number, 1, 1, 1).to(self.plain_unet.dtype),
        )
        if negative is not None:
            options["negative_prompt_embeds"] = negative.embeds[None].repeat(number, 1, 1)
        if text.pooled is not None:
            options["pooled_prompt_embeds"] = text.pooled[None].repeat(number, 1)
            if negative is not None:
                options["negative_pooled_prompt_embeds"] = negative.pooled[None].repeat(number, 1)
        self.plain(
            **options,
            height=side,
            width=side,
            num_inference_steps=self.steps,
            guidance_scale=generation.request.guidance_scale,
            output_type="latent",
        )


def seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def side_by_side(ways: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each way, timed in turns after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, work in ways.items():
            taken = seconds(work, device)
            if turn:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Most memory held at once during `work`, beyond what was held before; None where it cannot be told."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        before = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        work()
        return _status_bytes("VmHWM") - before
    except OSError:
        return None


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def time_parts(bench: Workbench, rounds: int) -> dict[str, float]:
    """Seconds of each part of the work on one picture, and of a step of each kind."""
    pipeline = bench.pipeline
    (generation,) = bench.ours()

    def prepare_new() -> None:
        pipeline.clear_caches()
        bench.generations()

    recorder = pipeline._recorder([generation])

    def mask() -> None:
        pipeline._set_masks([generation], recorder)

    generation.step_index = 0
    with torch.no_grad(), pipeline._attention.connected(recordings=recorder.layers):
        rows = torch.stack([generation.model_input()]).to(pipeline.unet.dtype)
        text, added = generation.text, None
        if text.pooled is not None:
            added = {
                "text_embeds": text.pooled[None].to(rows.dtype),
                "time_ids": generation.time_ids[None].to(rows.dtype),
            }
        pipeline.unet(rows, generation.timestep, text.embeds[None].to(rows.dtype), added_cond_kwargs=added)
    parts = {
        "prepare (new prompt and reference)": prepare_new,
        "prepare (known prompt and reference)": bench.generations,
        "guidance branch with mask": lambda: pipeline.guidance_branch([generation]),
        "of which mask": mask,
        "generation branch": lambda: pipeline.generation_branch([generation]),
        "decode": lambda: pipeline.decode([generation]),
    }
    with torch.no_grad():
        return side_by_side(parts, bench.device, rounds)


def count_flops(pipeline: RealCustomPipeline, request: Request) -> dict[str, float]:
    """Operations of one picture against plain text-to-image with as many steps; exact counts, no timing."""
    generation = pipeline.prepare(request)
    plain = pipeline.prepare(Request(prompt=request.prompt, height=request.height, width=request.width, seed=0))
    counts = {}
    works = {
        "guidance": lambda: pipeline.guidance_branch([generation]),
        "generation": lambda: pipeline.generation_branch([generation]),
        "plain": lambda: pipeline.generation_branch([plain]),
    }
    with torch.no_grad():
        for name, work in works.items():
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                work()
            counts[name] = counter.get_total_flops()
    steps, stop = generation.num_steps, generation.request.early_stop_step
    ours = stop * counts["guidance"] + steps * counts["generation"]
    return {
        "TFLOP of a plain step": counts["plain"] / 1e12,
        "guidance branch / plain step": counts["guidance"] / counts["plain"],
        "generation branch / plain step": counts["generation"] / counts["plain"],
        "picture / plain picture": ours / (steps * counts["plain"]),
    }


def mask_overlap(bench: Workbench, changes: dict, pictures: int) -> float:
    """Mean intersection over union of the final masks with those of the exact mode, same seeds."""
    overlaps = []
    for exact, other in zip(bench.ours(pictures), bench.ours(pictures, **changes), strict=True):
        for one, two in zip(exact.guidance_masks > 0, other.guidance_masks > 0, strict=True):
            overlaps.append(float((one & two).sum() / (one | two).sum()))
    return statistics.mean(overlaps)


def load(flags: argparse.Namespace) -> RealCustomPipeline:
    dtype = getattr(torch, flags.dtype or ("bfloat16" if flags.model in ("sdxl", "sd15") else "float32"))
    if flags.model in ("sdxl", "sd15"):
        return random_pipeline(flags.model, flags.device, dtype)
    pipeline = RealCustomPipeline.from_pretrained(flags.model, dtype=dtype).to(flags.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure(flags: argparse.Namespace) -> dict:
    pipeline = load(flags)
    sampling = pipeline.sampling
    steps = flags.steps or sampling.num_inference_steps
    stop = flags.early_stop_step or max(1, round(steps * sampling.early_stop_step / sampling.num_inference_steps))
    size = flags.size or sampling.height
    bench = Workbench(pipeline, size, steps, stop, flags.subjects, flags.compile)
    report: dict = {
        "machine": torch.cuda.get_device_name()
        if flags.device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": flags.model,
        "setting": f"{size} px, {steps} steps, T_stop {stop}, {flags.subjects} subject(s), {pipeline.unet.dtype}, "
        f"{'compiled' if flags.compile else 'eager'}",
        "pictures together": {},
    }
    for number in flags.batch:
        ways = {"plain": lambda n=number: bench.text_to_image(n), "ours": lambda n=number: bench.ours(n)}
        taken = side_by_side(ways, bench.device, flags.rounds)
        memory = {name: peak_bytes(work, bench.device) for name, work in ways.items()}
        rows = number * (stop + 2 * steps)
        report["pictures together"][number] = {
            "plain_s": round(taken["plain"], 4),
            "ours_s": round(taken["ours"], 4),
            "ratio": round(taken["ours"] / taken["plain"], 3),
            "rows_per_s": round(rows / taken["ours"], 2),
            "plain_peak_MB": memory["plain"] and round(memory["plain"] / 1e6, 1),
            "ours_peak_MB": memory["ours"] and round(memory["ours"] / 1e6, 1),
        }
    references = sum(k.nbytes + v.nbytes for kv in pipeline._references.values() for k, v in kv.values())
    report["cached reference MB"] = round(references / 1e6, 1)
    report["parts_s"] = {name: round(value, 5) for name, value in time_parts(bench, flags.rounds).items()}
    ways = {name: (lambda c=changes: bench.ours(**c)) for name, changes in APPROXIMATIONS.items()}
    taken = side_by_side({"plain": bench.text_to_image, **ways}, bench.device, flags.rounds)
    report["approximations"] = {
        name: {
            "ratio": round(taken[name] / taken["plain"], 3),
            "mask_iou": round(mask_overlap(bench, changes, flags.overlap_pictures), 3),
        }
        for name, changes in APPROXIMATIONS.items()
    }
    counted = random_pipeline(flags.model, "meta") if flags.model in ("sdxl", "sd15") else pipeline
    report["operations"] = {name: round(value, 4) for name, value in count_flops(counted, bench.request).items()}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/mini", help="folder of a model, or sdxl / sd15 with random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--size", type=int, help="px (default: the model's)")
    parser.add_argument("--steps", type=int, help="(default: the model's)")
    parser.add_argument("--early-stop-step", type=int, help="T_stop (default: the model's share of the steps)")
    parser.add_argument("--subjects", type=int, choices=(1, 2), default=1)
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="pictures that advance together")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each side")
    parser.add_argument("--overlap-pictures", type=int, default=4, help="pictures for the masks' overlap")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the repeated blocks on both sides")
    parser.add_argument("--out", type=Path, help="also write the report as JSON")
    flags = parser.parse_args()
    report = measure(flags)
    print(json.dumps(report, indent=2))
    if flags.out:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        flags.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
