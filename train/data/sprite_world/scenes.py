"""Scenes of the sprite world, drawn procedurally from a seed.

Each scene has `NUM_VARIANTS` variants. The renderer draws each of them once.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

SCENE_SIZE = 128  # px
NUM_VARIANTS = 96

SCENES = (
    "on the beach",
    "in the snow",
    "on green grass",
    "in the jungle",
    "on a wooden floor",
    "on a cobblestone street",
    "at night under stars",
    "in the city",
)

Color = tuple[int, int, int]
DrawDetails = Callable[[ImageDraw.ImageDraw], None]
Drawing = tuple[np.ndarray, DrawDetails | None]  # [128, 128, 3] in [0, 255], and details to draw on top


def _gradient(top: Color, bottom: Color, rows: int = SCENE_SIZE) -> np.ndarray:
    """Vertical gradient between two colors, float32 [rows, 128, 3] in [0, 255]."""
    t = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None]
    return np.repeat((1 - t) * np.array(top, np.float32) + t * np.array(bottom, np.float32), SCENE_SIZE, axis=1)


def _noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise in [0, 1], [128, 128, 1]; `cells` is its resolution."""
    coarse = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    smooth = coarse.resize((SCENE_SIZE, SCENE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(smooth, np.float32)[..., None] / 255


def _beach(rng: np.random.Generator, horizon: int) -> Drawing:
    pixels = _gradient((120, 190, 240), (205, 232, 250))
    shore = min(SCENE_SIZE - 8, horizon + int(rng.integers(12, 26)))
    pixels[horizon:shore] = _gradient((40, 130, 190), (90, 190, 215), shore - horizon)
    sand = _gradient((245, 224, 172), (228, 198, 140)) - 16 * _noise(rng, 40)
    pixels[shore:] = sand[shore:]
    pixels[shore : shore + 2] = 250
    return pixels, None


def _snow(rng: np.random.Generator, horizon: int) -> Drawing:
    pixels = _gradient((165, 195, 228), (222, 234, 246))
    pixels[horizon:] = (np.array((246, 249, 253), np.float32) - 16 * _noise(rng, 9))[horizon:]

    def flakes(draw: ImageDraw.ImageDraw):
        for x, y in rng.integers(0, SCENE_SIZE, (26, 2)).tolist():
            draw.ellipse([x, y, x + 2, y + 2], fill=(255, 255, 255))

    return pixels, flakes


def _grass(rng: np.random.Generator, horizon: int) -> Drawing:
    pixels = _gradient((140, 200, 245), (205, 230, 250))
    meadow = _gradient((120, 195, 80), (60, 140, 50)) * (1 - 0.3 * _noise(rng, 48))
    pixels[horizon:] = meadow[horizon:]
    return pixels, None


def _jungle(rng: np.random.Generator, horizon: int) -> Drawing:
    pixels = np.array((26, 88, 44), np.float32) * (1 - 0.5 * _noise(rng, 12))

    def leaves(draw: ImageDraw.ImageDraw):
        for _ in range(16):
            x, y = rng.integers(-20, SCENE_SIZE, 2).tolist()
            red, green, blue = (int(rng.integers(*band)) for band in ((20, 60), (105, 180), (30, 80)))
            length = int(rng.integers(16, 42))
            outline = [(x, y), (x + length, y - 8), (x + length * 1.5, y + 4), (x + length * 0.6, y + 10)]
            draw.polygon(outline, fill=(red, green, blue))

    return pixels, leaves


def _wooden_floor(rng: np.random.Generator, horizon: int) -> Drawing:
    plank = int(rng.integers(18, 26))
    rows = np.arange(SCENE_SIZE)
    tone = rng.uniform(0.85, 1.1, SCENE_SIZE // plank + 1)[rows // plank][:, None, None]
    grain = np.asarray(
        Image.fromarray((rng.random((SCENE_SIZE // 2, 5)) * 255).astype(np.uint8)).resize((SCENE_SIZE, SCENE_SIZE)),
        np.float32,
    )[..., None]
    pixels = np.array((176, 118, 66), np.float32) * tone * (1 - 0.2 * grain / 255)
    pixels[rows % plank < 2] *= 0.55
    return pixels, None


def _cobblestone(rng: np.random.Generator, horizon: int) -> Drawing:
    y, x = np.mgrid[:SCENE_SIZE, :SCENE_SIZE]
    shift = (y // 14 % 2) * 9
    joints = (y % 14 < 2) | ((x + shift) % 18 < 2)
    tones = rng.uniform(0.8, 1.15, (12, 12))[y // 14, (x + shift) // 18][..., None]
    pixels = np.array((128, 124, 120), np.float32) * tones * (1 - 0.2 * _noise(rng, 30))
    pixels[joints] = 58
    return pixels, None


def _night(rng: np.random.Generator, horizon: int) -> Drawing:
    pixels = _gradient((8, 10, 42), (34, 30, 78))
    pixels[horizon + 30 :] = np.array((16, 26, 30), np.float32)

    def sky(draw: ImageDraw.ImageDraw):
        for x, y in rng.integers(0, (SCENE_SIZE, horizon + 28), (36, 2)).tolist():
            draw.rectangle([x, y, x + 1, y + 1], fill=(255, 255, 215))
        x = int(rng.integers(4, SCENE_SIZE - 24))
        draw.ellipse([x, 6, x + 17, 23], fill=(250, 245, 210))

    return pixels, sky


def _city(rng: np.random.Generator, horizon: int) -> Drawing:
    pixels = _gradient((250, 176, 126), (252, 224, 186))

    def houses(draw: ImageDraw.ImageDraw):
        x, street = 0, SCENE_SIZE - 18
        while x < SCENE_SIZE:
            width, height, gray = (int(rng.integers(*band)) for band in ((14, 26), (36, 88), (60, 112)))
            draw.rectangle([x, street - height, x + width, street], fill=(gray, gray, gray + 24))
            for top in range(street - height + 4, street - 4, 8):
                for left in range(x + 3, x + width - 3, 6):
                    lit = rng.random() < 0.6
                    draw.rectangle([left, top, left + 2, top + 3], fill=(250, 225, 120) if lit else (40, 40, 60))
            x += width
        draw.rectangle([0, street, SCENE_SIZE, SCENE_SIZE], fill=(84, 84, 90))

    return pixels, houses


DrawScene = Callable[[np.random.Generator, int], Drawing]
_DRAW: dict[str, DrawScene] = dict(
    zip(SCENES, (_beach, _snow, _grass, _jungle, _wooden_floor, _cobblestone, _night, _city), strict=True)
)


def draw_scene(scene: str, variant: int) -> Image.Image:
    """One variant of a scene, RGB 128 x 128 px."""
    rng = np.random.default_rng((SCENES.index(scene), variant % NUM_VARIANTS))
    pixels, details = _DRAW[scene](rng, int(rng.uniform(0.32, 0.55) * SCENE_SIZE))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if details is not None:
        details(ImageDraw.Draw(image))
    return image
