"""Sprites and instances: one cut-out drawing per category, recoloured into endless different individuals.

An instance is a category and a number; the number seeds everything that makes the individual: colours of its regions,
saturation, brightness and a pattern. Numbers below `HELD_OUT` are for training; those from there on are never trained
on.

Legend: H, W size of a sprite; colours are fp32 RGB in [0, 1]; R regions of a sprite.
"""

import colorsys
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

SPRITES = Path(__file__).resolve().parents[2] / "assets" / "sprites"
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
HELD_OUT = 1_000_000  # first instance number that is never trained on


@dataclass(frozen=True)
class Instance:
    """One individual: `number` 0 is the drawing as it came, every other number a recolouring of its own."""

    category: str
    number: int

    @property
    def held_out(self) -> bool:
        return self.number >= HELD_OUT or self.category in HELD_OUT_CATEGORIES


@dataclass(frozen=True)
class Sprite:
    """A drawing and what every individual of it shares.

    Attributes:
        colour, alpha: [H, W, 3] and [H, W, 1] in [0, 1].
        regions: [R, H, W, 1] soft, sum 1, the largest coloured one first.
        shade, highlight: [R, H, W, 1]; how dark or bright each place is within its region, see `_tint`.
        keep: [H, W, 1], 1 where the drawing is so dark (eyes, outlines) that it is never repainted.
    """

    colour: np.ndarray
    alpha: np.ndarray
    regions: np.ndarray
    shade: np.ndarray
    highlight: np.ndarray
    keep: np.ndarray


def prepare_sprites(package_assets: Path, target: Path = SPRITES, size: int = 128) -> list[Path]:
    """Copy the drawings this world uses out of the unpacked npm package, scaled to `size` px."""
    written = []
    for category, code in CATEGORIES.items():
        drawing = Image.open(package_assets / f"{code}.webp").convert("RGBA")
        path = target / category / f"{code}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.resize((size, size), Image.Resampling.LANCZOS).save(path, quality=90, method=6)
        written.append(path)
    return written


@cache
def load_sprite(category: str) -> Sprite:
    """The drawing of a category, cropped to its outline; KeyError for an unknown category."""
    drawing = Image.open(SPRITES / category / f"{CATEGORIES[category]}.webp").convert("RGBA")
    drawing = drawing.crop(drawing.getbbox())
    scale = SPRITE_SIZE / max(drawing.size)
    drawing = drawing.resize([max(1, round(side * scale)) for side in drawing.size], Image.Resampling.LANCZOS)
    values = np.asarray(drawing, dtype=np.float32) / 255
    colour, alpha = values[..., :3], values[..., 3:]
    regions = _regions(colour, alpha[..., 0] > 0.5)
    light = colour.max(-1, keepdims=True)
    inside = regions * (alpha > 0.5)
    mean = (light * inside).sum((1, 2), keepdims=True) / np.maximum(1e-6, inside.sum((1, 2), keepdims=True))
    relative = light / np.maximum(0.3, mean)  # [R, H, W, 1]
    keep = np.clip((0.32 - light) * 10, 0, 1)
    return Sprite(colour, alpha, regions, np.minimum(relative, 1), np.clip(relative - 1, 0, 0.4), keep)


def _regions(colour: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Soft k-means of the colours into regions, farthest-point start so that it is the same every time."""
    pixels = colour[inside]
    centres = [pixels.mean(0)]
    for _ in range(NUM_REGIONS - 1):
        distance = np.min([((pixels - c) ** 2).sum(-1) for c in centres], axis=0)
        centres.append(pixels[distance.argmax()])
    centres = np.stack(centres)
    for _ in range(12):
        nearest = ((pixels[:, None] - centres) ** 2).sum(-1).argmin(1)
        centres = np.stack([pixels[nearest == i].mean(0) if (nearest == i).any() else c for i, c in enumerate(centres)])
    counts = np.bincount(nearest, minlength=NUM_REGIONS)
    dark = centres.max(1) < 0.35  # eyes and outlines are not what an individual is recognised by
    order = np.argsort(-(counts * np.where(dark, 0.1, 1.0)))
    distance = ((colour[None] - centres[order][:, None, None]) ** 2).sum(-1, keepdims=True)
    weights = np.exp(-distance / 0.01 + (distance / 0.01).min(0))
    return (weights / weights.sum(0)).astype(np.float32)


def _random_colour(rng: np.random.Generator) -> np.ndarray:
    hue, saturation, value = rng.random(), rng.uniform(0.25, 0.95), rng.uniform(0.45, 1.0)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), dtype=np.float32)


def _pattern(rng: np.random.Generator, height: int, width: int) -> np.ndarray | None:
    """Stripes, spots or nothing, [H, W, 1] in [0, 1]."""
    kind = rng.choice(3, p=(0.4, 0.35, 0.25))
    if kind == 0:
        return None
    y, x = np.mgrid[:height, :width].astype(np.float32)
    period, angle = rng.uniform(14, 26), rng.uniform(0, np.pi)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    if kind == 1:
        wave = np.sin(along * (2 * np.pi / period)) - rng.uniform(-0.2, 0.4)
        return np.clip(wave * 3 + 0.5, 0, 1)[..., None]
    half = period / 2
    distance = np.hypot(along % period - half, across % period - half)
    return np.clip(period * rng.uniform(0.24, 0.36) - distance + 0.5, 0, 1)[..., None]


def _tint(sprite: Sprite, region: int, target: np.ndarray) -> np.ndarray:
    """`target` with the shading of the region it replaces: darker parts stay darker, highlights stay bright."""
    return sprite.shade[region] * (target + (1 - target) * sprite.highlight[region])


@lru_cache(maxsize=512)
def draw_instance(instance: Instance) -> Image.Image:
    """The individual, upright, RGBA, longest side `SPRITE_SIZE` px."""
    sprite = load_sprite(instance.category)
    colour = sprite.colour
    if instance.number:
        seed = (list(CATEGORIES).index(instance.category), instance.number)
        rng = np.random.default_rng(seed)
        painted = np.zeros_like(colour)
        for i, region in enumerate(sprite.regions):
            target, strength = _random_colour(rng), rng.uniform(0.75, 0.95)
            if i and rng.random() < 0.5:
                strength = 0.0  # part of the original keeps the category recognisable
            painted += region * (colour * (1 - strength) + _tint(sprite, i, target) * strength if strength else colour)
        pattern, second = _pattern(rng, *colour.shape[:2]), _random_colour(rng)
        if pattern is not None:
            amount = pattern * sprite.regions[0] * 0.85
            painted = painted * (1 - amount) + _tint(sprite, 0, second) * amount
        colour = painted * (1 - sprite.keep) + colour * sprite.keep
    rgba = np.concatenate([colour, sprite.alpha], axis=-1)
    return Image.fromarray((rgba * 255 + 0.5).astype(np.uint8), "RGBA")
