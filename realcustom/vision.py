"""Reference -> VisionFeatures: block outputs of the frozen SigLIP and DINOv2 (with registers) encoders.

Legend: B images, N = grid * grid tokens of a view, L shallow layers, C channels of both encoders together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from .config import MethodConfig, VisionConfig

SIGLIP_MEAN_STD = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
DINO_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet


@dataclass(frozen=True, kw_only=True)
class VisionFeatures:
    """Raw block outputs, without final norm and without class or register tokens (Sec. 3.2.1).

    Attributes:
        shallow: tokens of all shallow layers in one sequence, [B, L * N, C].
        deep: tokens of the deep layer, [B, N, C].
        local: deep tokens of the four local views, [B, 4 * N, C].
    """

    shallow: Tensor
    deep: Tensor
    local: Tensor


def to_pixels(images: Sequence[ArrayLike], size: int, method: MethodConfig) -> Tensor:
    """Resize RGB images to [B, 3, size, size] in [0, 1]; the aspect ratio is not kept (Sec. 3.2.1).

    Args:
        images: PIL images, `ReferenceImage`s or uint8 arrays [H, W, 3].
    """
    pixels = []
    for image in images:
        values = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None] / 255
        if method.reference_resize == "bilinear_uint8":
            values = F.interpolate(values, (size, size), mode="bilinear", align_corners=False)
        else:
            values = resize_antialiased(values, size)
        pixels.append(values)
    return torch.cat(pixels)


def resize_antialiased(pixels: Tensor, size: int) -> Tensor:
    """Resize images in [0, 1] to [B, 3, size, size]."""
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


def reference_views(pixels: Tensor, method: MethodConfig) -> tuple[Tensor, Tensor]:
    """Split references at twice the input size into the global view and the four local views (Eq. 7).

    Args:
        pixels: [B, 3, 2s, 2s] in [0, 1], where s is the encoders' input size.
    Returns:
        Global view [B, 3, s, s] and local views [B, 4, 3, s, s] in [0, 1].
    """
    size = pixels.shape[-1] // 2
    if method.local_views == "quadrants":
        local = pixels.unflatten(-2, (2, size)).unflatten(-1, (2, size))  # [B, 3, row, y, column, x]
        local = local.permute(0, 2, 4, 1, 3, 5)
    else:
        local = pixels.unflatten(-2, (size, 2)).unflatten(-1, (size, 2))  # [B, 3, y, row, x, column]
        local = local.permute(0, 3, 5, 1, 2, 4)
    local = local.flatten(1, 2)
    if method.reference_resize == "bilinear_uint8":
        view = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=True)  # as in the release
        return _through_uint8(view), _through_uint8(local)
    return resize_antialiased(pixels, size), local


def _through_uint8(pixels: Tensor) -> Tensor:
    """Convert to 8 bits by truncation, as the authors' release does."""
    return (pixels * 255).to(torch.uint8).to(pixels.dtype) / 255


class VisionEncoders:
    """The two frozen vision encoders; their features are concatenated along the channels.

    Args:
        siglip: `SiglipVisionModel`.
        dino: `Dinov2WithRegistersModel`, or `Dinov2Model`; same input size and number of patches as `siglip`.
        vision: the layers to use.
        method: how views are cropped and resized.
        release: called after each encoding; offloads the encoders in the lower memory tiers.
    """

    def __init__(
        self,
        siglip,
        dino,
        vision: VisionConfig,
        method: MethodConfig,
        *,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self.siglip = siglip
        self.dino = dino
        self.vision = vision
        self.method = method
        self._release = release

    @property
    def input_size(self) -> int:
        """Side of the encoders' input in pixels."""
        return self.siglip.config.image_size

    @property
    def num_channels(self) -> int:
        """C, channels of both encoders together."""
        return self.siglip.config.hidden_size + self.dino.config.hidden_size

    def encode(self, images: Sequence[ArrayLike]) -> VisionFeatures:
        """Encode RGB images of any size; see `to_pixels` for their types."""
        return self.encode_pixels(to_pixels(images, 2 * self.input_size, self.method))

    def encode_pixels(self, pixels: Tensor) -> VisionFeatures:
        """Encode references at twice the encoders' input size, [B, 3, 2s, 2s] in [0, 1]."""
        view, local = reference_views(pixels, self.method)
        vision = self.vision
        layers = tuple(zip((*vision.siglip_shallow, vision.siglip_deep), (*vision.dino_shallow, vision.dino_deep)))
        *shallow, deep = self.tokens(view, layers)
        (local_deep,) = self.tokens(local.flatten(0, 1), layers[-1:])
        self._release()
        # [B, 4 * N, C] in the release's order: the four views of a position are adjacent.
        local_deep = local_deep.unflatten(0, (-1, 4)).transpose(1, 2).flatten(1, 2)
        return VisionFeatures(shallow=torch.cat(shallow, dim=1), deep=deep, local=local_deep)

    def tokens(self, pixels: Tensor, layers: Sequence[tuple[int, int]]) -> list[Tensor]:
        """The concatenated tokens [B, N, C] of each (SigLIP block, DINO block) pair."""
        num_prefix = 1 + getattr(self.dino.config, "num_register_tokens", 0)
        siglip = _hidden_states(self.siglip, pixels, SIGLIP_MEAN_STD)
        dino = _hidden_states(self.dino, pixels, DINO_MEAN_STD)
        return [torch.cat([siglip[i + 1], dino[j + 1][:, num_prefix:]], dim=-1) for i, j in layers]


def _hidden_states(encoder, pixels: Tensor, mean_std) -> tuple[Tensor, ...]:
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in mean_std)
    pixels = ((pixels - mean) / std).to(encoder.device, encoder.dtype)
    return encoder(pixel_values=pixels, output_hidden_states=True).hidden_states
