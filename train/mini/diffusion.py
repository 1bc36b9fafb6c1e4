"""The diffusion loss of stage `base`, and a plain text-to-image sampler for its previews.

Legend: B batch, C latent channels, h, w latent size, T text tokens.
"""

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..objective import min_snr_weight, noisy_and_target
from ..precision import autocast
from .networks import LATENT_FACTOR

OUTSIDE_WEIGHT = 0.3  # see `position_weight`
MIN_SNR_GAMMA = 5.0


def sample_timesteps(batch_size: int, generator: torch.Generator) -> Tensor:
    """Training timesteps, int64 [B] in [0, 999].

    The batch is stratified (one draw from each of B equal intervals), which lowers the variance of the loss.
    """
    uniform = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
    return (uniform * 1000).long().clamp_max(999)


def size_condition(batch_size: int, latents: Tensor) -> Tensor:
    """SDXL's time ids (original size, crop, target size), height first, [B, 6]."""
    height, width = (side * LATENT_FACTOR for side in latents.shape[-2:])
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=latents.device)
    return time_ids.expand(batch_size, 6)


def diffusion_loss(
    unet: Callable,
    scheduler: DDIMScheduler,
    clean: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    embeds: Tensor,
    pooled: Tensor,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """Weighted velocity loss per sample, float32 [B].

    Args:
        clean, noise: [B, C, h, w].
        timesteps: int64 [B].
        embeds, pooled: text condition, [B, T, 128] and [B, 64].
        weight: weight of each position, [B, 1, h, w]; multiplied by the weight of the timestep.
    """
    noisy, target = noisy_and_target(scheduler, clean, noise, timesteps)
    predicted = unet(
        noisy.contiguous(memory_format=torch.channels_last),
        timesteps,
        encoder_hidden_states=embeds,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": size_condition(len(noisy), noisy)},
    ).sample.float()
    squared = weight * (predicted - target).pow(2)
    return squared.mean((1, 2, 3)) * min_snr_weight(scheduler, timesteps, MIN_SNR_GAMMA)


@torch.no_grad()
def sample_latents(
    unet: Callable,
    scheduler: DDIMScheduler,
    embeds: Tensor,
    pooled: Tensor,
    negative_embeds: Tensor,
    negative_pooled: Tensor,
    noise: Tensor,
    num_steps: int = 20,
    guidance_scale: float = 4.0,
) -> Tensor:
    """Sample latents [B, C, h, w] with DDIM and classifier-free guidance.

    The first B rows of each UNet call have the text condition; the other B rows are unconditional.
    """
    scheduler.set_timesteps(num_steps)
    latents, count = noise, len(noise)
    text = torch.cat([embeds, negative_embeds.expand(count, -1, -1)])
    pooled = torch.cat([pooled, negative_pooled.expand(count, -1)])
    condition = {"text_embeds": pooled, "time_ids": size_condition(2 * count, noise)}
    for timestep in scheduler.timesteps:
        with autocast(noise.device.type):
            predicted = unet(
                torch.cat([latents] * 2), timestep, encoder_hidden_states=text, added_cond_kwargs=condition
            ).sample.float()
        noise_text, noise_uncond = predicted.chunk(2)
        guided = noise_uncond + guidance_scale * (noise_text - noise_uncond)
        latents = scheduler.step(guided, int(timestep), latents, return_dict=False)[0]
    return latents
