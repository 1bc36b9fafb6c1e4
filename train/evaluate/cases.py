"""Evaluation cases: held-out instances in a scene, for each of the three tasks."""

from typing import Literal, get_args

import numpy as np
from PIL import Image

from realcustom.request import Request, Subject

from ..data.sprite_world.scenes import SCENES
from ..data.sprite_world.world import (
    TRAINED_CATEGORIES,
    another_category,
    compose,
    make_reference,
    random_instance,
    render_views,
    scene_background,
    with_article,
)

Task = Literal["One2One", "One2Many", "Many2Many"]
TASKS: tuple[Task, ...] = get_args(Task)
NUM_CANDIDATES = 10  # the correct instance and nine same-category distractors
# The square that shows one of two subjects, as fractions of the image side. Two subjects are in the lower half.
CROP_SIDE = 0.56
CROP_TOP = 0.31


class Case:
    """One or two held-out instances to generate in a scene, and nine same-category distractors for each.

    One2Many and Many2Many cases of the same index have the same instances. One2Many gives one image of both, Many2Many
    one image of each.

    Attributes:
        categories: target words, from left to right, in the order of training captions.
        references: per subject, one image of each candidate; the correct instance comes first.
        given: per subject, the reference image for the model. It differs from the images in `references`.
        cropped: per subject, `given` or, with One2Many, its part that shows the subject.
        truth: a rendered image of the instances in the scene.
    """

    def __init__(self, index: int, task: Task = "One2One") -> None:
        num_subjects = 1 if task == "One2One" else 2
        rng = np.random.default_rng((6, index, num_subjects - 1))
        self.index, self.task = index, task
        self.scene = int(rng.integers(len(SCENES)))
        first = TRAINED_CATEGORIES[index % len(TRAINED_CATEGORIES)]
        self.categories = (first,) if num_subjects == 1 else (first, another_category(rng, first))
        candidates = [
            [random_instance(rng, category, "held_out") for _ in range(NUM_CANDIDATES)] for category in self.categories
        ]
        views = [make_reference(rng, (instance,), on_scene=0.0) for instances in candidates for instance in instances]
        right = tuple(instances[0] for instances in candidates)
        # An image of both instances shows them in random order; `sides` are their places in it.
        sides = (0, 1)[:: rng.choice([1, -1])] if task == "One2Many" else ()
        shown = [tuple(right[side] for side in sides)] if sides else [(instance,) for instance in right]
        views += [make_reference(rng, instances, on_scene=0.0) for instances in shown]
        views.append(compose(rng, right, scene_background(rng, self.scene)))
        images = iter(render_views(views))
        self.references = [[next(images) for _ in instances] for instances in candidates]
        given = [next(images) for _ in shown]
        self.given = given * num_subjects if sides else given
        self.cropped = [crop_subject(given[0], side) for side in sides] if sides else given
        self.truth = next(images)

    @property
    def prompt(self) -> str:
        return f"{' and '.join(map(with_article, self.categories))} {SCENES[self.scene]}"

    def request(self, cropped: bool = False, **settings) -> Request:
        """The request for this case. `settings` are those of a condition, see `report.CONDITIONS`."""
        images = self.cropped if cropped else self.given
        subjects = tuple(
            Subject(image=image, target_phrase=category) for image, category in zip(images, self.categories)
        )
        return Request(prompt=self.prompt, seed=self.index, **{"subjects": subjects, **settings})

    def views(self, image: Image.Image) -> list[Image.Image]:
        """Per subject, the part of an image that should show it. For a single subject, the complete image."""
        return [image] if len(self.categories) == 1 else [crop_subject(image, side) for side in range(2)]


def crop_subject(image: Image.Image, side: int) -> Image.Image:
    """The square that shows the left (0) or right (1) of two subjects, resized to the size of the image."""
    left = side * (1 - CROP_SIDE)
    fractions = (left, CROP_TOP, left + CROP_SIDE, CROP_TOP + CROP_SIDE)
    x0, y0, x1, y1 = (fraction * side_px for fraction, side_px in zip(fractions, image.size * 2))
    return image.resize(image.size, Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))
