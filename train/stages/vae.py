"""Stage `vae`: pictures -> latents and back.

The latents are pushed towards mean 0, deviation 1 and uncorrelated channels, so that `scaling_factor` is nearly 1 and
the diffusion model sees what it expects.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.pool import SamplePool
from ..data.render import RenderPictures
from ..loop import LoopConfig, run_loop
from ..networks import build_vae
from ..pictures import save_grid, to_signed
from ..precision import autocast

BATCH_SIZE = 32
CROP = 64  # px
LATENT_NOISE = 0.05  # the decoder must bear what diffusion leaves behind


def vae_loss(vae, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Reconstruction in colours and edges, and a penalty that keeps latents white; pixels [B, 3, S, S] in [-1, 1]."""
    latents = vae.encode(pixels).latent.float()
    noise = torch.randn(latents.shape, generator=generator).to(latents.device) * LATENT_NOISE
    out = vae.decode(latents + noise).sample.float()
    error = out - pixels
    squared = error.pow(2).mean()
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    flat = latents.transpose(0, 1).flatten(1)  # [C, B * h * w]
    mean = flat.mean(1)
    centred = flat - mean[:, None]
    covariance = centred @ centred.T / flat.shape[1]
    white = (covariance - torch.eye(len(covariance), device=flat.device)).pow(2).sum() + mean.pow(2).sum()
    loss = error.abs().mean() + squared + 0.5 * edges + 0.01 * white
    psnr = float(10 * torch.log10(4 / squared.detach()))
    return loss, {"psnr": psnr, "white": float(white.detach())}


def train_vae(out: Path, device: str = "cpu", **options) -> None:
    config = LoopConfig(
        out=out, batch_size=BATCH_SIZE, learning_rate=2e-3, average_decay=0.995, warmup_steps=100, **options
    )
    vae = build_vae().to(device, memory_format=torch.channels_last)
    pool = SamplePool(
        out / "pool", {"pixels": ((3, 128, 128), "uint8")}, RenderPictures(), start=4000, capacity=6000, per_step=2
    )

    def batch(step: int, generator: torch.Generator) -> Tensor:
        pool.refresh(step)
        draws = torch.rand(config.batch_size, generator=generator).numpy()
        pixels = pool.batch(step, draws)["pixels"]
        if step % 4 == 3:  # half-size pictures: the diffusion model starts out on them
            pixels = F.avg_pool2d(to_signed(pixels), 2)
        else:  # crops: for a convolutional network more, smaller steps
            top, left = torch.randint(0, 17, (2,), generator=generator).tolist()
            pixels = to_signed(pixels[..., 4 * top : 4 * top + CROP, 4 * left : 4 * left + CROP])
        pixels = pixels.to(device)
        return pixels.to(memory_format=torch.channels_last)

    def loss_of_step(step: int, generator: torch.Generator):
        pixels = batch(step, generator)
        with autocast(device):
            return vae_loss(vae, pixels, generator)

    held_out = to_signed(RenderPictures(seed=99)(range(32))["pixels"]).to(device)

    def preview(step: int) -> dict[str, float]:
        latents = vae.encode(held_out).latent
        back = vae.decode(latents).sample
        save_grid(torch.stack([held_out, back], 1).flatten(0, 1)[:32], out / "pictures.png", columns=8)
        psnr = float(10 * torch.log10(4 / (back - held_out).pow(2).mean()))
        return {
            "held_out_psnr": psnr,
            "mean": np.round(latents.mean((0, 2, 3)).tolist(), 3).tolist(),
            "std": np.round(latents.std((0, 2, 3)).tolist(), 3).tolist(),
        }

    run_loop(config, vae, loss_of_step, preview)
