"""Sprites: one drawing per category, prepared for recoloring into many different instances.

An instance is a category and a number; `appearance` says what the number determines. Numbers from `HELD_OUT` on are
never used in training.

Legend: H, W size of a sprite; R regions of a sprite; colors are float32 RGB in [0, 1].
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

SPRITES = Path(__file__).resolve().parents[3] / "assets" / "sprites"
SPRITE_SIZE = 112  # longest side, px
NUM_REGIONS = 3

# Category -> Unicode code point of its drawing in the npm package @lobehub/fluent-emoji-3d.
TRAINED = {
    "dog": "1f436",
    "cat": "1f431",
    "fox": "1f98a",
    "bear": "1f43b",
    "rabbit": "1f430",
    "frog": "1f438",
    "pig": "1f437",
    "penguin": "1f427",
    "owl": "1f989",
    "duck": "1f986",
    "car": "1f697",
    "robot": "1f916",
    "backpack": "1f392",
    "teapot": "1fad6",
    "guitar": "1f3b8",
    "boot": "1f462",
}
HELD_OUT_CATEGORIES = {"turtle": "1f422", "house": "1f3e0"}
CATEGORIES = {**TRAINED, **HELD_OUT_CATEGORIES}
HELD_OUT = 1_000_000  # first instance number that training never uses


@dataclass(frozen=True)
class Instance:
    """One subject: `number` 0 is the original drawing, any other number is a recolored one."""

    category: str
    number: int

    @property
    def held_out(self) -> bool:
        """Whether training never uses this instance."""
        return self.number >= HELD_OUT or self.category in HELD_OUT_CATEGORIES


@dataclass(frozen=True)
class Sprite:
    """The drawing of a category, prepared for recoloring.

    Attributes:
        color, alpha: [H, W, 3] and [H, W, 1] in [0, 1].
        regions: soft assignment of pixels to regions, [R, H, W, 1] with sum 1; the largest region comes first.
        shade, highlight: brightness of each pixel relative to its region, [R, H, W, 1]. A recolored pixel is
            shade * (target + (1 - target) * highlight): shadows stay dark and highlights stay bright.
        keep: 1 for dark pixels (eyes, outlines), which are never recolored, [H, W, 1].
    """

    color: np.ndarray
    alpha: np.ndarray
    regions: np.ndarray
    shade: np.ndarray
    highlight: np.ndarray
    keep: np.ndarray


def prepare_sprites(package_assets: Path, target: Path = SPRITES, size: int = 128) -> list[Path]:
    """Copy the drawings of all categories from the unpacked npm package at `size` px, and return their paths."""
    written = []
    for category, code in CATEGORIES.items():
        drawing = Image.open(package_assets / f"{code}.webp").convert("RGBA")
        path = target / category / f"{code}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.resize((size, size), Image.Resampling.LANCZOS).save(path, quality=90, method=6)
        written.append(path)
    return written


@cache
def sprite_size(category: str) -> tuple[int, int]:
    """Width and height in px of the drawing of a category, cropped to its outline."""
    return _crop_drawing(category).size


def _crop_drawing(category: str) -> Image.Image:
    """The RGBA drawing of a category, cropped to its outline and resized to `SPRITE_SIZE`."""
    drawing = Image.open(SPRITES / category / f"{CATEGORIES[category]}.webp").convert("RGBA")
    drawing = drawing.crop(drawing.getbbox())
    scale = SPRITE_SIZE / max(drawing.size)
    width, height = (max(1, round(side * scale)) for side in drawing.size)
    return drawing.resize((width, height), Image.Resampling.LANCZOS)


def load_sprite(category: str) -> Sprite:
    """The drawing of a category, prepared for recoloring.

    Raises:
        KeyError: an unknown category.
    """
    values = np.asarray(_crop_drawing(category), dtype=np.float32) / 255
    color, alpha = values[..., :3], values[..., 3:]
    regions = _regions(color, alpha[..., 0] > 0.5)
    light = color.max(-1, keepdims=True)
    inside = regions * (alpha > 0.5)
    mean = (light * inside).sum((1, 2), keepdims=True) / np.maximum(1e-6, inside.sum((1, 2), keepdims=True))
    relative = light / np.maximum(0.3, mean)  # [R, H, W, 1]
    keep = np.clip((0.32 - light) * 10, 0, 1)
    return Sprite(color, alpha, regions, np.minimum(relative, 1), np.clip(relative - 1, 0, 0.4), keep)


def _regions(color: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Soft k-means of the colors, [R, H, W, 1]. The farthest-point initialization makes it deterministic."""
    pixels = color[inside]
    centers = [pixels.mean(0)]
    for _ in range(NUM_REGIONS - 1):
        distance = np.min([((pixels - c) ** 2).sum(-1) for c in centers], axis=0)
        centers.append(pixels[distance.argmax()])
    centers = np.stack(centers)
    counts = np.zeros(NUM_REGIONS, int)
    for _ in range(12):
        nearest = ((pixels[:, None] - centers) ** 2).sum(-1).argmin(1)
        counts = np.bincount(nearest, minlength=NUM_REGIONS)
        centers = np.stack([pixels[nearest == i].mean(0) if counts[i] else c for i, c in enumerate(centers)])
    dark = centers.max(1) < 0.35  # eyes and outlines do not distinguish instances
    order = np.argsort(-(counts * np.where(dark, 0.1, 1.0)))
    distance = ((color[None] - centers[order][:, None, None]) ** 2).sum(-1, keepdims=True)
    weights = np.exp(-distance / 0.01 + (distance / 0.01).min(0))
    return (weights / weights.sum(0)).astype(np.float32)
