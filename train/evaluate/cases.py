"""What the evaluation asks for: held-out individuals in a scene, in each of the three tasks."""

from typing import Literal, get_args

import numpy as np
from PIL import Image

from realcustom.request import Request, Subject

from ..data.scenes import SCENES
from ..data.sprite_world import (
    KINDS,
    another_kind,
    compose,
    make_reference,
    random_instance,
    scene_ground,
    with_article,
)

Task = Literal["One2One", "One2Many", "Many2Many"]
TASKS: tuple[Task, ...] = get_args(Task)
CANDIDATES = 10
HALF = 0.56  # side of the square around one of two subjects, in sides of the picture
HALF_TOP = 0.31  # its upper edge: subjects that share a picture stand in its lower half


class Case:
    """One or two held-out individuals, a scene to put them into, and nine others of each one's kind.

    One2Many and Many2Many of an index ask for the same individuals, once from one picture of both and once from two.

    Attributes:
        categories: target words, the left subject first, as training captions name them.
        references: per subject a view of each candidate, that of the right one first.
        given: per subject the picture that the model gets; other views than the judge compares with.
        truth: what a perfect model could have made.
    """

    def __init__(self, index: int, task: Task = "One2One") -> None:
        number = 1 if task == "One2One" else 2
        rng = np.random.default_rng((6, index, number - 1))
        self.index, self.task = index, task
        self.scene = int(rng.integers(len(SCENES)))
        first = KINDS[index % len(KINDS)]
        self.categories = (first,) if number == 1 else (first, another_kind(rng, first))
        individuals = [[random_instance(rng, kind, "held_out") for _ in range(CANDIDATES)] for kind in self.categories]
        self.references = [[make_reference(rng, (one,), on_scene=0.0) for one in kin] for kin in individuals]
        right = tuple(kin[0] for kin in individuals)
        # A picture of both shows them in either order.
        given = [right[:: rng.choice([1, -1])]] if task == "One2Many" else [(one,) for one in right]
        pictures = [make_reference(rng, shown, on_scene=0.0) for shown in given]
        self.given = pictures * number if task == "One2Many" else pictures
        self.truth = scene_ground(rng, SCENES[self.scene])
        compose(rng, right, self.truth)

    @property
    def prompt(self) -> str:
        return f"{' and '.join(map(with_article, self.categories))} {SCENES[self.scene]}"

    def request(self, **settings) -> Request:
        """`settings` are those of a way to make it, see `report.WAYS`."""
        subjects = tuple(
            Subject(image=picture, target_phrase=category) for picture, category in zip(self.given, self.categories)
        )
        return Request(prompt=self.prompt, seed=self.index, **{"subjects": subjects, **settings})

    def views(self, picture: Image.Image) -> list[Image.Image]:
        """Per subject the part of a picture that should show it; a single one has all of it."""
        return [picture] if len(self.categories) == 1 else [half(picture, side) for side in range(2)]


def half(picture: Image.Image, side: int) -> Image.Image:
    """The square around the left (0) or right (1) of two subjects, as large as the picture."""
    left = side * (1 - HALF)
    box = (left, HALF_TOP, left + HALF, HALF_TOP + HALF)
    return picture.resize(
        picture.size, Image.Resampling.BICUBIC, box=tuple(b * s for b, s in zip(box, picture.size * 2))
    )
