"""Rendering of samples in worker processes: sample indices -> arrays.

Every worker imports this file, so its imports are light (no torch).

Legend: n samples, S image size in px.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..curriculum import multiview_probability, resize_ratio
from .pool import Entry
from .sprite_world.scenes import SCENE_SIZE
from .sprite_world.world import Box, Split, SpriteWorld, make_reference, random_instance

CAPTION_BYTES = 96
WORLD_R_MAX = 1.6  # sprites fill the reference; with the paper's sqrt(10), many crops would have a single color


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
        world = SpriteWorld(self.seed)
        samples = [world.sample(i) for i in indices]
        return {
            "pixels": np.stack([pixels_of(s.image, self.size) for s in samples]),
            "caption": np.stack([pack_caption(s.caption) for s in samples]),
            "subject_bits": np.stack([_subject_bits(s.boxes, self.size) for s in samples]),
        }


@dataclass(frozen=True)
class RenderImages:
    """Images without captions, one reference per four samples: `pixels` uint8 [n, 3, 128, 128]."""

    seed: int = 1

    def __call__(self, indices: Sequence[int]) -> Entry:
        world = SpriteWorld(self.seed)
        images = [world.sample(i).image if i % 5 else world.pair(i).reference for i in indices]
        return {"pixels": np.stack([pixels_of(image) for image in images])}


@dataclass(frozen=True)
class RenderPairs:
    """Samples with a reference, following the curriculum (Eq. 10-13) with progress index / `curriculum`.

    Fields: `pixels` uint8 [n, 3, S, S], `reference` uint8 [n, 3, 128, 128], `caption` uint8 [n, CAPTION_BYTES], and
    `inside` uint8 [n, S / 4, S / 4], 1 inside the boxes of the reference's subjects. `with_distractor` adds
    `distractor`, a reference of other instances of the same categories.
    """

    size: int = 128
    seed: int = 2
    split: Split = "train"
    curriculum: int = 1
    with_distractor: bool = False

    def __call__(self, indices: Sequence[int]) -> Entry:
        world = SpriteWorld(self.seed, self.split)
        entry: dict[str, list] = {"pixels": [], "reference": [], "caption": [], "inside": []}
        if self.with_distractor:
            entry["distractor"] = []
        for i in indices:
            pair, rng, progress = world.pair(i), np.random.default_rng((self.seed, i)), i / self.curriculum
            other_view = rng.random() < multiview_probability(progress)
            reference = pair.reference if other_view else pair.sample.image
            ratio = resize_ratio(progress, rng.random(), r_max=WORLD_R_MAX)
            entry["pixels"].append(pixels_of(pair.sample.image, self.size))
            entry["reference"].append(pixels_of(_resized_crop(reference, ratio, *rng.random(2))))
            entry["caption"].append(pack_caption(pair.sample.caption))
            subjects = zip(pair.sample.subjects, pair.sample.boxes)
            shown = [box for subject, box in subjects if subject.category in pair.target_phrases]
            entry["inside"].append((_subject_bits(shown, self.size) > 0).astype(np.uint8))
            if self.with_distractor:
                distractors = tuple(random_instance(rng, category, self.split) for category in pair.target_phrases)
                entry["distractor"].append(pixels_of(make_reference(rng, distractors)))
        return {name: np.stack(values) for name, values in entry.items()}


def _subject_bits(boxes: Sequence[Box], size: int) -> np.ndarray:
    """Map with bit i set at the latent positions of box i, uint8 [size / 4, size / 4]; boxes in px of the scene."""
    bits = np.zeros((SCENE_SIZE // 4, SCENE_SIZE // 4), np.uint8)
    for subject, (left, top, right, bottom) in enumerate(boxes):
        bits[top // 4 : -(-bottom // 4), left // 4 : -(-right // 4)] |= 1 << subject
    stride = SCENE_SIZE // size
    return bits[::stride, ::stride]


def _resized_crop(image: Image.Image, ratio: float, down: float, right: float) -> Image.Image:
    """Random crop of the resized image (Sec. 3.2.2): a square of 1 / `ratio` of the side, enlarged to the image's size.

    Args:
        ratio: resize ratio, at least 1.
        down, right: position of the crop, each in [0, 1).
    """
    side = image.width / ratio
    left, top = right * (image.width - side), down * (image.height - side)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
