"""Latents -> images through the autoencoder.

Legend: C latent channels, h x w latent size, f pixels per latent position and axis.
"""

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor


class LatentDecoder:
    """Decodes latents with an autoencoder, and encodes images with it.

    Args:
        vae: `AutoencoderKL` or `AutoencoderDC`.

    Attributes:
        factor: f, pixels per latent position and axis.
    """

    def __init__(self, vae) -> None:
        self.vae = vae
        self.factor = _spatial_compression(vae)
        self._processor = VaeImageProcessor(vae_scale_factor=self.factor)

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Decode latents [C, h, w] to an image: a PIL image, "np" [H, W, 3] or "pt" [3, H, W] in [0, 1]."""
        self._upcast()
        pixels = self.vae.decode(self.unscaled(latents)[None].to(self.vae.dtype), return_dict=False)[0]
        return self.to_output(pixels.float(), output_type)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [-1, 1] to the autoencoder's own latents [B, C, h, w], without noise."""
        self._upcast()
        first = next(self.vae.parameters())
        encoded = self.vae.encode(pixels.to(first.device, first.dtype))
        return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent

    def unscaled(self, latents: Tensor) -> Tensor:
        """Convert latents from the diffusion model's scale to the autoencoder's own."""
        mean, std = self._mean_std(latents)
        return latents / self.vae.config.scaling_factor * std + mean

    def scaled(self, latents: Tensor) -> Tensor:
        """Convert latents from the autoencoder's own scale to the diffusion model's; the inverse of `unscaled`."""
        mean, std = self._mean_std(latents)
        return (latents - mean) / std * self.vae.config.scaling_factor

    def _mean_std(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel, [C, 1, 1], of autoencoders that declare them; otherwise 0 and 1."""
        mean = getattr(self.vae.config, "latents_mean", None)
        std = getattr(self.vae.config, "latents_std", None)
        if mean is None or std is None:
            mean, std = (0.0,), (1.0,)
        return latents.new_tensor(mean).view(-1, 1, 1), latents.new_tensor(std).view(-1, 1, 1)

    def to_output(self, pixels: Tensor, output_type: str) -> Any:
        """Convert pixels [1, 3, H, W] in [-1, 1] to one image of `output_type`, see `decode`."""
        images: Any = self._processor.postprocess(pixels, output_type=output_type)
        return images[0]

    def _upcast(self) -> None:
        if self.vae.dtype == torch.float16 and getattr(self.vae.config, "force_upcast", False):
            self.vae.to(torch.float32)  # SDXL's own VAE overflows in fp16


def _spatial_compression(vae) -> int:
    """Pixels per latent position: an attribute of newer autoencoders, otherwise derived from the number of levels."""
    ratio = getattr(vae, "spatial_compression_ratio", None)
    return int(ratio) if ratio else 2 ** (len(vae.config.block_out_channels) - 1)
