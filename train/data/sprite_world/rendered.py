"""Pixels of the sprite world's batches, on the device that trains on them.

Legend: B samples, s side of the images, S side of the references; in px.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pixels import PixelBatch
from .batches import SpriteBatch
from .renderer import Renderer
from .scenes import SCENE_SIZE


class BatchRenderer:
    """Renders the images, references and masks of batches.

    Args:
        size, reference_size: s and S.
        device: of the results.
    """

    def __init__(self, size: int, reference_size: int, device: torch.device) -> None:
        self.size, self.reference_size, self.device = size, reference_size, device
        self._renderer = Renderer(device)

    @torch.no_grad()
    def __call__(self, batch: SpriteBatch) -> PixelBatch:
        return PixelBatch(
            images=_resized(self._renderer.render(batch.images).float() / 255, self.size),
            references=_resized(self._cropped(batch), self.reference_size),
            captions=batch.captions,
            original_size=(SCENE_SIZE, SCENE_SIZE),
            inside=self._inside(batch),
        )

    def _cropped(self, batch: SpriteBatch) -> Tensor:
        """The crops of the references in [0, 1], enlarged to float32 [B, 3, 128, 128]."""
        pixels = self._renderer.render(batch.references).float() / 255
        left, top, right, bottom = torch.from_numpy(batch.reference_boxes).to(self.device).unbind(1)
        zero = torch.zeros_like(left)
        # In the coordinates of `grid_sample`, the image is [-1, 1] on both axes.
        x = torch.stack([right - left, zero, left + right - 1], 1)
        y = torch.stack([zero, bottom - top, top + bottom - 1], 1)
        grid = F.affine_grid(torch.stack([x, y], 1), list(pixels.shape), align_corners=False)
        return F.grid_sample(pixels, grid, "bicubic", "border", align_corners=False).clamp(0, 1)

    def _inside(self, batch: SpriteBatch) -> Tensor:
        """1 inside the subjects that the reference shows, float32 [B, 128, 128]."""
        left, top, right, bottom = torch.from_numpy(batch.subject_boxes).to(self.device)[..., None, None].unbind(2)
        x = torch.arange(SCENE_SIZE, device=self.device)
        y = x[:, None]
        return ((x >= left) & (x < right) & (y >= top) & (y < bottom)).any(1).float()


def _resized(pixels: Tensor, size: int) -> Tensor:
    """Images in [0, 1] with another side; as for images on disk, with Pillow's bicubic filter."""
    if pixels.shape[-1] == size:
        return pixels
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
