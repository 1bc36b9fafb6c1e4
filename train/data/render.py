"""What worker processes do: sample indices -> arrays. Light imports only (no torch), as every worker loads this file.

Legend: n samples, S picture size in px.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from ..curriculum import multiview_probability, resize_ratio
from .pool import Entry
from .scenes import SCENE_SIZE
from .sprite_world import SpriteWorld, make_reference, random_instance

CAPTION_BYTES = 96
R_MAX_WORLD = 1.6  # a sprite fills its reference, so the paper's sqrt(10) would leave a patch of plain colour


def pixels_of(picture: Image.Image, size: int = 128) -> np.ndarray:
    """uint8 [3, S, S]."""
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BOX)
    return np.asarray(picture).transpose(2, 0, 1)


def pack_caption(caption: str) -> np.ndarray:
    values = np.zeros(CAPTION_BYTES, np.uint8)
    encoded = caption.encode()[:CAPTION_BYTES]
    values[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return values


def unpack_captions(values: np.ndarray) -> list[str]:
    return [row.tobytes().rstrip(b"\0").decode() for row in values]


@dataclass(frozen=True)
class RenderSamples:
    """Pictures with captions: `pixels` uint8 [n, 3, S, S], `caption` uint8 [n, CAPTION_BYTES], `where` uint8
    [n, S / 4, S / 4], whose bit i is set where the i-th subject of the caption is."""

    size: int = 128
    seed: int = 0

    def __call__(self, indices: Sequence[int]) -> Entry:
        world = SpriteWorld(self.seed)
        samples = [world.sample(i) for i in indices]
        return {
            "pixels": np.stack([pixels_of(s.picture, self.size) for s in samples]),
            "caption": np.stack([pack_caption(s.caption) for s in samples]),
            "where": np.stack([_where(s.boxes, self.size) for s in samples]),
        }


@dataclass(frozen=True)
class RenderPictures:
    """Pictures alone, now a scene, now a reference: `pixels` uint8 [n, 3, 128, 128]."""

    seed: int = 1

    def __call__(self, indices: Sequence[int]) -> Entry:
        world = SpriteWorld(self.seed)
        pictures = []
        for i in indices:
            pictures.append(world.sample(i).picture if i % 5 else world.pair(i).reference)
        return {"pixels": np.stack([pixels_of(p) for p in pictures])}


@dataclass(frozen=True)
class RenderPairs:
    """Samples with a reference, along the curriculum (Eq. 10-13), progress being index / `curriculum`.

    `pixels` uint8 [n, 3, S, S], `reference` uint8 [n, 3, 128, 128]; `caption` uint8 [n, CAPTION_BYTES]; `inside` uint8
    [n, S / 4, S / 4], 1 where the subjects of the reference are. With `with_wrong` also `wrong`: a reference of another
    individual of the same kind.
    """

    size: int = 128
    seed: int = 2
    split: Literal["train", "held_out"] = "train"
    curriculum: int = 1
    with_wrong: bool = False

    def __call__(self, indices: Sequence[int]) -> Entry:
        world = SpriteWorld(self.seed, self.split)
        entry: dict[str, list] = {"pixels": [], "reference": [], "caption": [], "inside": []}
        if self.with_wrong:
            entry["wrong"] = []
        for i in indices:
            pair, rng, progress = world.pair(i), np.random.default_rng((self.seed, i)), i / self.curriculum
            other_view = rng.random() < multiview_probability(progress)
            reference = pair.reference if other_view else pair.sample.picture
            ratio = resize_ratio(progress, rng.random(), r_max=R_MAX_WORLD)
            entry["pixels"].append(pixels_of(pair.sample.picture, self.size))
            entry["reference"].append(pixels_of(_resized_crop(reference, ratio, *rng.random(2))))
            entry["caption"].append(pack_caption(pair.sample.caption))
            subjects = zip(pair.sample.subjects, pair.sample.boxes)
            shown = [box for subject, box in subjects if subject.category in pair.target_phrases]
            entry["inside"].append((_where(shown, self.size) > 0).astype(np.uint8))
            if self.with_wrong:
                strangers = tuple(random_instance(rng, name, self.split) for name in pair.target_phrases)
                entry["wrong"].append(pixels_of(make_reference(rng, strangers)))
        return {name: np.stack(values) for name, values in entry.items()}


def _where(boxes: Sequence[tuple[int, int, int, int]], size: int) -> np.ndarray:
    """Sets bit i at the latent positions that box i covers, uint8 [size / 4, size / 4]; boxes in px of the scene."""
    where = np.zeros((SCENE_SIZE // 4, SCENE_SIZE // 4), np.uint8)
    for subject, (left, top, right, bottom) in enumerate(boxes):
        where[top // 4 : -(-bottom // 4), left // 4 : -(-right // 4)] |= 1 << subject
    every = SCENE_SIZE // size
    return where[::every, ::every]


def _resized_crop(picture: Image.Image, ratio: float, down: float, right: float) -> Image.Image:
    """A patch of 1 / `ratio` of the side, enlarged to the old size: `curriculum.resized_crop` for PIL pictures."""
    side = picture.width / ratio
    left, top = right * (picture.width - side), down * (picture.height - side)
    return picture.resize(picture.size, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
