"""The diffusion loss, and a plain text-to-image sampler for previews.

Legend: B batch, C latent channels, h, w latent size, T text tokens.
"""

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .networks import LATENT_FACTOR
from .precision import autocast

OUTSIDE_WEIGHT = 0.3


def sample_timesteps(batch_size: int, generator: torch.Generator, exponent: float = 1.0) -> Tensor:
    """Training timesteps, int64 [B] in [0, 999].

    The batch is stratified (one draw from each of B equal intervals), which lowers the variance of the loss.

    Args:
        exponent: applied to the uniform draws; below 1, noisy timesteps are more frequent.
    """
    uniform = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
    return (uniform.pow(exponent) * 1000).long().clamp_max(999)


def v_target(scheduler: DDIMScheduler, clean: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and the velocity to predict, both [B, C, h, w]."""
    alphas = scheduler.alphas_cumprod.to(clean.device)[timesteps][:, None, None, None]
    signal, sigma = alphas.sqrt(), (1 - alphas).sqrt()
    return signal * clean + sigma * noise, signal * noise - sigma * clean


def min_snr_weight(scheduler: DDIMScheduler, timesteps: Tensor, gamma: float = 5.0) -> Tensor:
    """Weight of the velocity loss per sample, [B]: (min(SNR, γ) + 1) / (SNR + 1).

    The velocity loss equals the sum of the losses on the noise and on the clean image; this is the min-SNR weight of
    that sum. The plain min-SNR weight is zero for pure noise (SNR 0), where sampling starts.
    """
    alphas = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].double()
    snr = alphas / (1 - alphas).clamp_min(1e-8)
    return ((snr.clamp_max(gamma) + 1) / (snr + 1)).float()


def size_condition(batch_size: int, latents: Tensor) -> Tensor:
    """SDXL's time ids (original size, crop, target size), height first, [B, 6]."""
    height, width = (side * LATENT_FACTOR for side in latents.shape[-2:])
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=latents.device)
    return time_ids.expand(batch_size, 6)


def subject_weight(inside: Tensor) -> Tensor:
    """Weight of each position in the loss, [B, 1, h, w], from a map of subjects (1) and background (0), [B, h, w].

    Scenes cover most of an image, but subjects need more training. The weights do not change the optimum.
    """
    return (OUTSIDE_WEIGHT + (1 - OUTSIDE_WEIGHT) * inside.float())[:, None]


def diffusion_loss(
    unet: Callable,
    scheduler: DDIMScheduler,
    clean: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    embeds: Tensor,
    pooled: Tensor,
    position_weight: Tensor | float = 1.0,
) -> Tensor:
    """Weighted velocity loss per sample, float32 [B].

    Args:
        clean, noise: [B, C, h, w].
        timesteps: int64 [B].
        embeds, pooled: text condition, [B, T, 128] and [B, 64].
        position_weight: weight of each position, [B, 1, h, w]; multiplied by the weight of the timestep.
    """
    noisy, target = v_target(scheduler, clean, noise, timesteps)
    predicted = unet(
        noisy.contiguous(memory_format=torch.channels_last),
        timesteps,
        encoder_hidden_states=embeds,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": size_condition(len(noisy), noisy)},
    ).sample.float()
    squared = position_weight * (predicted - target).pow(2)
    return squared.mean((1, 2, 3)) * min_snr_weight(scheduler, timesteps)


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
