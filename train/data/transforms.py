"""Resizing, cropping and mirroring: a record becomes a sample of a bucket's size. Aspect buckets.

Legend: H, W size of the bucket; S reference size; r resize ratio; all in px except r.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from .sample import Size

CropMode = Literal["center", "random"]
Box = tuple[float, float, float, float]  # left, top, right, bottom


def aspect_buckets(resolution: int, *, multiple: int = 64, max_aspect: float = 2.0) -> tuple[Size, ...]:
    """Buckets (H, W) of at most `resolution`^2 pixels, from portrait to landscape.

    Args:
        resolution: side of the square bucket.
        multiple: every side is a multiple of it.
        max_aspect: largest ratio of the longer to the shorter side.
    """
    if resolution % multiple or resolution <= 0:
        raise ValueError(
            f"resolution is {resolution}; it must be a multiple of {multiple}, for example "
            f"{max(multiple, round(resolution / multiple) * multiple)}."
        )
    buckets = set()
    for short in range(multiple, resolution + 1, multiple):
        long = resolution * resolution // short // multiple * multiple
        if long <= short * max_aspect:
            buckets |= {(short, long), (long, short)}
    return tuple(sorted(buckets, key=lambda size: size[1] / size[0]))


def nearest_bucket(sizes: np.ndarray, buckets: Sequence[Size]) -> np.ndarray:
    """Number of the bucket with the most similar aspect ratio for sizes [N, 2], int64 [N]."""
    aspect = np.log(sizes[:, 1] / sizes[:, 0])
    ratios = np.log([width / height for height, width in buckets])
    return np.abs(aspect[:, None] - ratios).argmin(1)


def fit(size: Size, bucket: Size, mode: CropMode, draws: tuple[float, float]) -> tuple[Size, tuple[int, int]]:
    """Size of the resized image, which covers the bucket, and top and left of the crop.

    Args:
        size: height and width of the image.
        bucket: H, W.
        mode: "center", or "random" at the fractions `draws`, each in [0, 1), of the free space.
    """
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    resized = tuple(max(limit, round(side * scale)) for side, limit in zip(size, bucket))
    free = [side - limit for side, limit in zip(resized, bucket)]
    down, right = draws if mode == "random" else (0.5, 0.5)
    crop = int(down * (free[0] + 1)), int(right * (free[1] + 1))
    return (resized[0], resized[1]), (crop[0], crop[1]) if mode == "random" else (free[0] // 2, free[1] // 2)


def resize_and_crop(image: Image.Image, bucket: Size, resized: Size, crop: tuple[int, int]) -> np.ndarray:
    """The bucket-sized crop of the resized image, uint8 [H, W, ...]; only the crop is computed.

    Masks (mode "L") are sampled without interpolation.
    """
    (height, width), (top, left) = bucket, crop
    scale = image.height / resized[0], image.width / resized[1]
    box = (left * scale[1], top * scale[0], (left + width) * scale[1], (top + height) * scale[0])
    box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
    return np.array(image.resize((width, height), _filter(image), box=box))


def reference_box(ratio: float, down: float, right: float) -> Box:
    """The part of the reference that a random crop after resizing by r shows, as fractions of its sides (Eq. 13).

    Resizing to (s * r)^2 and cropping s^2 shows a region of 1 / r of each side. `down` and `right` in [0, 1) place it.
    """
    side = 1 / ratio
    left, top = right * (1 - side), down * (1 - side)
    return left, top, min(1.0, left + side), min(1.0, top + side)


def crop_reference(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """The part `box` of the reference, resized to uint8 [S, S, 3]. As in inference, the aspect ratio is not kept."""
    width, height = image.size
    left, top, right, bottom = box
    pixels = (left * width, top * height, right * width, bottom * height)
    if image.size == (size, size) and box == (0.0, 0.0, 1.0, 1.0):
        return np.array(image)
    return np.array(image.resize((size, size), _filter(image), box=pixels))


def _filter(image: Image.Image) -> Image.Resampling:
    return Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.BICUBIC  # as in inference
