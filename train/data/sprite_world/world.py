"""The sprite world: an unlimited set of captioned images and reference pairs, each determined by its index.

A sample shows one or two instances (`Instance`) in a scene, and its caption names them and the scene. A reference shows
the same instances in another view. The same index gives the same sample on every machine.
"""

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from PIL import Image

from .scenes import NUM_VARIANTS, SCENE_SIZE, SCENES, draw_scene
from .sprites import HELD_OUT, TRAINED, Instance, draw_instance

TRAINED_CATEGORIES = tuple(TRAINED)
NUM_TRAINED_INSTANCES = 20_000  # per category
Split = Literal["train", "held_out"]
Box = tuple[int, int, int, int]  # left, top, right, bottom in px

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
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


class _Noun(str):
    """A noun for caption templates: `{0}` formats with the article, `{0.noun}` without."""

    @property
    def noun(self) -> str:
        return str.__str__(self)

    def __format__(self, spec: str) -> str:
        return with_article(self.noun)


@dataclass(frozen=True)
class Sample:
    """A captioned image.

    Attributes:
        image: RGB, 128 x 128 px.
        caption: names the subjects from left to right, and usually the scene.
        subjects: the instances, from left to right.
        boxes: bounding box of each subject.
        scene: one of `SCENES`.
    """

    image: Image.Image
    caption: str
    subjects: tuple[Instance, ...]
    boxes: tuple[Box, ...]
    scene: str


@dataclass(frozen=True)
class ReferencePair:
    """A sample, a reference image of some of its subjects, and the caption's words for these subjects."""

    sample: Sample
    reference: Image.Image
    target_phrases: tuple[str, ...]


def random_instance(rng: np.random.Generator, category: str, split: Split = "train") -> Instance:
    """A random instance of a category."""
    first = 0 if split == "train" else HELD_OUT
    return Instance(category, first + int(rng.integers(0, NUM_TRAINED_INSTANCES)))


def another_category(rng: np.random.Generator, category: str) -> str:
    """A random trained category other than `category`."""
    return str(rng.choice([other for other in TRAINED_CATEGORIES if other != category]))


def _random_corners(
    rng: np.random.Generator, sprite: Image.Image, height: float, center: tuple[float, float], max_width: float
) -> np.ndarray:
    """Corners of a sprite in the image after a random perspective, rotation, mirroring and aspect; float64 [4, 2]."""
    sprite_width, sprite_height = sprite.size
    scale = height / sprite_height * np.array([rng.uniform(0.88, 1.14), 1.0])
    scale *= min(1.0, max_width / (sprite_width * scale[0]))
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (sprite_width / 2, sprite_height / 2) * scale
    corners *= 1 + rng.uniform(-0.07, 0.07, (4, 2))
    angle = rng.uniform(-0.35, 0.35)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    corners = corners @ rotation
    if rng.random() < 0.5:
        corners[:, 0] *= -1
    return corners + center


def _perspective(corners: np.ndarray, size: tuple[int, int]) -> list[float]:
    """PIL's perspective coefficients, which map positions in the image to positions in the sprite."""
    width, height = size
    rows, values = [], []
    for (x, y), (u, v) in zip(corners, ((0, 0), (width, 0), (width, height), (0, height))):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(np.array(rows), np.array(values, float)).tolist()


def _paste(image: Image.Image, sprite: Image.Image, corners: np.ndarray) -> Box:
    """Draw the sprite into the image and return its bounding box, clipped to the image."""
    left, top = (max(0, int(side)) for side in np.floor(corners.min(0)))
    right, bottom = (min(limit, int(side)) for limit, side in zip(image.size, np.ceil(corners.max(0))))
    coefficients = _perspective(corners - (left, top), sprite.size)
    view = sprite.transform(
        (right - left, bottom - top), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR
    )
    image.paste(view, (left, top), view)
    return left, top, right, bottom


def scene_background(rng: np.random.Generator, scene: str) -> Image.Image:
    """A random variant of a scene, without subjects."""
    background = draw_scene(scene, int(rng.integers(NUM_VARIANTS)))
    return background.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else background.copy()


def reference_background(rng: np.random.Generator, on_scene: float = 0.2) -> Image.Image:
    """The background of a reference: a random scene with probability `on_scene`, otherwise a single light color."""
    if rng.random() < on_scene:
        return scene_background(rng, SCENES[int(rng.integers(len(SCENES)))])
    color = cast(tuple[int, int, int], tuple(rng.integers(150, 256, 3).tolist()))
    return Image.new("RGB", (SCENE_SIZE, SCENE_SIZE), color)


def compose(
    rng: np.random.Generator, subjects: tuple[Instance, ...], background: Image.Image, large: bool = False
) -> tuple[Box, ...]:
    """Draw one or two subjects side by side on `background`, in place, and return their bounding boxes.

    Args:
        large: a single subject fills most of the image, as in references.
    """
    boxes = []
    for i, subject in enumerate(subjects):
        sprite = draw_instance(subject)
        if len(subjects) == 1:
            height = rng.uniform(0.72, 0.92) if large else rng.uniform(0.5, 0.8)
            margin = 0.5 - height / 2
            x, y = 0.5 + rng.uniform(-margin, margin) * 0.9, 0.5 + margin * rng.uniform(-0.2, 0.8)
            max_width = 0.95
        else:
            height = rng.uniform(0.42, 0.56)
            x, y = (0.27, 0.73)[i] + rng.uniform(-0.03, 0.03), rng.uniform(0.5, 0.68)
            max_width = 0.46
        center = (x * SCENE_SIZE, y * SCENE_SIZE)
        corners = _random_corners(rng, sprite, height * SCENE_SIZE, center, max_width * SCENE_SIZE)
        boxes.append(_paste(background, sprite, corners))
    return tuple(boxes)


def make_sample(
    rng: np.random.Generator,
    split: Split = "train",
    two_subjects: float = 0.27,
    without_scene: float = 0.03,
    categories: tuple[str, ...] = TRAINED_CATEGORIES,
) -> Sample:
    """A random captioned image.

    Args:
        two_subjects: probability of two subjects.
        without_scene: probability that the caption of a single subject does not name the scene.
        categories: categories to choose from.
    """
    num_subjects = 2 if rng.random() < two_subjects else 1
    chosen = rng.choice(len(categories), size=num_subjects, replace=False)
    subjects = tuple(random_instance(rng, categories[i], split) for i in chosen)
    scene = SCENES[int(rng.integers(len(SCENES)))]
    image = scene_background(rng, scene)
    boxes = compose(rng, subjects, image)
    templates = _TWO if num_subjects == 2 else (_NO_SCENE if rng.random() < without_scene else _ONE)
    template = templates[int(rng.integers(len(templates)))]
    caption = template.format(*(_Noun(s.category) for s in subjects), scene=scene)
    return Sample(image, caption, subjects, boxes, scene)


def make_reference(rng: np.random.Generator, subjects: tuple[Instance, ...], on_scene: float = 0.2) -> Image.Image:
    """A random view of the subjects on a reference background."""
    image = reference_background(rng, on_scene)
    compose(rng, subjects, image, large=True)
    return image


class SpriteWorld:
    """Samples and reference pairs by index: `world.sample(i)`, `world.pair(i)`.

    Args:
        seed: worlds with different seeds share no sample.
        split: "train", or "held_out" for instances that training never uses.
    """

    def __init__(self, seed: int = 0, split: Split = "train") -> None:
        self.seed = seed
        self.split: Split = split

    def generator(self, index: int, stream: int) -> np.random.Generator:
        """The random generator of an index. Streams: 0 samples, 1 pairs, 2 views for the vision encoders."""
        return np.random.default_rng((self.seed, self.split == "held_out", stream, index))

    def sample(self, index: int, **options) -> Sample:
        """The sample of an index; `options` are those of `make_sample`."""
        return make_sample(self.generator(index, 0), self.split, **options)

    def pair(self, index: int, *, two_subjects: float = 0.5, **options) -> ReferencePair:
        """A sample with a reference of its first subject, its second subject, or both in one image (One2Many).

        By default, a quarter of the references show both subjects, because assigning positions to the correct one of
        two subjects is the hardest part of the task.
        """
        rng = self.generator(index, 1)
        sample = make_sample(rng, self.split, two_subjects=two_subjects, without_scene=0.0, **options)
        if len(sample.subjects) == 2 and rng.random() < 0.5:
            shown = sample.subjects
        else:
            shown = (sample.subjects[int(rng.integers(len(sample.subjects)))],)
        order = rng.permutation(len(shown))  # the order in the reference must not reveal the order in the sample
        reference = make_reference(rng, tuple(shown[i] for i in order))
        return ReferencePair(sample, reference, tuple(s.category for s in shown))
