"""A ring of precomputed samples that is refreshed while training, so that small sets are not memorised.

Slot i holds the newest sample index j with j mod capacity = i. What it holds at a step follows from the step alone, so
a resumed run sees the same pool; entries live in memory-mapped files and only missing ones are made again.
"""

import logging
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

Entry = dict[str, np.ndarray]  # field -> [n, ...]
CHUNK = 64  # samples that are rendered, encoded and stored together
PROCESSES = 2


class SamplePool:
    """Args:
    folder: where the files live.
    fields: name -> (shape, dtype) of one sample.
    render: sample indices -> raw fields of these samples, in worker processes (a picklable function).
    encode: raw fields -> the stored fields; runs in this process (None: as they are).
    start, capacity, per_step: filled before step 0; most kept; fresh ones per step.
    """

    def __init__(
        self,
        folder: Path,
        fields: dict[str, tuple[tuple[int, ...], str]],
        render: Callable[[Sequence[int]], Entry],
        encode: Callable[[Entry], Entry] | None = None,
        *,
        start: int,
        capacity: int,
        per_step: int,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.render, self.encode = render, encode
        self.start, self.capacity, self.per_step = min(start, capacity), capacity, per_step
        kept = {
            name: _reopen(folder / f"{name}.npy", (capacity, *shape), dtype) for name, (shape, dtype) in fields.items()
        }
        kept["index"] = _reopen(folder / "index.npy", (capacity,), "int64")
        if any(array is None for array in kept.values()):  # files of another layout: begin anew
            kept = {
                name: _create(folder / f"{name}.npy", (capacity, *shape), dtype)
                for name, (shape, dtype) in {**fields, "index": ((), "int64")}.items()
            }
        self.index = kept.pop("index")  # sample index + 1; 0 is empty
        self.arrays = kept

    def _last(self, step: int) -> int:
        """One past the newest sample index at a step."""
        return self.start + self.per_step * step

    def _store(self, indices: Sequence[int], entry: Entry) -> None:
        entry = self.encode(entry) if self.encode is not None else entry
        slots = np.asarray(indices) % self.capacity
        for name, values in entry.items():
            self.arrays[name][slots] = values
        self.index[slots] = np.asarray(indices) + 1

    def refresh(self, step: int) -> None:
        """Bring the pool to what it must hold at `step`: the step's own fresh samples, or, after a start or restart,
        whatever is missing, which is made by several processes."""
        last = self._last(step)
        wanted = np.arange(max(0, last - self.capacity), last)
        missing = wanted[self.index[wanted % self.capacity] != wanted + 1].tolist()
        chunks = [missing[i : i + CHUNK] for i in range(0, len(missing), CHUNK)]
        if len(chunks) == 1:
            self._store(missing, self.render(missing))
        elif chunks:
            log.info("rendering %d samples", len(missing))
            with get_context("spawn").Pool(PROCESSES) as workers:
                for indices, entry in zip(chunks, workers.imap(self.render, chunks)):
                    self._store(indices, entry)

    def batch(self, step: int, draws: np.ndarray) -> Entry:
        """Entries picked by `draws`, numbers in [0, 1), out of what the pool holds at `step`."""
        last = self._last(step)
        held = min(last, self.capacity)
        slots = (last - 1 - (draws * held).astype(np.int64)) % self.capacity
        return {name: np.asarray(values[slots]) for name, values in self.arrays.items()}

    def groups(self, step: int, draws: np.ndarray, size: int) -> Entry:
        """Whole groups of `size` neighbours (sample indices k * size and on), picked by `draws`."""
        last = self._last(step)
        first = -(-max(0, last - self.capacity) // size)
        chosen = first + (draws * (last // size - first)).astype(np.int64)
        slots = (chosen[:, None] * size + np.arange(size)).reshape(-1) % self.capacity
        return {name: np.asarray(values[slots]) for name, values in self.arrays.items()}


def _reopen(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray | None:
    """The file as it is, or None if it is missing or of another layout."""
    if not path.exists():
        return None
    existing = np.lib.format.open_memmap(path, mode="r+")
    return existing if existing.shape == shape and existing.dtype == np.dtype(dtype) else None


def _create(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
