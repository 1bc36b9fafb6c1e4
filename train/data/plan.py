"""The plan of a step: its bucket, and which source each position of the global batch draws from.

Everything is a pure function of (seed, step). A *stream* is a source in one role: its reference is another view, or the
target image. The curriculum sets the weights of the streams at each step (Eq. 10-11). All samples of a step share one
bucket, which is drawn in proportion to the records that the streams have in it; the streams then share the batch in
proportion to their weight in this bucket. On average over the steps, every stream and every bucket thus gets exactly
its share. Each source numbers its draws per bucket, so that it goes through all its records before it repeats one.

Legend: R streams, N sources, K buckets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .order import derive_key, permute, uniforms

BLOCK = 1024  # steps that are planned together


@dataclass(frozen=True)
class Draw:
    """What one position of the batch draws: the `number`-th draw of the stream's source in the step's bucket."""

    stream: int
    number: int


class Plan:
    """The plans of all steps.

    Args:
        weights: steps [S] -> weight of each stream at each step, [S, R]; no row is 0.
        shares: distribution of each stream's records over the buckets, [R, K]; each row sums to 1.
        source_of_stream: number of the source of each stream, [R].
        batch_size: of the global batch.
        seed: of the run.
    """

    def __init__(
        self,
        weights: Callable[[np.ndarray], np.ndarray],
        shares: np.ndarray,
        source_of_stream: Sequence[int],
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        self._weights, self._shares = weights, shares
        self._sources = np.asarray(source_of_stream)
        self._batch_size, self._seed = batch_size, seed
        num_sources, num_buckets = int(self._sources.max()) + 1, shares.shape[1]
        self._drawn = [np.zeros((num_buckets, num_sources), np.int64)]  # before each block
        self._block: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None

    def bucket(self, step: int) -> int:
        """The bucket that all samples of a step share."""
        return int(self._of_block(step // BLOCK)[0][step % BLOCK])

    def draws(self, step: int) -> list[Draw]:
        """What each position of the global batch draws."""
        _, counts, first = self._of_block(step // BLOCK)
        number = first[step % BLOCK].tolist()
        draws = []
        for stream, count in enumerate(counts[step % BLOCK].tolist()):
            source = int(self._sources[stream])
            draws += [Draw(stream, number[source] + i) for i in range(count)]
            number[source] += count
        order = derive_key(self._seed, "positions", step)  # each rank's slice is a random part of the batch
        return [draws[permute(position, len(draws), order)] for position in range(len(draws))]

    def _of_block(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Buckets [BLOCK], draws per stream [BLOCK, R] and earlier draws per source [BLOCK, N] of a block of steps.

        The numbers of draws are sums over all earlier steps. They are computed once, in about a millisecond per block.
        """
        while len(self._drawn) <= block:
            self._drawn.append(self._compute(len(self._drawn) - 1)[3])
        if self._block is None or self._block[0] != block:
            self._block = (block, *self._compute(block)[:3])
        return self._block[1:]

    def _compute(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        steps = np.arange(block * BLOCK, (block + 1) * BLOCK)
        joint = self._weights(steps)[:, :, None] * self._shares  # [BLOCK, R, K]
        ends = joint.sum(1).cumsum(1)  # [BLOCK, K]
        draw = uniforms(derive_key(self._seed, "bucket"), steps) * ends[:, -1]
        buckets = (draw[:, None] >= ends).sum(1)

        # Systematic sampling: the expected number of draws is exact, the actual one is rounded up or down.
        ends = np.take_along_axis(joint, buckets[:, None, None], 2)[:, :, 0].cumsum(1)  # [BLOCK, R]
        start = uniforms(derive_key(self._seed, "streams"), steps)[:, None]
        ends = np.floor(ends / ends[:, -1:] * self._batch_size + start).astype(np.int64)
        counts = np.diff(ends, axis=1, prepend=0)

        drawn = self._drawn[block].copy()
        per_source = np.zeros((BLOCK, drawn.shape[1]), np.int64)
        np.add.at(per_source.T, self._sources, counts.T)
        first = np.empty_like(per_source)
        for bucket in np.unique(buckets):
            here = buckets == bucket
            sums = per_source[here].cumsum(0)
            first[here] = drawn[bucket] + sums - per_source[here]
            drawn[bucket] += sums[-1]
        return buckets, counts, first, drawn
