"""Encoding of images into scaled latents and back, by the trained VAE."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..images import to_signed
from ..precision import autocast
from .loop import load_stage
from .networks import build_vae, module_to
from .render import RenderImages

CHUNK_CPU, CHUNK_GPU = 32, 512  # images encoded together


class LatentCodec:
    """The frozen VAE of `out/vae` with its scaling factor.

    `scaling_factor` is 1 / (root mean square of the latents). It is measured once and stored next to the checkpoint.

    Raises:
        FileNotFoundError: stage `vae` has no checkpoint in `out`.
    """

    def __init__(self, out: Path, device: str = "cpu") -> None:
        self.device = device
        vae = load_stage(out / "vae", build_vae())
        self.vae = module_to(vae, device).requires_grad_(False)
        measured = out / "vae" / "scaling_factor.json"
        if not measured.exists():
            self.scaling_factor = 1.0
            latents = self.encode(to_signed(RenderImages(seed=98)(range(256))["pixels"])).float()
            measured.write_text(json.dumps(round(1 / float(latents.pow(2).mean().sqrt()), 4)))
        self.scaling_factor = json.loads(measured.read_text())
        self.vae.register_to_config(scaling_factor=self.scaling_factor)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Images [B, 3, S, S] in [-1, 1] -> scaled latents [B, 4, S / 4, S / 4]."""
        parts = [
            self._autocast(lambda chunk: self.vae.encode(chunk, return_dict=False)[0], chunk)
            for chunk in pixels.to(self.device).split(CHUNK_CPU if self.device == "cpu" else CHUNK_GPU)
        ]
        return torch.cat(parts).float() * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, 4, h, w] -> images [B, 3, 4h, 4w], about in [-1, 1]."""
        return self._autocast(
            lambda z: self.vae.decode(z, return_dict=False)[0], latents.to(self.device) / self.scaling_factor
        ).float()

    def _autocast(self, function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        with autocast(self.device):
            return function(values.contiguous(memory_format=torch.channels_last))
