"""Latents -> preview images with a single convolution, for a small fraction of the autoencoder's cost.

A decoded pixel is approximately a linear function of the latents around it. This function is fitted to the loaded
autoencoder, so no per-model constants are needed.

Legend: C latent channels, h x w latent size, f pixels per latent position and axis.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .decoder import LatentDecoder

KERNEL = 3  # latent positions per axis that a preview pixel depends on
DETAIL = 4  # preview pixels per latent position and axis, at most f
NUM_IMAGES, LATENT_SIDE = 4, 32  # synthetic images that the convolution is fitted to


class LatentPreview:
    """Decodes previews for the autoencoder of a `LatentDecoder`.

    Args:
        decoder: gives the latents' scale and encodes the images that the convolution is fitted to.
    """

    def __init__(self, decoder: LatentDecoder) -> None:
        self._decoder = decoder

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Image.Image:
        """A preview of latents [C, h, w], as a PIL image of the full size."""
        weight, bias = (part.to(latents.device) for part in self._convolution)
        padded = F.pad(self._decoder.unscaled(latents.float())[None], (KERNEL // 2,) * 4, mode="replicate")
        pixels = F.pixel_shuffle(F.conv2d(padded, weight, bias), self._detail)
        factor = self._decoder.factor
        size = (latents.shape[-1] * factor, latents.shape[-2] * factor)
        return self._decoder.to_output(pixels, "pil").resize(size, Image.Resampling.BICUBIC)

    @property
    def _detail(self) -> int:
        return min(DETAIL, self._decoder.factor)

    @cached_property
    def _convolution(self) -> tuple[Tensor, Tensor]:
        """Weight [3 * detail², C, kernel, kernel] and bias, fitted by least squares to encoded synthetic images."""
        images = _synthetic_images(NUM_IMAGES, LATENT_SIDE * self._decoder.factor)
        encoded = [self._decoder.encode(image[None]).float().cpu() for image in images]
        latents = F.pad(torch.cat(encoded), (KERNEL // 2,) * 4, mode="replicate")
        inputs = F.unfold(latents, KERNEL).transpose(1, 2).flatten(0, 1).double()  # [positions, C * kernel²]
        inputs = F.pad(inputs, (0, 1), value=1.0)  # a column of ones for the bias
        coarse = F.avg_pool2d(images, self._decoder.factor // self._detail)
        targets = F.pixel_unshuffle(coarse, self._detail).movedim(1, -1).flatten(0, 2).double()
        *weight, bias = torch.linalg.lstsq(inputs, targets, driver="gelsd").solution.float()
        return torch.stack(weight, dim=1).unflatten(1, (-1, KERNEL, KERNEL)), bias


def _synthetic_images(number: int, side: int) -> Tensor:
    """Smooth colors separated by hard edges, from a fixed seed; fp32 [N, 3, side, side] in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)

    def smooth() -> Tensor:
        octaves = [torch.randn(number, 3, 2**k, 2**k, generator=generator) * 2 ** (-k / 2) for k in range(1, 5)]
        return torch.stack([F.interpolate(o, size=(side, side), mode="bilinear") for o in octaves]).sum(0).tanh()

    images = smooth()
    for _ in range(3):
        images = torch.where(smooth()[:, :1] > 0, smooth(), images)
    return images
