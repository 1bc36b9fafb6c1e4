"""The sprite world: an unlimited set of captioned images and reference pairs, each determined by its index.

A sample shows one or two instances (`Instance`) in a scene, and its caption names them and the scene. A reference shows
the same instances in another view. The same index gives the same sample on every machine.

Everything here only draws random numbers. Images are rendered when they are needed, by `renderer`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image

from .scenes import NUM_VARIANTS, SCENES
from .sprites import HELD_OUT, TRAINED, Instance
from .views import DRAWS_PER_SUBJECT, NUM_SLOTS, Background, PackedViews, View, pack_views

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
        view: what the image shows.
        caption: names the subjects from left to right, and usually the scene.
        scene: one of `SCENES`.
    """

    view: View
    caption: str
    scene: str

    @property
    def subjects(self) -> tuple[Instance, ...]:
        """The instances, from left to right."""
        return self.view.subjects

    @cached_property
    def image(self) -> Image.Image:
        """RGB, 128 x 128 px."""
        return render_views([self.view])[0]

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """Bounding box of each subject."""
        return tuple(map(tuple, pack_views([self.view]).boxes[0, : len(self.subjects)].tolist()))


@dataclass(frozen=True)
class ReferencePair:
    """A sample, a view of some of its subjects, and the caption's words for these subjects."""

    sample: Sample
    reference_view: View
    target_phrases: tuple[str, ...]

    @cached_property
    def reference(self) -> Image.Image:
        """The reference image, RGB, 128 x 128 px."""
        return render_views([self.reference_view])[0]


@dataclass(frozen=True, eq=False)
class SampleBatch:
    """Samples whose images are not rendered yet: `Renderer.render(batch.images)` renders them.

    Attributes:
        images: what the B images show, with the boxes, categories and numbers of their subjects from left to right.
        captions: the caption of each sample.
    """

    images: PackedViews
    captions: list[str]


@dataclass(frozen=True, eq=False)
class PairBatch(SampleBatch):
    """Reference pairs whose images are not rendered yet.

    Attributes:
        references: what the B references show. Their subjects are in random order.
        target_phrases: the caption's words for the subjects of each reference.
        in_reference: which subjects of the image the reference shows, bool [B, 2].
    """

    references: PackedViews
    target_phrases: list[tuple[str, ...]]
    in_reference: np.ndarray


def render_views(views: PackedViews | Sequence[View]) -> list[Image.Image]:
    """Render views on the CPU as RGB images, 128 x 128 px."""
    from .renderer import cpu_renderer  # imports torch, which drawing random numbers does not need

    packed = views if isinstance(views, PackedViews) else pack_views(views)
    return [Image.fromarray(pixels) for pixels in cpu_renderer().render(packed).permute(0, 2, 3, 1).numpy()]


def random_instance(rng: np.random.Generator, category: str, split: Split = "train") -> Instance:
    """A random instance of a category."""
    first = 0 if split == "train" else HELD_OUT
    return Instance(category, first + int(rng.integers(0, NUM_TRAINED_INSTANCES)))


def another_category(rng: np.random.Generator, category: str) -> str:
    """A random trained category other than `category`."""
    return str(rng.choice([other for other in TRAINED_CATEGORIES if other != category]))


def scene_background(rng: np.random.Generator, scene: int) -> Background:
    """A random variant of the scene with this number in `SCENES`."""
    return Background(scene * NUM_VARIANTS + int(rng.integers(NUM_VARIANTS)), flipped=rng.random() < 0.5)


def reference_background(rng: np.random.Generator, on_scene: float = 0.2) -> Background:
    """The background of a reference: a random scene with probability `on_scene`, otherwise a single light color."""
    if rng.random() < on_scene:
        return scene_background(rng, int(rng.integers(len(SCENES))))
    red, green, blue = rng.integers(150, 256, 3).tolist()
    return Background(-1, color=(red, green, blue))


def compose(
    rng: np.random.Generator, subjects: tuple[Instance, ...], background: Background, large: bool = False
) -> View:
    """A view of one or two subjects side by side in random poses.

    Args:
        large: a single subject fills most of the image, as in references.
    """
    return View(background, subjects, tuple(rng.random(len(subjects) * DRAWS_PER_SUBJECT).tolist()), large)


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
    chosen = rng.choice(len(categories), size=num_subjects, replace=False).tolist()
    subjects = tuple(random_instance(rng, categories[i], split) for i in chosen)
    scene = int(rng.integers(len(SCENES)))
    view = compose(rng, subjects, scene_background(rng, scene))
    templates = _TWO if num_subjects == 2 else (_NO_SCENE if rng.random() < without_scene else _ONE)
    template = templates[int(rng.integers(len(templates)))]
    caption = template.format(*(_Noun(s.category) for s in subjects), scene=SCENES[scene])
    return Sample(view, caption, SCENES[scene])


def make_reference(rng: np.random.Generator, subjects: tuple[Instance, ...], on_scene: float = 0.2) -> View:
    """A random view of the subjects on a reference background."""
    background = reference_background(rng, on_scene)
    return compose(rng, subjects, background, large=True)


class SpriteWorld:
    """Samples and reference pairs by index: one, `world.sample(i)`, or many, `world.plan_samples(indices)`.

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
        reference = make_reference(rng, tuple(shown[i] for i in order.tolist()))
        return ReferencePair(sample, reference, tuple(s.category for s in shown))

    def plan_samples(self, indices: Iterable[int], **options) -> SampleBatch:
        """The samples of indices, without rendering them; `options` are those of `sample`."""
        samples = [self.sample(i, **options) for i in indices]
        return SampleBatch(pack_views([s.view for s in samples]), [s.caption for s in samples])

    def plan_pairs(self, indices: Iterable[int], **options) -> PairBatch:
        """The pairs of indices, without rendering them; `options` are those of `pair`."""
        pairs = [self.pair(i, **options) for i in indices]
        packed = pack_views([p.sample.view for p in pairs] + [p.reference_view for p in pairs])
        in_reference = np.zeros((len(pairs), NUM_SLOTS), bool)
        for row, pair in zip(in_reference, pairs):
            for slot, subject in enumerate(pair.sample.subjects):
                row[slot] = subject.category in pair.target_phrases
        return PairBatch(
            images=packed[: len(pairs)],
            captions=[p.sample.caption for p in pairs],
            references=packed[len(pairs) :],
            target_phrases=[p.target_phrases for p in pairs],
            in_reference=in_reference,
        )
