"""Stage `vae`: the autoencoder between images and latents.

A penalty keeps the latents near zero mean and unit variance, with uncorrelated channels. `scaling_factor` is then close
to 1.

Legend: B batch, S image size in px, C latent channels, h, w latent size.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from torch import Tensor

from ..images import save_grid, to_signed
from ..precision import autocast
from .loop import LoopConfig, run_loop
from .networks import build_vae, module_to
from .pool import SamplePool
from .render import RenderImages

BATCH_SIZE = 32
NUM_HELD_OUT = 32
CROP = 64  # px
LATENT_NOISE = 0.05  # makes the decoder robust to the errors of generated latents


def vae_loss(vae: AutoencoderDC, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Reconstruction loss on colors and edges, plus the penalty on the distribution of the latents.

    Args:
        pixels: [B, 3, S, S] in [-1, 1].
    """
    latents = vae.encode(pixels, return_dict=False)[0].float()
    noise = torch.randn(latents.shape, generator=generator).to(latents.device) * LATENT_NOISE
    error = vae.decode(latents + noise, return_dict=False)[0].float() - pixels
    squared = error.pow(2).mean()
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    channels = latents.transpose(0, 1).flatten(1)  # [C, B * h * w]
    mean = channels.mean(1)
    centered = channels - mean[:, None]
    covariance = centered @ centered.T / channels.shape[1]
    white = (covariance - torch.eye(len(covariance), device=covariance.device)).pow(2).sum() + mean.pow(2).sum()
    loss = error.abs().mean() + squared + 0.5 * edges + 0.01 * white
    return loss, {"psnr": psnr(squared), "white": float(white.detach())}


def psnr(squared_error: Tensor) -> float:
    """Peak signal-to-noise ratio in dB for images in [-1, 1], from their mean squared error."""
    return float(10 * torch.log10(4 / squared_error.detach()))


def train_vae(out: Path, device: str = "cpu", **options) -> None:
    """Train the autoencoder; checkpoints and logs go to `out`. `options` are fields of `LoopConfig`."""
    config = LoopConfig(
        out=out, batch_size=BATCH_SIZE, learning_rate=2e-3, ema_decay=0.995, warmup_steps=100, **options
    )
    vae = module_to(build_vae(), device)
    fields = {"pixels": ((3, 128, 128), "uint8")}
    pool = SamplePool(out / "pool", fields, RenderImages(), start=4000, capacity=6000, per_step=2)

    def batch(step: int, generator: torch.Generator) -> Tensor:
        pool.refresh(step)
        draws = torch.rand(config.batch_size, generator=generator).numpy()
        pixels = pool.batch(step, draws)["pixels"]
        if step % 4 == 3:  # half-size images, as in stage `base`
            pixels = F.avg_pool2d(to_signed(pixels), 2)
        else:  # crops, which allow more and cheaper steps
            top, left = torch.randint(0, 17, (2,), generator=generator).tolist()
            pixels = to_signed(pixels[..., 4 * top : 4 * top + CROP, 4 * left : 4 * left + CROP])
        return pixels.to(device).to(memory_format=torch.channels_last)

    def loss_of_step(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        pixels = batch(step, generator)
        with autocast(device):
            return vae_loss(vae, pixels, generator)

    held_out = to_signed(RenderImages(seed=99)(range(NUM_HELD_OUT))["pixels"]).to(device)

    def preview(step: int) -> dict[str, Any]:
        latents = vae.encode(held_out, return_dict=False)[0]
        decoded = vae.decode(latents, return_dict=False)[0]
        save_grid(torch.stack([held_out, decoded], 1).flatten(0, 1)[:32], out / "preview.png", columns=8)
        return {
            "held_out_psnr": psnr((decoded - held_out).pow(2).mean()),
            "mean": np.round(latents.mean((0, 2, 3)).tolist(), 3).tolist(),
            "std": np.round(latents.std((0, 2, 3)).tolist(), 3).tolist(),
        }

    run_loop(config, vae, loss_of_step, preview)
