"""Conversion between image arrays and tensors, and image grids for inspection."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_signed(pixels: np.ndarray) -> Tensor:
    """Convert uint8 [n, 3, H, W] to float32 in [-1, 1], the range of the networks."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).float() / 127.5 - 1


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images [n, 3, H, W] in [-1, 1] as one PNG, row by row."""
    values = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = -(-len(values) // columns)
    height, width = values.shape[1:3]
    grid = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(values):
        y, x = i // columns * height, i % columns * width
        grid[y : y + height, x : x + width] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).save(path)
