"""Both sides of every comparison on the same tensors, and how their time and memory are taken."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from realcustom import Generation, RealCustomPipeline, Request, Subject
from realcustom.request import seed_variations

PROMPT, PHRASES = "a dog on the beach", ("dog", "beach")


class Workbench:
    """A pipeline, and diffusers' own text-to-image with diffusers' own attention on the same weights.

    Args:
        pipeline: its UNet is not touched; both sides get one of their own around the same tensors.
        compiled: `torch.compile` both sides: the transformer "blocks", the "whole" UNet as each side's users do, the
            "unguarded" whole UNet, diffusers' side too without the guards that ours does without, or None.
    """

    def __init__(
        self,
        pipeline: RealCustomPipeline,
        request: Request,
        compiled: Literal["blocks", "whole", "unguarded"] | None = None,
    ) -> None:
        self.request = request.resolve(pipeline.sampling)
        self.device = pipeline.unet.device
        self.pipeline = RealCustomPipeline(
            **{**pipeline.components, "unet": same_tensors(pipeline.unet)},
            realcustom_config=pipeline.realcustom_config,
            force_zeros_for_empty_prompt=pipeline.config.force_zeros_for_empty_prompt,
        )
        self.plain = stock_pipeline(pipeline)
        if compiled == "blocks":
            self.pipeline.compile()
            self.plain.unet.compile_repeated_blocks(fullgraph=True)
        elif compiled:
            self.pipeline.compile(whole=True)
            no_guards = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
            self.plain.unet.compile(fullgraph=True, options=no_guards if compiled == "unguarded" else None)
        for side in (self.pipeline, self.plain):
            side.set_progress_bar_config(disable=True)

    def generations(self, number: int = 1, **changes) -> list[Generation]:
        request = replace(self.request, **changes)
        return [self.pipeline.prepare(r) for r in seed_variations(request, number)]

    def ours(self, number: int = 1, **changes) -> list[Generation]:
        """Every step of `number` images; text and references are known from the first call on."""
        generations = self.generations(number, **changes)
        while not generations[0].done:
            self.pipeline.step(generations)
        return generations

    def text_to_image(self, number: int = 1, **changes) -> None:
        """As many steps of as many images by diffusers' own pipeline, without subjects."""
        (generation,) = self.generations(subjects=(), **changes)
        text, negative = generation.text, generation.negative_text
        side = generation.latents.shape[-1] * 8  # the stock class believes in 8 px per latent
        options = dict(
            prompt_embeds=text.embeds[None].repeat(number, 1, 1),
            latents=generation.latents[None].repeat(number, 1, 1, 1).to(self.plain.unet.dtype),
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
            num_inference_steps=generation.request.num_inference_steps,
            guidance_scale=generation.request.guidance_scale,
            output_type="latent",
        )


def request(size: int, steps: int, stop: int, subjects: int) -> Request:
    gray = Image.new("RGB", (64, 64), "gray")
    return Request(
        prompt=PROMPT,
        subjects=tuple(Subject(image=gray, target_phrase=phrase) for phrase in PHRASES[:subjects]),
        height=size,
        width=size,
        num_inference_steps=steps,
        early_stop_step=stop,
        seed=0,
    )


def same_tensors(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Another UNet, with diffusers' own attention, around the very tensors of this one."""
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def stock_pipeline(pipeline: RealCustomPipeline) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """diffusers' own pipeline around the same tensors; text comes to it encoded, latents leave it undecoded."""
    parts = dict(vae=None, text_encoder=None, tokenizer=None, unet=same_tensors(pipeline.unet))
    parts["scheduler"] = copy.deepcopy(pipeline.scheduler)
    if pipeline.text_encoder_2 is None:
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    return StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def side_by_side(ways: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each way, timed in turns (A B A B ...); of more than two turns the first is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            times[name].append(seconds(work, device))
    return {name: statistics.median(values[1:] if rounds > 2 else values) for name, values in times.items()}


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes that torch's allocator held at once during `work`, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    held = peak = 0
    for size in _allocations(record):
        held += size
        peak = max(peak, held)
    return peak


def _allocations(record: profile) -> list[int]:
    """Bytes of every allocation (positive) and release (negative), in order."""
    events, found = list(record.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.name == "[memory]":
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    return [size for _, size in sorted(found)]
