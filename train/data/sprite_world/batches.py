"""Batches of the sprite world as numbers: loader workers draw them, and the training process renders them.

`SpriteMixture` takes the place of `Mixture` if the sprite world is the only source. No image passes between processes,
and a GPU renders the images of a batch at once (`rendered.py`).

Legend: B samples.
"""

from dataclasses import dataclass

import numpy as np

from ...curriculum import Curriculum
from ..order import derive_key, generator, uniforms
from ..transforms import reference_box
from .source import SpriteSource
from .views import PackedViews, choose_views
from .world import SampleBatch, SpriteWorld


@dataclass(frozen=True)
class SpriteBatch:
    """Training samples whose images are not rendered yet. `len()` is their number; a slice selects some of them.

    Attributes:
        numbers: of the pairs in the sprite world, int64 [B].
        images, references: what the target images and the reference images show.
        captions: the text of each sample.
        other_view: whether the reference is another view of the subject instead of the target image (Eq. 10-11), [B].
        reference_boxes: left, top, right, bottom of each reference's crop as fractions of its sides (Eq. 12-13),
            float32 [B, 4].
        subject_boxes: boxes in px of the image's subjects that the reference shows, zeros for others, int32 [B, 2, 4].
    """

    numbers: np.ndarray
    images: PackedViews
    references: PackedViews
    captions: list[str]
    other_view: np.ndarray
    reference_boxes: np.ndarray
    subject_boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, part: slice) -> "SpriteBatch":
        return SpriteBatch(
            self.numbers[part], self.images[part], self.references[part], self.captions[part], self.other_view[part],
            self.reference_boxes[part], self.subject_boxes[part],
        )  # fmt: skip


class SpriteMixture:
    """Batches of the sprite world by step; a pure function of (seed, step, position), like `Mixture`.

    Args:
        source: the pairs; every position of every step has its own.
        batch_size: of the global batch, over all ranks.
        seed: of the run.
        curriculum: probability of another view and resize ratio of the references at each step.
    Attributes:
        fingerprint: hash of everything that the samples depend on; a run can be resumed exactly only with the same one.
    """

    def __init__(self, source: SpriteSource, *, batch_size: int, seed: int, curriculum: Curriculum) -> None:
        assert source.sizes is None, "the number of pairs must be unlimited"
        self.batch_size, self.seed, self.curriculum = batch_size, seed, curriculum
        self.fingerprint = f"{derive_key(source.fingerprint, batch_size, seed, repr(curriculum)):016x}"
        self._world: SpriteWorld = source.world

    def samples(self, step: int, positions: range) -> SpriteBatch:
        """The samples at some positions of a step's global batch."""
        rows = np.arange(positions.start, positions.stop)
        numbers = step * self.batch_size + rows
        pairs = self._world.plan_pairs(numbers.tolist())
        other_view = self._other_view(step)[rows]
        return SpriteBatch(
            numbers=numbers,
            images=pairs.images,
            references=choose_views(other_view, pairs.references, pairs.images),
            captions=pairs.captions,
            other_view=other_view,
            reference_boxes=self._reference_boxes(step, rows),
            subject_boxes=pairs.images.boxes * pairs.in_reference[:, :, None],
        )

    def _other_view(self, step: int) -> np.ndarray:
        """Which positions of the global batch show another view: the curriculum's share of them, rounded at random."""
        share = self.curriculum.other_view_probability(step) * self.batch_size
        count = int(share + uniforms(derive_key(self.seed, "rounding"), np.array([step]))[0])
        return generator(self.seed, "views", step).permutation(self.batch_size) < count

    def _reference_boxes(self, step: int, rows: np.ndarray) -> np.ndarray:
        """A random crop of each reference after resizing by r in [r_min, r_cur] (Eq. 12-13)."""
        draw, down, right = (uniforms(derive_key(self.seed, name, step), rows) for name in ("ratio", "down", "right"))
        r_min, r_cur = self.curriculum.resize_ratio_bounds(step)
        ratio = r_min + (r_cur - r_min) * draw
        return np.array([reference_box(*draws) for draws in zip(ratio, down, right)], np.float32)


@dataclass(frozen=True)
class SampleMixture:
    """Captioned images of the sprite world by step, without references; every step has new ones."""

    batch_size: int
    seed: int = 0

    def samples(self, step: int, positions: range) -> SampleBatch:
        """The samples at some positions of a step's batch."""
        first = step * self.batch_size
        return SpriteWorld(self.seed).plan_samples(range(first + positions.start, first + positions.stop))
