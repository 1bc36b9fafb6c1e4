"""Rendering of samples in worker processes: sample indices -> arrays.

Each call renders its samples together, with torch on the CPU.

Legend: n samples, S image size in px.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..data.sprite_world.renderer import cpu_renderer
from ..data.sprite_world.scenes import SCENE_SIZE
from ..data.sprite_world.views import pack_views
from ..data.sprite_world.world import SpriteWorld
from .pool import Entry

CAPTION_BYTES = 96


def pixels_of(image: Image.Image, size: int = 128) -> np.ndarray:
    """The image resized to S x S px, uint8 [3, S, S]."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BOX)
    return np.asarray(image).transpose(2, 0, 1)


def pack_caption(caption: str) -> np.ndarray:
    """UTF-8 bytes of a caption, padded or truncated to uint8 [CAPTION_BYTES]."""
    values = np.zeros(CAPTION_BYTES, np.uint8)
    encoded = caption.encode()[:CAPTION_BYTES]
    values[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return values


def unpack_captions(values: np.ndarray) -> list[str]:
    """Inverse of `pack_caption` for [n, CAPTION_BYTES]."""
    return [row.tobytes().rstrip(b"\0").decode() for row in values]


@dataclass(frozen=True)
class RenderSamples:
    """Images with captions.

    Fields: `pixels` uint8 [n, 3, S, S], `caption` uint8 [n, CAPTION_BYTES], and `subject_bits` uint8 [n, S / 4, S / 4],
    in which bit i is set inside the box of the caption's i-th subject.
    """

    size: int = 128
    seed: int = 0

    def __call__(self, indices: Sequence[int]) -> Entry:
        batch = SpriteWorld(self.seed).plan_samples(indices)
        return {
            "pixels": _resize(cpu_renderer().render(batch.images).numpy(), self.size),
            "caption": np.stack([pack_caption(caption) for caption in batch.captions]),
            "subject_bits": np.stack([_subject_bits(boxes, self.size) for boxes in batch.images.boxes]),
        }


@dataclass(frozen=True)
class RenderImages:
    """Images without captions, of which every fifth is a reference: `pixels` uint8 [n, 3, 128, 128]."""

    seed: int = 1

    def __call__(self, indices: Sequence[int]) -> Entry:
        world = SpriteWorld(self.seed)
        views = [world.sample(i).view if i % 5 else world.pair(i).reference_view for i in indices]
        return {"pixels": cpu_renderer().render(pack_views(views)).numpy()}


def _resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Images [n, 3, 128, 128] resized to S x S px."""
    if size == SCENE_SIZE:
        return pixels
    return np.stack([pixels_of(Image.fromarray(image), size) for image in pixels.transpose(0, 2, 3, 1)])


def _subject_bits(boxes: np.ndarray, size: int) -> np.ndarray:
    """Map with bit i set at the latent positions of box i, uint8 [size / 4, size / 4].

    Args:
        boxes: [2, 4] in px of the scene; zeros for no subject.
    """
    bits = np.zeros((SCENE_SIZE // 4, SCENE_SIZE // 4), np.uint8)
    for subject, (left, top, right, bottom) in enumerate(boxes.tolist()):
        bits[top // 4 : -(-bottom // 4), left // 4 : -(-right // 4)] |= 1 << subject
    stride = SCENE_SIZE // size
    return bits[::stride, ::stride]
