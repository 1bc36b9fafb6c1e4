"""Bytes -> image, with limits; whatever a decoder raises becomes a `BrokenRecord`."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from realcustom.reference_image import to_rgb

from .sample import BrokenRecord, Size

FORMATS = ("JPEG", "PNG", "WEBP")
EXTENSIONS = ("jpg", "jpeg", "png", "webp")
GRAY_TOLERANCE = 6  # levels of 255; compression noise within a single color
_ORIENTATION, _ROTATED = 0x0112, (5, 6, 7, 8)  # EXIF


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Which images a source uses.

    Attributes:
        min_side: smallest height and width in px.
        max_pixels: largest number of pixels; it is checked before decoding.
    """

    min_side: int = 256
    max_pixels: int = 64_000_000

    def check(self, size: Size, key: str) -> None:
        """Raise `BrokenRecord` if an image of this size is too small or too large."""
        if min(size) < self.min_side:
            raise BrokenRecord("tiny", key, f"{size[1]}x{size[0]}, minimum side {self.min_side}")
        if size[0] * size[1] > self.max_pixels:
            raise BrokenRecord("huge", key, f"{size[1]}x{size[0]}, at most {self.max_pixels} pixels")


def read_size(data: bytes, key: str) -> Size:
    """Height and width of an upright image, from its header."""
    with _broken_if_it_fails(key, data) as image:
        width, height = image.size
        # Reading the EXIF data of a PNG file decodes the image, unless there is none.
        may_be_rotated = image.format != "PNG" or "exif" in image.info
        rotated = may_be_rotated and image.getexif().get(_ORIENTATION) in _ROTATED
        return (width, height) if rotated else (height, width)


def decode(data: bytes, key: str, limits: Limits) -> Image.Image:
    """The image as upright 8-bit RGB.

    Raises:
        BrokenRecord: it cannot be decoded completely, is beyond the limits, or has a single color.
    """
    with _broken_if_it_fails(key, data) as image:
        limits.check((image.height, image.width), key)
        image.load()
        image = to_rgb(image)
        if _has_one_color(image):
            raise BrokenRecord("gray", key)
        return image


def _has_one_color(image: Image.Image) -> bool:
    """Whether an RGB image has a single color, up to compression noise."""
    for part in (image.resize((16, 16), Image.Resampling.NEAREST), image):  # a few pixels usually show that it has more
        if np.ptp(np.reshape(part.getextrema(), (-1, 2)), axis=1).max() > GRAY_TOLERANCE:
            return False
    return True


class _broken_if_it_fails:
    """Open an image; an exception inside the block becomes a `BrokenRecord`."""

    def __init__(self, key: str, data: bytes) -> None:
        assert not ImageFile.LOAD_TRUNCATED_IMAGES, "truncated images would be completed with gray"
        self.key, self.data = key, data

    def __enter__(self) -> Image.Image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `Limits` decides
                return Image.open(io.BytesIO(self.data), formats=FORMATS)
        except Exception as error:
            raise self._broken(error) from error

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, Exception) and not isinstance(error, BrokenRecord):
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> BrokenRecord:
        """Decoders raise many types, such as OSError, SyntaxError, ValueError, struct.error and zlib.error."""
        if isinstance(error, MemoryError):
            raise error
        if isinstance(error, Image.DecompressionBombError):
            return BrokenRecord("huge", self.key, str(error))
        if isinstance(error, UnidentifiedImageError):
            return BrokenRecord("broken image", self.key, f"not a {', '.join(FORMATS)} file")
        text = f"{type(error).__name__}: {error}"
        return BrokenRecord("truncated" if "truncated" in text.lower() else "broken image", self.key, text)
