"""Latents -> images: through the autoencoder, or at a glance by one convolution.

Legend: C latent channels, h x w latent size, f pixels per latent position and axis.
"""

from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

KERNEL = 3  # latent positions per axis that a glance takes a pixel from
DETAIL = 4  # pixels per latent position and axis that it makes, if f has as many
NUM_IMAGES, LATENT_SIDE = 4, 32  # what it is fitted to


class LatentDecoder:
    """Args:
    vae: `AutoencoderKL` or `AutoencoderDC`.

    Attributes:
        factor: f.
    """

    def __init__(self, vae) -> None:
        self.vae = vae
        self.factor = _spatial_compression(vae)
        self._processor = VaeImageProcessor(vae_scale_factor=self.factor)

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> Image.Image | np.ndarray | Tensor:
        """The image of latents [C, h, w]; as "pil", "np" or "pt"."""
        self._upcast()
        pixels = self.vae.decode(self._unscaled(latents)[None].to(self.vae.dtype), return_dict=False)[0]
        return self._processor.postprocess(pixels.float(), output_type=output_type)[0]

    @torch.no_grad()
    def glance(self, latents: Tensor) -> Image.Image:
        """What the image of latents [C, h, w] is about to be, for a tiny part of `decode`'s time: a preview.

        Nearly all that an autoencoder says about a pixel is linear in the latents around it.
        """
        weight, bias = (part.to(latents.device) for part in self._glance)
        around = F.pad(self._unscaled(latents.float())[None], (KERNEL // 2,) * 4, mode="replicate")
        pixels = F.pixel_shuffle(F.conv2d(around, weight, bias), self._detail)
        size = (latents.shape[-1] * self.factor, latents.shape[-2] * self.factor)
        return self._processor.postprocess(pixels)[0].resize(size, Image.Resampling.BICUBIC)

    @property
    def _detail(self) -> int:
        return min(DETAIL, self.factor)

    @cached_property
    def _glance(self) -> tuple[Tensor, Tensor]:
        """Weight [3 * detail², C, kernel, kernel] and bias of the convolution, by least squares on made-up images
        which the autoencoder encodes; no constants to look up for each autoencoder."""
        self._upcast()
        images = _synthetic_images(NUM_IMAGES, LATENT_SIDE * self.factor)
        first = next(self.vae.parameters())
        encoded = [self._encode(image[None].to(first.device, first.dtype)).float().cpu() for image in images]
        latents = F.pad(torch.cat(encoded), (KERNEL // 2,) * 4, mode="replicate")
        around = F.unfold(latents, KERNEL).transpose(1, 2).flatten(0, 1).double()  # [positions, C * kernel²]
        around = F.pad(around, (0, 1), value=1.0)
        coarse = F.avg_pool2d(images, self.factor // self._detail)
        wanted = F.pixel_unshuffle(coarse, self._detail).movedim(1, -1).flatten(0, 2).double()
        *weight, bias = torch.linalg.lstsq(around, wanted, driver="gelsd").solution.float()
        weight = torch.stack(weight, dim=1).unflatten(1, (-1, KERNEL, KERNEL))
        return weight, bias

    def _encode(self, pixels: Tensor) -> Tensor:
        encoded = self.vae.encode(pixels)
        return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent

    def _unscaled(self, latents: Tensor) -> Tensor:
        """From the diffusion's scale to the autoencoder's own."""
        config = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        latents = latents / config.scaling_factor
        if mean is not None and std is not None:
            mean, std = (latents.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
            latents = latents * std + mean
        return latents

    def _upcast(self) -> None:
        if self.vae.dtype == torch.float16 and getattr(self.vae.config, "force_upcast", False):
            self.vae.to(torch.float32)  # SDXL's own VAE overflows in fp16


def _spatial_compression(vae) -> int:
    """Pixels per latent, by the attribute of the newer autoencoders or from the levels of the classic one."""
    ratio = getattr(vae, "spatial_compression_ratio", None)
    return int(ratio) if ratio else 2 ** (len(vae.config.block_out_channels) - 1)


def _synthetic_images(number: int, side: int) -> Tensor:
    """Smooth colors that meet at hard edges, always the same; fp32 [N, 3, side, side] in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)

    def smooth() -> Tensor:
        octaves = [torch.randn(number, 3, 2**k, 2**k, generator=generator) * 2 ** (-k / 2) for k in range(1, 5)]
        return sum(F.interpolate(octave, size=(side, side), mode="bilinear") for octave in octaves).tanh()

    images = smooth()
    for _ in range(3):
        images = torch.where(smooth()[:, :1] > 0, smooth(), images)
    return images
