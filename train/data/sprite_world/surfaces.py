"""Where the subjects of views lie, as homographies from positions in the image to positions on the subjects.

Positions are fractions of the sides of the image or of the subject's drawing. Two views of an instance correspond
where their positions on it are equal.

Legend: B views, S = 2 slots for subjects.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .scenes import SCENE_SIZE
from .sprites import CATEGORIES, sprite_size
from .views import PackedViews


def homographies(views: PackedViews, device: torch.device | str) -> Tensor:
    """Position in the image -> position on each subject, float32 [B, S, 3, 3]; zeros for an empty slot."""
    coefficients = torch.from_numpy(views.coefficients).to(device)
    to_sprite = F.pad(coefficients, (0, 1), value=1.0).unflatten(-1, (3, 3))  # px from the image's center -> px
    category = torch.from_numpy(views.category).to(device, torch.int64)
    sides = F.pad(_sprite_sizes().to(device)[category.clamp(min=0)], (0, 1), value=1.0)
    to_pixels = torch.tensor([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1 / SCENE_SIZE]], device=device) * SCENE_SIZE
    return torch.where((category >= 0)[..., None, None], to_sprite @ to_pixels / sides[..., None], 0)


def crop_homography(boxes: Tensor) -> Tensor:
    """Position in a crop -> position in the image, [B, 3, 3].

    Args:
        boxes: left, top, right, bottom of the crops as fractions of the image's sides, [B, 4].
    """
    left, top, right, bottom = boxes.unbind(1)
    zero, one = torch.zeros_like(left), torch.ones_like(left)
    rows = [right - left, zero, left, zero, bottom - top, top, zero, zero, one]
    return torch.stack(rows, 1).unflatten(1, (3, 3))


def positions_on_subjects(homographies: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Position on each subject of the centers of `side` x `side` cells, and whether they are on the drawing.

    Args:
        homographies: [B, S, 3, 3].
    Returns:
        Positions [B, S, side * side, 2], row by row, and bool [B, S, side * side].
    """
    axis = (torch.arange(side, device=homographies.device) + 0.5) / side
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    cells = torch.stack([x.flatten(), y.flatten(), torch.ones_like(x.flatten())])  # [3, cells]
    position = (homographies @ cells).transpose(2, 3)
    scale = position[..., 2:]
    position = position[..., :2] / torch.where(scale > 0, scale, 1)
    shown = (scale > 0).squeeze(-1) & ((position >= 0) & (position <= 1)).all(-1)
    return position, shown


@cache
def _sprite_sizes() -> Tensor:
    """Width and height of each category's drawing in px, float32 [categories, 2]."""
    return torch.tensor([sprite_size(category) for category in CATEGORIES], dtype=torch.float32)
