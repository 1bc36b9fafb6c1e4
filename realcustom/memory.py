"""Memory tiers: which weights stay on the device, so that a model fits smaller GPUs.

All tiers compute the same result, except that tiled VAE decoding blends the seams between tiles.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch
from torch import nn

from .config import MemoryTier

TILE = 512  # px; SDXL's VAE configures tiles as large as its images
ENCODERS = ("text_encoder", "text_encoder_2", "image_encoder", "image_encoder_2")


def apply_memory_tier(pipeline, device: str | torch.device, tier: MemoryTier = "high") -> None:
    """Move a pipeline to a device and configure offloading. A tier cannot be changed afterwards.

    Args:
        tier: "high" keeps all weights on the device. "medium" keeps text and vision encoders in main memory, moves
            them to the device for a new prompt or reference, and decodes in tiles. "low" also loads the UNet layer by
            layer in every step, which is several times slower.
    Raises:
        ValueError: an unknown tier.
    """
    if tier not in get_args(MemoryTier):
        tiers = ", ".join(map(repr, get_args(MemoryTier)))
        raise ValueError(f"the memory tier is {tier!r}; it must be one of {tiers}.")
    if tier == "high":
        pipeline.to(device)
        return
    pipeline.clear_caches()
    for name in resident_parts(tier):
        if getattr(pipeline, name) is not None:
            getattr(pipeline, name).to(device)
    _offload_encoders(pipeline, torch.device(device))
    _tile(pipeline.vae)
    if tier == "low":
        _offload_layers(pipeline, torch.device(device))


def _tile(vae) -> None:
    vae.enable_tiling()
    if getattr(vae, "tile_sample_min_size", 0) > TILE:
        vae.tile_latent_min_size = vae.tile_latent_min_size * TILE // vae.tile_sample_min_size
        vae.tile_sample_min_size = TILE


def _offload_encoders(pipeline, device: torch.device) -> None:
    from accelerate import cpu_offload_with_hook

    for name in ENCODERS:
        if (encoder := getattr(pipeline, name)) is not None:
            _, pipeline.offload_hooks[name] = cpu_offload_with_hook(encoder, device)


@contextmanager
def encoders_without_hooks(pipeline) -> Iterator[None]:
    """Remove the offloading hooks of the encoders for the duration of the context.

    Otherwise diffusers, when it loads a LoRA, would treat them as those of `enable_model_cpu_offload`.
    """
    from accelerate.hooks import remove_hook_from_module

    hooks = dict(pipeline.offload_hooks)
    for name, hook in hooks.items():
        hook.offload()
        remove_hook_from_module(getattr(pipeline, name))
    try:
        yield
    finally:
        if hooks:
            _offload_encoders(pipeline, next(iter(hooks.values())).hook.execution_device)


def _offload_layers(pipeline, device: torch.device) -> None:
    from diffusers.hooks import apply_group_offloading

    on_gpu = device.type == "cuda"
    apply_group_offloading(
        pipeline.unet, onload_device=device, offload_type="leaf_level", use_stream=on_gpu, record_stream=on_gpu
    )


def resident_parts(tier: MemoryTier) -> tuple[str, ...]:
    """Components whose weights stay on the device."""
    return {
        "high": (*ENCODERS, "adapter", "unet", "vae"),
        "medium": ("adapter", "unet", "vae"),
        "low": ("adapter", "vae"),
    }[tier]


def weight_bytes(pipeline, tier: MemoryTier) -> dict[str, int]:
    """Bytes of weights on the device: `resident` permanently, `peak` including the largest offloaded component.

    Activations, latents and cached references are not included.
    """
    size = {name: _num_bytes(getattr(pipeline, name)) for name in resident_parts("high")}
    resident = sum(size[name] for name in resident_parts(tier))
    offloaded = 0 if tier == "high" else max(size[name] for name in ENCODERS)
    return {"resident": resident, "peak": resident + offloaded}


def _num_bytes(module: nn.Module | None) -> int:
    if module is None:
        return 0
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
