"""Generation: the state of one image in progress.

Legend: S subjects, h x w positions of the largest attention resolution, T text tokens.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .keys_values import PackedKeysValues
from .mask import resize_by_height, resize_map
from .request import ResolvedRequest
from .text import TextCondition
from .visual_attention import SortedMask, sort_masks


@cache
def step_arguments(scheduler: type) -> frozenset[str]:
    """Names of the arguments of a scheduler's `step`."""
    return frozenset(inspect.signature(scheduler.step).parameters)


@dataclass(eq=False, kw_only=True)
class Generation:
    """The state of one image in progress; it is independent of the other images in its batch.

    Attributes:
        request: what is generated.
        latents: current sample, fp32 [channels, height, width] at latent resolution.
        scheduler: a diffusers scheduler; its state belongs to this image.
        generator: draws the noise; on the CPU, so that a seed gives the same image on every device.
        eta: amount of noise that schedulers with this argument (DDIM, TCD) add, in [0, 1].
        text, negative_text: encoded prompt and negative prompt; `negative_text` is None if guidance_scale is 1.
        references: keys and values of each subject's reference.
        negative_references: keys and values that the unconditional row attends to instead; empty if none.
        target_tokens: marks the tokens of each subject's target phrase, [S, T].
        time_ids: size condition of models that take one, [6].
        guidance_masks: [S, h, w] in [0, 1]; None until the guidance branch has run.
        masks_fixed: the caller supplied the masks; the guidance branch does not run.
        predicted_clean: the scheduler's current estimate of the clean latents, for previews.
        sorted_masks: the guidance masks of each subject at each attention resolution, see `sort_guidance_masks`.
        largest_masks: number of positions of the largest mask so far at each attention resolution.
    """

    request: ResolvedRequest
    latents: Tensor
    scheduler: Any
    generator: torch.Generator | None
    text: TextCondition
    negative_text: TextCondition | None
    eta: float = 0.0
    references: tuple[PackedKeysValues, ...] = ()
    negative_references: tuple[PackedKeysValues, ...] = ()
    target_tokens: Tensor
    time_ids: Tensor
    guidance_masks: Tensor | None = None
    masks_fixed: bool = False
    predicted_clean: Tensor | None = None
    step_index: int = 0
    sorted_masks: dict[tuple[int, int], list[SortedMask]] = field(default_factory=dict, repr=False)
    largest_masks: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)

    @property
    def num_steps(self) -> int:
        """Scheduler steps, each with one call of the generation branch; some samplers need more than
        `num_inference_steps`."""
        return len(self.scheduler.timesteps)

    @property
    def done(self) -> bool:
        """Whether all steps have been taken."""
        return self.step_index >= self.num_steps

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image in pixels; images of one size can advance together."""
        return self.request.height, self.request.width

    @property
    def timestep(self) -> Tensor:
        """Timestep of the next step, a scalar on the CPU, so that reading it does not wait for a GPU."""
        return self.scheduler.timesteps[self.step_index]

    def mask_due(self, call: int) -> bool:
        """Whether scheduler step `call` starts with a new mask; after T_stop, the last one is reused (Sec. 3.3.1).

        Samplers that call the UNet twice per step (Heun, KDPM2) have more calls than requested steps, so T_stop and
        the mask interval apply to the corresponding fraction of the calls.
        """
        if not self.references or self.masks_fixed or call >= self.num_steps:
            return False
        step = call * self.request.num_inference_steps // self.num_steps
        return step < self.request.early_stop_step and step % self.request.mask_interval == 0

    @property
    def needs_guidance_branch(self) -> bool:
        """Whether the mask of this step comes from the guidance branch."""
        exact = self.request.mask_source == "guidance_branch"
        return self.mask_due(self.step_index) and (exact or self.guidance_masks is None)

    @property
    def records_next_mask(self) -> bool:
        """Whether the generation branch of this step records the mask of the next step."""
        return self.request.mask_source == "generation_branch" and self.mask_due(self.step_index + 1)

    def set_masks(self, masks: Tensor) -> None:
        """Replace the guidance masks by `masks` [S, h, w] in [0, 1]."""
        assert len(masks) == len(self.references), (masks.shape, len(self.references))
        self.guidance_masks = masks
        self.sorted_masks.clear()

    def replace_latents(self, latents: Tensor) -> None:
        """Set the latents [channels, height, width], and after the last step also what preset "release" decodes."""
        if self.done and not torch.equal(latents, self.latents):
            self.predicted_clean = latents
        self.latents = latents

    def set_guidance_scale(self, scale: float) -> None:
        """Change the guidance scale of the next steps; at most 1 ends guidance.

        Raises:
            ValueError: not a finite number, or guidance cannot begin because the negative prompt was not encoded.
        """
        if not math.isfinite(scale):
            raise ValueError(f"guidance_scale was set to {scale}; it must be a finite number.")
        if scale > 1 and self.negative_text is None:
            raise ValueError(
                f"guidance_scale was set to {scale} during a call that runs without guidance; start the call with a "
                "guidance_scale above 1."
            )
        if scale <= 1:
            self.negative_text, self.negative_references = None, ()
        self.request = replace(self.request, guidance_scale=scale)

    def model_input(self) -> Tensor:
        """The latents [channels, height, width], scaled as the scheduler requires."""
        return self.scheduler.scale_model_input(self.latents, self.timestep)

    def advance(self, model_output: Tensor) -> None:
        """Take one scheduler step with the model's output [channels, height, width]."""
        known, extra = step_arguments(type(self.scheduler)), {"generator": self.generator, "eta": self.eta}
        extra = {name: value for name, value in extra.items() if name in known}
        out = self.scheduler.step(model_output[None].float(), self.timestep, self.latents[None], **extra)
        self.latents = out.prev_sample[0]
        clean = getattr(out, "pred_original_sample", None)
        self.predicted_clean = self.latents if clean is None else clean[0]
        self.step_index += 1

    def mask_images(self) -> list[Image.Image]:
        """The masks as 8-bit gray images in the size of the image, one per subject; empty before the first mask."""
        if self.guidance_masks is None:
            return []
        masks = resize_map(self.guidance_masks.float().cpu(), self.size)
        return [Image.fromarray(m) for m in (masks.clamp(0, 1).numpy() * 255).round().astype(np.uint8)]


def sort_guidance_masks(
    generations: Sequence[Generation], sizes: Sequence[tuple[int, int]], resize_mode: str, dtype: torch.dtype
) -> None:
    """Resize the guidance masks of generations to attention resolutions and sort their positions.

    It is done once per mask, for all generations and resolutions together, with one read from the device.

    Args:
        sizes: (h, w) of each resolution.
        resize_mode: see `MethodConfig.mask_resize`.
        dtype: of the masks' weights.
    """
    resize = resize_by_height if resize_mode == "height_factor" else resize_map
    missing = [(g, size) for g in generations for size in sizes if size not in g.sorted_masks]
    if not missing:
        return
    dense = []
    for generation, size in missing:
        assert generation.guidance_masks is not None, "the first step of the guidance branch has not run"
        dense.append(resize(generation.guidance_masks, size).flatten(1))
    for (generation, size), masks in zip(missing, sort_masks(dense, dtype), strict=True):
        generation.sorted_masks[size] = masks
        largest = max(mask.count for mask in masks)
        generation.largest_masks[size] = max(largest, generation.largest_masks.get(size, 0))
