"""Pictures <-> the latents diffusion works on: the trained VAE with its scaling factor."""

import json
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import load_average
from .data.render import RenderPictures
from .networks import build_vae
from .pictures import to_signed
from .precision import autocast


class LatentCodec:
    """The frozen VAE of `out/vae`; `scaling_factor` is 1 / (root mean square of its latents), measured once."""

    def __init__(self, out: Path, device: str = "cpu") -> None:
        self.device = device
        self.vae = load_average(out / "vae" / "checkpoint", build_vae()).to(device).requires_grad_(False)
        self.vae.to(memory_format=torch.channels_last)
        measured = out / "vae" / "scaling_factor.json"
        if not measured.exists():
            self.scaling_factor = 1.0
            latents = self.encode(to_signed(RenderPictures(seed=98)(range(256))["pixels"])).float()
            measured.write_text(json.dumps(round(1 / float(latents.pow(2).mean().sqrt()), 4)))
        self.scaling_factor = json.loads(measured.read_text())
        self.vae.register_to_config(scaling_factor=self.scaling_factor)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] in [-1, 1] -> [B, 4, S / 4, S / 4]."""
        parts = [
            self._autocast(lambda chunk: self.vae.encode(chunk).latent, chunk)
            for chunk in pixels.to(self.device).split(32)
        ]
        return torch.cat(parts).float() * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self._autocast(
            lambda z: self.vae.decode(z).sample, latents.to(self.device) / self.scaling_factor
        ).float()

    def _autocast(self, function, values: Tensor) -> Tensor:
        with autocast(self.device):
            return function(values.contiguous(memory_format=torch.channels_last))
