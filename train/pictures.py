"""Arrays <-> pictures: grids for looking at, and the range the networks use."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_signed(pixels: np.ndarray) -> Tensor:
    """uint8 [n, 3, H, W] -> fp32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).float() / 127.5 - 1


def save_grid(pictures: Tensor, path: Path, columns: int) -> None:
    """[n, 3, H, W] in [-1, 1] -> one PNG, row by row."""
    values = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = -(-len(values) // columns)
    height, width = values.shape[1:3]
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, picture in enumerate(values):
        y, x = i // columns * height, i % columns * width
        sheet[y : y + height, x : x + width] = picture
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)
