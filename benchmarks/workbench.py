"""Runs this project's pipeline and a stock diffusers pipeline on the same tensors; measures time and memory."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from realcustom import Generation, RealCustomPipeline, Request, Subject
from realcustom.config import Execution
from realcustom.execution import compile_blocks
from realcustom.request import seed_variations

PROMPT, PHRASES = "a dog on the beach", ("dog", "beach")
APPROXIMATIONS: dict[str, dict[str, Any]] = {  # approximate mode -> settings of its request
    "exact": {},
    "mask of the generation branch": {"mask_source": "generation_branch"},
    "mask every 2nd step": {"mask_interval": 2},
    "mask every 3rd step": {"mask_interval": 3},
    "mask every 6th step": {"mask_interval": 6},
}


class Workbench:
    """A RealCustom++ pipeline and a stock diffusers pipeline with stock attention on the same weights.

    Args:
        pipeline: supplies the weights. Its UNet is not changed: each pipeline of the workbench has its own UNet module
            around the same tensors.
        request: what `realcustom` generates; `text_to_image` uses its prompt and settings without the subjects.
        compiled: what to compile in both UNets: the transformer "blocks", these and the residual blocks ("resnets"),
            or nothing (None).
        execution: how the calls of `pipeline` run, see `RealCustomPipeline.execution`.
    """

    def __init__(
        self,
        pipeline: RealCustomPipeline,
        request: Request,
        compiled: Literal["blocks", "resnets"] | None = None,
        execution: Execution = "auto",
    ) -> None:
        self.request = request.resolve(pipeline.sampling)
        self.device = pipeline.unet.device
        self.pipeline = RealCustomPipeline(
            **{**pipeline.components, "unet": same_tensors(pipeline.unet)},
            realcustom_config=pipeline.realcustom_config,
            force_zeros_for_empty_prompt=pipeline.config.force_zeros_for_empty_prompt,
        )
        self.stock = stock_pipeline(pipeline)
        self.pipeline.execution = execution
        if compiled:
            self.pipeline.compile(resnets=compiled == "resnets")
            compile_blocks(self.stock.unet, resnets=compiled == "resnets")
        for each in (self.pipeline, self.stock):
            each.set_progress_bar_config(disable=True)

    def prepare(self, batch_size: int = 1, **settings) -> list[Generation]:
        """Prepare `batch_size` generations of the request, with `settings` replaced, that differ in their seeds."""
        request = replace(self.request, **settings)
        return [self.pipeline.prepare(r) for r in seed_variations(request, batch_size)]

    def realcustom(self, batch_size: int = 1, **settings) -> list[Generation]:
        """Run all steps of `batch_size` images; text and references are cached after the first call."""
        generations = self.prepare(batch_size, **settings)
        self.pipeline.run(generations)
        return generations

    def text_to_image(self, batch_size: int = 1, **settings) -> None:
        """Run the same number of steps of the same number of images with the stock pipeline, without subjects."""
        (generation,) = self.prepare(subjects=(), **settings)
        text, negative = generation.text, generation.negative_text
        size_px = generation.latents.shape[-1] * 8  # the stock pipelines assume 8 px per latent position
        options = dict(
            prompt_embeds=text.embeds[None].repeat(batch_size, 1, 1),
            latents=generation.latents[None].repeat(batch_size, 1, 1, 1).to(self.stock.unet.dtype),
        )
        if negative is not None:
            options["negative_prompt_embeds"] = negative.embeds[None].repeat(batch_size, 1, 1)
        if text.pooled is not None:
            options["pooled_prompt_embeds"] = text.pooled[None].repeat(batch_size, 1)
            if negative is not None:
                assert negative.pooled is not None
                options["negative_pooled_prompt_embeds"] = negative.pooled[None].repeat(batch_size, 1)
        self.stock(
            **options,
            height=size_px,
            width=size_px,
            num_inference_steps=generation.request.num_inference_steps,
            guidance_scale=generation.request.guidance_scale,
            output_type="latent",
        )


def benchmark_request(size_px: int, num_steps: int, early_stop_step: int, num_subjects: int) -> Request:
    """A request for a square image with gray references. Time does not depend on the content of a reference."""
    gray = Image.new("RGB", (64, 64), "gray")
    return Request(
        prompt=PROMPT,
        subjects=tuple(Subject(image=gray, target_phrase=phrase) for phrase in PHRASES[:num_subjects]),
        height=size_px,
        width=size_px,
        num_inference_steps=num_steps,
        early_stop_step=early_stop_step,
        seed=0,
    )


def same_tensors(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A new UNet module with stock attention that shares the tensors of `unet`."""
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def stock_pipeline(pipeline: RealCustomPipeline) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A stock diffusers pipeline that shares the UNet's tensors. It takes encoded text and returns latents."""
    parts = dict(vae=None, text_encoder=None, tokenizer=None, unet=same_tensors(pipeline.unet))
    parts["scheduler"] = copy.deepcopy(pipeline.scheduler)
    if pipeline.text_encoder_2 is None:
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    return StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)


def mask_iou(ones: Sequence[Generation], others: Sequence[Generation]) -> float:
    """Mean IoU of the final guidance masks of the same requests."""
    ious = []
    for one, other in zip(ones, others, strict=True):
        assert one.guidance_masks is not None and other.guidance_masks is not None
        for a, b in zip(one.guidance_masks > 0, other.guidance_masks > 0, strict=True):
            ious.append(float((a & b).sum() / (a | b).sum()))
    return statistics.mean(ious)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of `work`, including the GPU work that it starts."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def time_alternately(works: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each work, timed alternately (A B A B ...); of more than two rounds, the first is discarded."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return {name: statistics.median(values[1:] if rounds > 2 else values) for name, values in times.items()}


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Peak of the bytes that torch's allocator holds during `work`, minus what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    allocated = peak = 0
    for size in _allocations(record):
        allocated += size
        peak = max(peak, allocated)
    return peak


def _allocations(record: profile) -> list[int]:
    """Bytes of all allocations (positive) and releases (negative), in order of time."""
    events, allocations = list(record.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.name == "[memory]":
            allocations.append((event.start_time_ns, event.extra_fields.alloc_size))
    return [size for _, size in sorted(allocations)]
