"""The sprite world as a source of training samples: pairs that are rendered on demand."""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from PIL import Image

from ..sample import Record
from .scenes import SCENE_SIZE
from .views import pack_views
from .world import Split, SpriteWorld, render_views


class SpriteSource:
    """Pairs of the sprite world by number; see `Source`.

    Records have the mask "inside": the boxes of the subjects that the target phrase names.

    Args:
        seed: worlds with different seeds share no sample.
        split: "train", or "held_out" for instances that training never uses.
        num_records: number of distinct pairs; None for an unlimited number.
        name: prefix of the keys.
    """

    shows_views = True
    shows_originals = True

    def __init__(
        self, seed: int = 2, split: Split = "train", *, num_records: int | None = None, name: str = "sprites"
    ) -> None:
        self.name = name
        self.sizes = None if num_records is None else np.full((num_records, 2), SCENE_SIZE)
        self.fingerprint = f"{seed} {split} {num_records}"
        self.world = SpriteWorld(seed, split)

    def load(self, number: int, other_view: bool, rng: np.random.Generator) -> Record:
        """Pair `number`. If the reference shows two subjects, the target phrase names the first. `rng` is not used."""
        pair = self.world.pair(number)
        sample = pair.sample
        views = pack_views([sample.view, pair.reference_view])
        image, reference = render_views(views) if other_view else render_views(views[:1]) * 2
        boxes = zip(sample.subjects, views.boxes[0].tolist())
        return Record(
            image=image,
            reference=reference,
            content=(_content(image), _content(reference)),
            caption=sample.caption,
            target_phrase=pair.target_phrases[0],
            key=f"{self.name}:{number}",
            masks={"inside": _inside([box for s, box in boxes if s.category in pair.target_phrases])},
        )


def _content(image: Image.Image) -> str:
    return blake2b(image.tobytes(), digest_size=16).hexdigest()


def _inside(boxes: Sequence[Sequence[int]]) -> Image.Image:
    """A mask of the scene's size that is 1 inside the boxes."""
    mask = np.zeros((SCENE_SIZE, SCENE_SIZE), np.uint8)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = 1
    return Image.fromarray(mask)
