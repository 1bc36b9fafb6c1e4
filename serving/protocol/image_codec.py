"""Bytes <-> images, with limits that hold before anything is decoded."""

import base64
from io import BytesIO

from PIL import Image, UnidentifiedImageError

from realcustom.reference_image import ReferenceImage

from .errors import InvalidRequest, TooLarge
from .limits import Limits

INPUT_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
OUTPUT_FORMATS = ("png", "jpeg", "webp")


def decode_image(data: bytes, limits: Limits, name: str = "image") -> ReferenceImage:
    """An uploaded file as an upright RGB image; of an animation, the first frame.

    Raises:
        TooLarge: more bytes or pixels than `limits` allow; pixels are read from the header alone.
        InvalidRequest: empty, of another format, truncated or damaged.
    """
    if not data:
        raise InvalidRequest(f"{name} is empty; send an image file.")
    if len(data) > limits.max_image_bytes:
        raise TooLarge(f"{name} has {len(data)} bytes; at most {limits.max_image_bytes} are taken, send a smaller one.")
    try:
        image = Image.open(BytesIO(data), formats=INPUT_FORMATS)
    except Image.DecompressionBombError:
        raise TooLarge(f"{name} has more pixels than the {limits.max_reference_pixels} that are taken.") from None
    except UnidentifiedImageError:
        raise InvalidRequest(f"{name} is not an image; send {', '.join(INPUT_FORMATS)}.") from None
    except Exception as error:  # parsers of headers raise what they like on damaged files
        raise InvalidRequest(f"{name} cannot be read: {error}.") from None
    width, height = image.size
    if width * height > limits.max_reference_pixels:
        raise TooLarge(
            f"{name} is {width}x{height}; at most {limits.max_reference_pixels} pixels are taken, send a smaller one."
        )
    try:
        image.load()
        return ReferenceImage.from_pil(image)
    except Exception as error:
        raise InvalidRequest(f"{name} is truncated or damaged: {error}.") from None


def encode_image(image: Image.Image, output_format: str = "png") -> bytes:
    """The image as a file; the same image always gives the same bytes."""
    buffer = BytesIO()
    options = {"quality": 95} if output_format != "png" else {}
    image.save(buffer, output_format.upper(), **options)
    return buffer.getvalue()


def to_base64(image: Image.Image, output_format: str = "png") -> str:
    return base64.b64encode(encode_image(image, output_format)).decode("ascii")


def from_base64(text: str) -> Image.Image:
    """What `to_base64` made, as a loaded image."""
    image = Image.open(BytesIO(base64.b64decode(text)), formats=[f.upper() for f in OUTPUT_FORMATS])
    image.load()
    return image
