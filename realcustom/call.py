"""Arguments of the diffusers-style call: those of other pipelines, numbers of images, generators and callbacks."""

import threading
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from .generation import Generation, step_arguments

# Arguments of diffusers' SDXL pipeline that are not supported -> what to use instead.
_ALTERNATIVES = {
    "prompt_2": "one prompt for both text encoders",
    "negative_prompt_2": "negative_prompt",
    "prompt_embeds": "prompt: target phrases are located in its text",
    "negative_prompt_embeds": "negative_prompt",
    "pooled_prompt_embeds": "prompt",
    "negative_pooled_prompt_embeds": "negative_prompt",
    "ip_adapter_image": "subjects",
    "ip_adapter_image_embeds": "subjects",
    "cross_attention_kwargs": "set_adapters(name, scale) for the scale of a LoRA",
    "clip_skip": "the default layer of the text encoders",
    "guidance_rescale": "a lower guidance_scale",
    "denoising_end": "callback_on_step_end with pipe._interrupt = True",
    "original_size": "height and width",
    "target_size": "height and width",
    "crops_coords_top_left": "height and width; images are conditioned as uncropped",
    "callback": "callback_on_step_end",
    "callback_steps": "callback_on_step_end",
}


class CallState(threading.local):
    """What callbacks read and change on the pipeline, as in diffusers. Each thread has its own.

    Attributes:
        guidance_scale: of the current call; a callback may change it.
        num_timesteps: steps of the current call.
    """

    guidance_scale: float = 1.0
    num_timesteps: int = 0


def check_unsupported(arguments: dict[str, Any]) -> None:
    """Raise ValueError for unsupported arguments of diffusers, unless they are None, and TypeError for unknown ones."""
    for name, value in arguments.items():
        if value is None and name in _ALTERNATIVES:
            continue
        if name not in _ALTERNATIVES:
            raise TypeError(
                f"RealCustomPipeline got an unknown argument {name!r}; see help(RealCustomPipeline.__call__)."
            )
        raise ValueError(f"{name} is not supported; use {_ALTERNATIVES[name]}.")


def check_callback(callback: Callable | None, tensor_inputs: Sequence[str]) -> None:
    """Raise ValueError for a callback that needs other tensors than the latents."""
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        tensor_inputs = callback.tensor_inputs
    if unknown := set(tensor_inputs) - {"latents"}:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; only 'latents' is available. To change the "
            "guidance during the call, use a function that sets pipe._guidance_scale (0 ends it)."
        )


def check_number_of_images(number: object) -> None:
    """Raise ValueError unless it is a whole number of at least 1."""
    if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
        raise ValueError(f"num_images_per_prompt is {number!r}; it must be a whole number of at least 1.")


def check_eta(eta: object, scheduler) -> None:
    """Raise ValueError unless eta is in [0, 1], and 0 if the scheduler has no such argument."""
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta!r}; it must be in [0, 1].")
    if eta and "eta" not in step_arguments(type(scheduler)):
        raise ValueError(
            f"eta is {eta}, but {type(scheduler).__name__} has no such argument; use DDIMScheduler or TCDScheduler, or "
            "a scheduler that always adds noise, such as EulerAncestralDiscreteScheduler."
        )


def per_image(generator: torch.Generator | Sequence[torch.Generator] | None, number: int) -> list:
    """The generator of each image."""
    if generator is None or isinstance(generator, torch.Generator):
        return [generator] * number
    if len(generator) != number:
        raise ValueError(f"generator has {len(generator)} entries for {number} images; give one per image.")
    return list(generator)


def call_back(
    callback: Callable[..., dict | None], pipeline, state: CallState, generations: Sequence[Generation]
) -> None:
    """Call `callback_on_step_end` after a step and apply the latents and the guidance scale that it sets.

    Raises:
        ValueError: latents of another shape, or a guidance scale that cannot be applied.
    """
    first = generations[0]
    index, scale = first.step_index - 1, first.request.guidance_scale
    latents = torch.stack([g.latents for g in generations])
    outer = state.guidance_scale, state.num_timesteps  # of a call whose callback made this one
    state.guidance_scale, state.num_timesteps = scale, first.num_steps
    try:
        returned = callback(pipeline, index, first.scheduler.timesteps[index], {"latents": latents}) or {}
        new_scale = state.guidance_scale
    finally:
        state.guidance_scale, state.num_timesteps = outer
    replaced: Tensor = returned.get("latents", latents)
    if replaced.shape != latents.shape:
        raise ValueError(
            f"callback_on_step_end returned latents of shape {list(replaced.shape)}; they must have the shape "
            f"{list(latents.shape)}."
        )
    for generation, new in zip(generations, replaced.to(latents), strict=True):
        generation.replace_latents(new)
        if new_scale != scale:
            generation.set_guidance_scale(new_scale)
