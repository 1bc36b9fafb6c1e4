"""ReferenceImage: an image of a subject, normalized once to upright 8-bit RGB.

It needs no further checks and passes through requests, processes and batches without a copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageOps

STRIP_PIXELS = 2**18  # pixels per call into PIL


@dataclass(frozen=True, eq=False)
class ReferenceImage:
    """The pixels of one reference.

    Attributes:
        pixels: read-only uint8 [height, width, 3]. An array and not a PIL image, because Ray shares arrays between
            processes without copying them.
    """

    pixels: np.ndarray

    def __post_init__(self) -> None:
        assert self.pixels.dtype == np.uint8 and self.pixels.ndim == 3 and self.pixels.shape[2] == 3, self.pixels.shape

    @classmethod
    def from_pil(cls, image: Image.Image) -> ReferenceImage:
        """Normalize any PIL image; see `to_rgb`.

        Raises:
            ValueError: not a PIL image, or an image without pixels.
        """
        image = to_rgb(image)
        width, height = image.size
        if width == 0 or height == 0:
            raise ValueError(f"the subject's image is {width}x{height}; it has no pixels.")
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        for box in _strips(image.size):
            pixels[box[1] : box[3]] = np.asarray(image.crop(box))
        pixels.flags.writeable = False
        return cls(pixels)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, in PIL's order."""
        return self.pixels.shape[1], self.pixels.shape[0]

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of size and pixels: equal for equal images, regardless of their files."""
        digest = hashlib.sha256(repr(self.size).encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.digest()

    def to_pil(self) -> Image.Image:
        """The image as an RGB PIL image."""
        return Image.fromarray(self.pixels)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.pixels, dtype=dtype, copy=copy)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL image to upright 8-bit RGB. Transparency is composited on white; 16 bits are scaled to 8.

    An upright RGB image is returned without a copy.

    Raises:
        ValueError: not a PIL image.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"a subject's image must be a PIL image, not {type(image).__name__}.")
    if image.getexif().get(0x0112, 1) != 1:  # a rotated image; `exif_transpose` copies even an upright one
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of full-width strips that cover an image of this size.

    `alpha_composite` and `tobytes` hold the interpreter lock until they return: 190 ms for 24 megapixels. In strips,
    the event loop of a server runs between the calls.
    """
    width, height = size
    rows = max(1, STRIP_PIXELS // max(1, width))
    for top in range(0, height, rows):
        yield 0, top, width, min(height, top + rows)


def _on_white(image: Image.Image) -> Image.Image:
    """Composite an image with transparency on white; the result has mode "RGB"."""
    result = Image.new("RGB", image.size)
    for box in _strips(image.size):
        layer = image.crop(box).convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        result.paste(Image.alpha_composite(ground, layer).convert("RGB"), box)
    return result


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Convert 16-bit, integer or float gray values to 8 bits: scaled by the range of their type, then clipped."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F" and values.max(initial=0) <= 1:
        top = 1.0
    elif image.mode.startswith("I;16") or values.max(initial=0) > 255:
        top = 65535.0
    else:
        top = 255.0
    return Image.fromarray((values * (255 / top)).clip(0, 255).round().astype(np.uint8))
