"""The mixture of all sources: (seed, step, position) -> sample."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..curriculum import Curriculum
from .order import derive_key, generator, record_of_draw
from .plan import Draw, Plan
from .sample import BrokenRecord, Record, Sample, Size, Source
from .transforms import CropMode, crop_reference, fit, nearest_bucket, reference_box, resize_and_crop

log = logging.getLogger(__name__)

MAX_SKIPPED = 1000  # consecutive broken records after which the source counts as broken


class Mixture:
    """Samples by step and position; a pure function of (seed, step, position).

    With the curriculum's probability, the reference of a sample is another view of its subject, and the sample is drawn
    from the sources that have views. Otherwise, the reference is the target image itself. Within each of these two
    groups, sources are drawn in proportion to `weights`.

    Args:
        sources: with different names.
        weights: one positive number per source; default: equal weights.
        buckets: sizes (H, W) of the samples; one of them per step. See `transforms.aspect_buckets`.
        batch_size: of the global batch, over all ranks.
        seed: of the run.
        curriculum: probability of another view and resize ratio of the references at each step.
        reference_size: S, twice the input size of the vision encoders.
        crop: how an image that is longer than its bucket is cropped.
    Attributes:
        fingerprint: hash of everything that the samples depend on; a run can be resumed exactly only with the same one.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None = None,
        *,
        buckets: Sequence[Size],
        batch_size: int,
        seed: int,
        curriculum: Curriculum,
        reference_size: int,
        crop: CropMode = "random",
    ) -> None:
        weights = [1.0] * len(sources) if weights is None else list(weights)
        _check(sources, weights, buckets, batch_size)
        self.sources, self.curriculum, self.seed = tuple(sources), curriculum, seed
        described = [(source.name, source.fingerprint, weight) for source, weight in zip(sources, weights)]
        options = (tuple(buckets), batch_size, seed, curriculum, reference_size, crop)
        self.fingerprint = f"{derive_key(repr(described), repr(options)):016x}"
        self.batch_size, self.reference_size = batch_size, reference_size
        self.crop: CropMode = crop

        views = [i for i, source in enumerate(sources) if source.shows_views]
        originals = [i for i, source in enumerate(sources) if source.shows_originals] or views
        if not views:
            log.warning("No source has other views: every reference is the target image, without Eq. 10-11.")
        self._streams = [(i, False) for i in originals] + [(i, True) for i in views]
        assigned = [_assign_buckets(source, buckets, batch_size) for source in sources]
        self.buckets = tuple(buckets)
        self._records = [
            None if numbers is None else [np.flatnonzero(numbers == bucket) for bucket in range(len(buckets))]
            for numbers in assigned
        ]
        group = [sum(weights[i] for i in originals), sum(weights[i] for i in views)]
        relative = [weights[i] / group[other_view] for i, other_view in self._streams]
        is_view = [other_view for _, other_view in self._streams]
        self._plan = Plan(
            _StreamWeights(curriculum if views else None, np.array(is_view), np.array(relative)),
            np.stack([self._share(i) for i, _ in self._streams]),
            [i for i, _ in self._streams],
            batch_size=batch_size,
            seed=seed,
        )

    def bucket(self, step: int) -> Size:
        """H, W of all samples of a step."""
        return self.buckets[self._plan.bucket(step)]

    def sample(self, step: int, position: int) -> Sample:
        """The sample at a position of a step's global batch.

        A broken record is skipped: the next one in the order of its source takes its place, and the sample lists it.

        Raises:
            ValueError: `MAX_SKIPPED` records in a row are broken.
        """
        return self._make(step, position, self._plan.draws(step)[position])

    def samples(self, step: int, positions: range) -> list[Sample]:
        """The samples at several positions of a step's global batch."""
        draws = self._plan.draws(step)
        return [self._make(step, position, draws[position]) for position in positions]

    def _make(self, step: int, position: int, draw: Draw) -> Sample:
        source_number, other_view = self._streams[draw.stream]
        source, bucket = self.sources[source_number], self._plan.bucket(step)
        skipped: list[tuple[str, str]] = []
        while len(skipped) < MAX_SKIPPED:
            rng = generator(self.seed, "sample", step, position)
            try:
                record = self._load(source_number, bucket, draw.number + len(skipped), other_view, rng)
                return self._transform(record, bucket, step, other_view, rng, tuple(skipped))
            except BrokenRecord as broken:
                skipped.append((broken.key, broken.reason))
        raise ValueError(
            f"source {source.name!r}: {MAX_SKIPPED} records in a row are broken, the last one is {skipped[-1][0]} "
            f"({skipped[-1][1]}). Run `python -m train.data check` on its path."
        )

    def _load(self, source: int, bucket: int, number: int, other_view: bool, rng: np.random.Generator) -> Record:
        if (records := self._records[source]) is not None:
            key = derive_key(self.seed, self.sources[source].name, bucket)
            number = int(records[bucket][record_of_draw(number, len(records[bucket]), key)])
        return self.sources[source].load(number, other_view, rng)

    def _transform(
        self,
        record: Record,
        bucket_number: int,
        step: int,
        other_view: bool,
        rng: np.random.Generator,
        skipped: tuple[tuple[str, str], ...],
    ) -> Sample:
        bucket = self.buckets[bucket_number]
        down, right, flip, ratio_draw, reference_down, reference_right = rng.random(6).tolist()
        flipped = record.may_flip and flip < 0.5
        size = record.image.height, record.image.width
        resized, crop = fit(size, bucket, self.crop, (down, right))
        start = crop[0], resized[1] - bucket[1] - crop[1] if flipped else crop[1]  # in the image before mirroring
        arrays = {
            name: resize_and_crop(image, bucket, resized, start)
            for name, image in {"": record.image, **record.masks}.items()
        }
        r_min, r_cur = self.curriculum.resize_ratio_bounds(step)
        box = reference_box(r_min + (r_cur - r_min) * ratio_draw, reference_down, reference_right)
        reference = crop_reference(record.reference, box, self.reference_size)
        if flipped:
            arrays = {name: np.ascontiguousarray(values[:, ::-1]) for name, values in arrays.items()}
            reference = np.ascontiguousarray(reference[:, ::-1])
        return Sample(
            image=arrays.pop(""), caption=record.caption, target_phrase=record.target_phrase, reference=reference,
            original_size=size, crop=crop, key=record.key, other_view=other_view, flipped=flipped,
            content=record.content, reference_box=box, extras=arrays, skipped=skipped + record.skipped,
        )  # fmt: skip

    def _share(self, source: int) -> np.ndarray:
        """Distribution of a source's records over the buckets, [K]."""
        records = self._records[source]
        if records is None:  # unlimited square records
            square = np.zeros(len(self.buckets))
            square[nearest_bucket(np.ones((1, 2)), self.buckets)] = 1
            return square
        counts = np.array([len(numbers) for numbers in records], np.float64)
        return counts / counts.sum()


@dataclass(frozen=True)
class _StreamWeights:
    """Steps -> weights of the streams: the curriculum's probability of a stream's group times its part of the group."""

    curriculum: Curriculum | None  # None: there are no other views
    is_view: np.ndarray
    relative: np.ndarray

    def __call__(self, steps: np.ndarray) -> np.ndarray:
        views = np.zeros(len(steps))
        if self.curriculum is not None:
            views = np.array([self.curriculum.other_view_probability(step) for step in steps.tolist()])
        return np.where(self.is_view, views[:, None], 1 - views[:, None]) * self.relative


def _assign_buckets(source: Source, buckets: Sequence[Size], batch_size: int) -> np.ndarray | None:
    """The bucket of each record of a source; None if it is unlimited.

    A bucket with fewer records than a batch would repeat images within one step; its records go to the nearest bucket
    that has enough.
    """
    if source.sizes is None:
        return None
    counts = np.bincount(nearest_bucket(source.sizes, buckets), minlength=len(buckets))
    large: np.ndarray = np.flatnonzero(counts >= min(batch_size, counts.max()))
    if moved := int(counts.sum() - counts[large].sum()):
        log.info("%s: %d records of rare aspect ratios use the nearest frequent bucket.", source.name, moved)
    return large[nearest_bucket(source.sizes, [buckets[i] for i in large.tolist()])]


def _check(sources: Sequence[Source], weights: Sequence[float], buckets: Sequence[Size], batch_size: int) -> None:
    names = [source.name for source in sources]
    if not sources or len(set(names)) < len(names):
        raise ValueError(f"the sources are {names}; give at least one source, and each its own name.")
    if len(weights) != len(sources) or not all(weight > 0 for weight in weights):
        raise ValueError(f"weights are {list(weights)} for the sources {names}; give one positive number per source.")
    if not buckets or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size} and buckets are {buckets}; both need at least 1.")
    for source in sources:
        if source.sizes is not None and not len(source.sizes):
            raise ValueError(f"source {source.name!r} has no usable record; run `python -m train.data check` on it.")
