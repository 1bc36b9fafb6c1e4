"""The sprite world: text-image samples and reference pairs, endless, each made from its index alone.

A sample shows one or two individuals (`Instance`) in a scene and says so in words. A reference shows the same
individual again in another view. The same index gives the same sample on every machine.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from .scenes import NUM_VARIANTS, SCENE_SIZE, SCENES, draw_scene
from .sprites import HELD_OUT, TRAINED, Instance, draw_instance

KINDS = tuple(TRAINED)
NUM_TRAINED_INSTANCES = 20_000  # per category
Split = Literal["train", "held_out"]

_ONE = (
    "{0} {scene}",
    "{0} {scene}",
    "{0} {scene}",
    "a photo of {0} {scene}",
    "a picture of {0} {scene}",
    "{0} is {scene}",
    "one {0.noun} {scene}",
    "the {0.noun} {scene}",
    "{0.noun} {scene}",
)
_TWO = ("{0} and {1} {scene}", "{0} and {1} {scene}", "a photo of {0} and {1} {scene}", "{0} next to {1} {scene}")
_NO_SCENE = ("{0}", "a photo of {0}", "one {0.noun}")


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


class _Named(str):
    """A noun that formats with its article, and without as `.noun`."""

    @property
    def noun(self) -> str:
        return str.__str__(self)

    def __format__(self, spec: str) -> str:
        return with_article(self.noun)


@dataclass(frozen=True)
class Sample:
    """picture: RGB 128 x 128. boxes: per subject (left, top, right, bottom) in px, left subject first."""

    picture: Image.Image
    caption: str
    subjects: tuple[Instance, ...]
    boxes: tuple[tuple[int, int, int, int], ...]
    scene: str


@dataclass(frozen=True)
class ReferencePair:
    """A sample, a reference picture of some of its subjects, and the words of the caption it stands for."""

    sample: Sample
    reference: Image.Image
    target_phrases: tuple[str, ...]


def random_instance(rng: np.random.Generator, category: str, split: Split = "train") -> Instance:
    first = 0 if split == "train" else HELD_OUT
    return Instance(category, first + int(rng.integers(0, NUM_TRAINED_INSTANCES)))


def another_kind(rng: np.random.Generator, kind: str) -> str:
    return str(rng.choice([other for other in KINDS if other != kind]))


def _corners(
    rng: np.random.Generator, sprite: Image.Image, height: float, centre: tuple[float, float], max_width: float
):
    """Where the four corners of a sprite land: rotation, mirror, aspect, perspective, scale, place; fp64 [4, 2]."""
    width, tall = sprite.size
    scale = height / tall * np.array([rng.uniform(0.88, 1.14), 1.0])
    scale *= min(1.0, max_width / (width * scale[0]))
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (width / 2, tall / 2) * scale
    corners *= 1 + rng.uniform(-0.07, 0.07, (4, 2))
    angle = rng.uniform(-0.35, 0.35)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    corners = corners @ turn
    if rng.random() < 0.5:
        corners[:, 0] *= -1
    return corners + centre


def _perspective(corners: np.ndarray, size: tuple[int, int]) -> list[float]:
    """Coefficients that map places in the picture to places in the sprite, as PIL wants them."""
    width, height = size
    rows, values = [], []
    for (x, y), (u, v) in zip(corners, ((0, 0), (width, 0), (width, height), (0, height))):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(np.array(rows), np.array(values, float)).tolist()


def _paste(picture: Image.Image, sprite: Image.Image, corners: np.ndarray) -> tuple[int, int, int, int]:
    """Draw the sprite into the picture; returns its box, clipped to the picture."""
    left, top = np.floor(corners.min(0)).astype(int)
    right, bottom = np.ceil(corners.max(0)).astype(int)
    box = (max(0, left), max(0, top), min(picture.width, right), min(picture.height, bottom))
    size = (box[2] - box[0], box[3] - box[1])
    coefficients = _perspective(corners - (box[0], box[1]), sprite.size)
    view = sprite.transform(size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR)
    picture.paste(view, box[:2], view)
    return tuple(int(side) for side in box)


def scene_ground(rng: np.random.Generator, scene: str) -> Image.Image:
    """An empty scene to draw on."""
    ground = draw_scene(scene, int(rng.integers(NUM_VARIANTS)))
    return ground.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else ground.copy()


def reference_ground(rng: np.random.Generator, on_scene: float = 0.2) -> Image.Image:
    """What a reference is drawn on: mostly a plain ground, with `on_scene` probability a scene."""
    if rng.random() < on_scene:
        return scene_ground(rng, SCENES[int(rng.integers(len(SCENES)))])
    return Image.new("RGB", (SCENE_SIZE, SCENE_SIZE), tuple(rng.integers(150, 256, 3).tolist()))


def compose(rng: np.random.Generator, subjects: tuple[Instance, ...], ground: Image.Image, large: bool = False):
    """Draw one or two subjects side by side on `ground`; returns their boxes."""
    boxes = []
    for i, subject in enumerate(subjects):
        sprite = draw_instance(subject)
        if len(subjects) == 1:
            height = rng.uniform(0.72, 0.92) if large else rng.uniform(0.5, 0.8)
            margin = 0.5 - height / 2
            centre = (0.5 + rng.uniform(-margin, margin) * 0.9, 0.5 + margin * rng.uniform(-0.2, 0.8))
            max_width = 0.95
        else:
            height = rng.uniform(0.42, 0.56)
            centre = ((0.27, 0.73)[i] + rng.uniform(-0.03, 0.03), rng.uniform(0.5, 0.68))
            max_width = 0.46
        corners = _corners(
            rng, sprite, height * SCENE_SIZE, tuple(c * SCENE_SIZE for c in centre), max_width * SCENE_SIZE
        )
        boxes.append(_paste(ground, sprite, corners))
    return tuple(boxes)


def make_sample(
    rng: np.random.Generator,
    split: Split = "train",
    two_subjects: float = 0.27,
    without_scene: float = 0.03,
    categories: tuple[str, ...] = KINDS,
) -> Sample:
    """One text-image sample; `two_subjects` and `without_scene` are probabilities."""
    number = 2 if rng.random() < two_subjects else 1
    chosen = rng.choice(len(categories), size=number, replace=False)
    subjects = tuple(random_instance(rng, categories[i], split) for i in chosen)
    scene = SCENES[int(rng.integers(len(SCENES)))]
    ground = scene_ground(rng, scene)
    boxes = compose(rng, subjects, ground)
    forms = _TWO if number == 2 else (_NO_SCENE if rng.random() < without_scene else _ONE)
    caption = forms[int(rng.integers(len(forms)))].format(*(_Named(s.category) for s in subjects), scene=scene)
    return Sample(ground, caption, subjects, boxes, scene)


def make_reference(rng: np.random.Generator, subjects: tuple[Instance, ...], on_scene: float = 0.2) -> Image.Image:
    """The individuals once more in another view."""
    ground = reference_ground(rng, on_scene)
    compose(rng, subjects, ground, large=True)
    return ground


class SpriteWorld:
    """Samples and pairs by index: `world.sample(i)`, `world.pair(i)`.

    Args:
        seed: worlds of different seeds share no sample.
        split: "train", or "held_out" for instances that training never shows.
    """

    def __init__(self, seed: int = 0, split: Split = "train") -> None:
        self.seed = seed
        self.split = split

    def _rng(self, index: int, what: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.split == "held_out", what, index))

    def sample(self, index: int, **options) -> Sample:
        return make_sample(self._rng(index, 0), self.split, **options)

    def pair(self, index: int, *, two_subjects: float = 0.5, **options) -> ReferencePair:
        """A sample with a reference of its first or second subject, or of both in one picture (One2Many).

        Every fourth reference shows two subjects: which of them a place belongs to is the hardest to learn.
        """
        rng = self._rng(index, 1)
        sample = make_sample(rng, self.split, two_subjects=two_subjects, without_scene=0.0, **options)
        if len(sample.subjects) == 2 and rng.random() < 0.5:
            shown = sample.subjects
        else:
            shown = (sample.subjects[int(rng.integers(len(sample.subjects)))],)
        order = rng.permutation(len(shown))  # who stands left in the reference says nothing about the sample
        reference = make_reference(rng, tuple(shown[i] for i in order))
        return ReferencePair(sample, reference, tuple(s.category for s in shown))
