"""Images as file bytes and base64. Size limits are checked before an image is decoded."""

import base64
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError, features

from realcustom.reference_image import ReferenceImage
from realcustom.words import shorten

from .decode_process import decode_in_process
from .errors import InvalidRequest, TooLarge, Unavailable, is_system_error
from .limits import Limits

logger = logging.getLogger("ray.serve.realcustom")

INPUT_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if features.check("avif") else []))
LARGE_PIXELS = 2**21  # images with more pixels are decoded in another process
OUTPUT_FORMATS = ("png", "jpeg", "webp")
BASE64_BYTES = 3 * 2**18  # per piece; a multiple of 3, so that pieces can be joined


def decode_image(file: BinaryIO, limits: Limits, name: str = "image") -> ReferenceImage:
    """Decode an uploaded file, or the first frame of an animation. Takes up to seconds, so call it in a thread.

    Raises:
        TooLarge: more bytes or pixels than `limits` allow; the number of pixels is read from the header.
        InvalidRequest: empty, truncated, damaged, or not one of `INPUT_FORMATS`.
        Unavailable: this machine lacks memory, disk space or processes. The cause is logged.
    """
    image = read_header(file, limits, name)
    with _system_errors():
        try:
            if image.width * image.height > LARGE_PIXELS:
                assert image.format is not None
                file.seek(0)
                return decode_in_process(file, image.format)
            image.load()
            return ReferenceImage.from_pil(image)
        except Exception as error:
            if is_system_error(error):
                raise
            raise InvalidRequest(f"{name} is truncated or damaged: {shorten(str(error))}.") from None


def read_header(file: BinaryIO, limits: Limits, name: str = "image") -> Image.Image:
    """The image of an uploaded file with its size, not decoded. Raises the errors of `decode_image`."""
    with _system_errors():
        return _read_header(file, limits, name)


def _read_header(file: BinaryIO, limits: Limits, name: str) -> Image.Image:
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    if num_bytes == 0:
        raise InvalidRequest(f"{name} is empty; send an image file.")
    if num_bytes > limits.max_image_bytes:
        raise TooLarge(
            f"{name} has {num_bytes} bytes; this server accepts at most {limits.max_image_bytes}. Send a smaller file."
        )
    try:
        image = Image.open(file, formats=INPUT_FORMATS)
    except Image.DecompressionBombError:
        raise TooLarge(
            f"{name} has too many pixels; this server accepts at most {limits.max_reference_pixels}. "
            "Send a smaller image."
        ) from None
    except UnidentifiedImageError:
        raise InvalidRequest(f"{name} is not an image; send {', '.join(INPUT_FORMATS)}.") from None
    except Exception as error:  # PIL's parsers raise many types on damaged files
        if is_system_error(error):
            raise
        raise InvalidRequest(f"{name} cannot be read: {shorten(str(error))}.") from None
    width, height = image.size
    if width * height > limits.max_reference_pixels:
        raise TooLarge(
            f"{name} is {width}x{height}; this server accepts at most {limits.max_reference_pixels} pixels. "
            "Send a smaller image."
        )
    return image


@contextmanager
def _system_errors() -> Iterator[None]:
    """Log an error of the operating system and raise `Unavailable` instead, because the request is valid."""
    try:
        yield
    except Exception as error:
        if not is_system_error(error):
            raise
        logger.exception("an image could not be decoded")
        raise Unavailable("the server lacks resources to read images at the moment; try again later.") from error


def encode_image(image: Image.Image, output_format: str = "png") -> bytes:
    """Encode an image as the bytes of a file. Equal images give equal bytes."""
    buffer = BytesIO()
    options = {"quality": 95} if output_format != "png" else {}
    image.save(buffer, output_format.upper(), **options)
    return buffer.getvalue()


def to_base64(image: Image.Image, output_format: str = "png") -> str:
    data = encode_image(image, output_format)
    # Encoded in pieces, because `b64encode` holds the interpreter lock until it returns
    return "".join(
        base64.b64encode(data[start : start + BASE64_BYTES]).decode("ascii")
        for start in range(0, len(data), BASE64_BYTES)
    )


def from_base64(text: str) -> Image.Image:
    """The inverse of `to_base64`, as a loaded image."""
    image = Image.open(BytesIO(base64.b64decode(text)), formats=[f.upper() for f in OUTPUT_FORMATS])
    image.load()
    return image
