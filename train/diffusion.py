"""The diffusion loss and a plain sampler for previews.

Legend: B batch, C latent channels, h, w latent size.
"""

import torch
from torch import Tensor

from .networks import LATENT_FACTOR
from .precision import autocast

OUTSIDE_WEIGHT = 0.3


def v_target(scheduler, clean: Tensor, noise: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and the velocity to predict, both [B, C, h, w]."""
    alphas = scheduler.alphas_cumprod.to(clean.device)[steps][:, None, None, None]
    signal, sigma = alphas.sqrt(), (1 - alphas).sqrt()
    return signal * clean + sigma * noise, signal * noise - sigma * clean


def min_snr_weight(scheduler, steps: Tensor, gamma: float = 5.0) -> Tensor:
    """Weight of a velocity loss per sample, [B].

    min(SNR, γ) + 1 over SNR + 1: min-SNR for the sum of the losses on noise and on the picture, which is what velocity
    is. Plain min-SNR would give the pure-noise step, SNR 0, no weight at all, but sampling starts there.
    """
    alphas = scheduler.alphas_cumprod.to(steps.device)[steps].double()
    snr = alphas / (1 - alphas).clamp_min(1e-8)
    return ((snr.clamp_max(gamma) + 1) / (snr + 1)).float()


def size_condition(batch: int, latents: Tensor) -> Tensor:
    """SDXL's time ids (original size, crop, target size), height first, [B, 6]."""
    height, width = (side * LATENT_FACTOR for side in latents.shape[-2:])
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=latents.device).expand(
        batch, 6
    )


def subject_weight(inside: Tensor) -> Tensor:
    """Weight of each place in the loss, [B, 1, h, w], from a map of where subjects are (1) and are not (0), [B, h, w].

    Shapes are what takes long to learn, and scenes cover more of a picture. The optimum is the same for any weights.
    """
    return (OUTSIDE_WEIGHT + (1 - OUTSIDE_WEIGHT) * inside.float())[:, None]


def diffusion_loss(unet, scheduler, clean, noise, steps, embeds, pooled, place_weight: Tensor | float = 1.0) -> Tensor:
    """Weighted velocity loss per sample, fp32 [B].

    Args:
        place_weight: weight of each place, [B, 1, h, w], on top of that of each step.
    """
    noisy, target = v_target(scheduler, clean, noise, steps)
    predicted = unet(
        noisy.contiguous(memory_format=torch.channels_last),
        steps,
        encoder_hidden_states=embeds,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": size_condition(len(noisy), noisy)},
    ).sample.float()
    return (place_weight * (predicted - target).pow(2)).mean((1, 2, 3)) * min_snr_weight(scheduler, steps)


@torch.no_grad()
def sample_latents(
    unet,
    scheduler,
    embeds,
    pooled,
    negative,
    negative_pooled,
    noise,
    num_steps=20,
    guidance=4.0,
) -> Tensor:
    """DDIM with classifier-free guidance; the rows with the text come first, the unconditional ones after them."""
    scheduler.set_timesteps(num_steps)
    latents, count = noise, len(noise)
    text = torch.cat([embeds, negative.expand(count, -1, -1)])
    pooled = torch.cat([pooled, negative_pooled.expand(count, -1)])
    condition = {"text_embeds": pooled, "time_ids": size_condition(2 * count, noise)}
    for t in scheduler.timesteps:
        with autocast(noise.device.type):
            predicted = unet(
                torch.cat([latents] * 2),
                t,
                encoder_hidden_states=text,
                added_cond_kwargs=condition,
            ).sample.float()
        with_text, without = predicted.chunk(2)
        latents = scheduler.step(without + guidance * (with_text - without), t, latents).prev_sample
    return latents
