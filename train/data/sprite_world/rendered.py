"""Pixels of the sprite world's batches, on the device that trains on them.

Legend: B samples, S subjects of an image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from realcustom.vision import resize_antialiased

from ..pixels import PixelBatch
from .batches import SpriteBatch
from .renderer import Renderer
from .scenes import SCENE_SIZE


class BatchRenderer:
    """Renders the images, references and masks of batches.

    Args:
        size, reference_size: sides of the images and of the references in px.
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
        return box_maps(torch.from_numpy(batch.subject_boxes).to(self.device)).any(1).float()


def box_maps(boxes: Tensor, cell: int = 1, stride: int = 1) -> Tensor:
    """Which cells of the image each box covers at least in part, bool [B, S, n, n] with n = 128 / (cell * stride).

    Args:
        boxes: left, top, right, bottom in px, [B, S, 4]; zeros for no subject.
        cell: side of a cell in px.
        stride: every `stride`-th cell on both axes is returned.
    """
    left, top, right, bottom = boxes[..., None, None].unbind(2)
    x = torch.arange(0, SCENE_SIZE, cell * stride, device=boxes.device)
    y = x[:, None]
    return (x + cell > left) & (x < right) & (y + cell > top) & (y < bottom)


def _resized(pixels: Tensor, size: int) -> Tensor:
    return pixels if pixels.shape[-1] == size else resize_antialiased(pixels, size)
