"""A pool of precomputed samples that is refreshed during training, so that a small set is not memorized.

The pool is a ring buffer: slot i holds the newest sample index j with j mod capacity = i. Its contents at a step depend
only on the step, so a resumed run uses the same samples. Entries are stored in memory-mapped files; only missing ones
are rendered.
"""

import errno
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

Entry = dict[str, np.ndarray]  # field -> [n, ...]
CHUNK = 64  # samples that are rendered, encoded and stored together
NUM_PROCESSES = 2


class SamplePool:
    """A ring buffer of samples on disk.

    Args:
        folder: folder of the memory-mapped files.
        fields: name -> (shape, dtype) of one sample.
        render: sample indices -> raw fields of these samples. Must be picklable: it may run in worker processes.
        encode: raw fields -> stored fields; runs in this process. None stores the raw fields.
        start: number of samples before step 0.
        capacity: maximum number of samples.
        per_step: new samples per step.
    Raises:
        ValueError: the disk has too little space for `capacity` samples.
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
        shapes = {name: ((capacity, *shape), dtype) for name, (shape, dtype) in fields.items()}
        shapes["index"] = ((capacity,), "int64")
        paths = {name: folder / f"{name}.npy" for name in shapes}
        arrays = {name: _reopen(paths[name], *shapes[name]) for name in shapes}
        if any(array is None for array in arrays.values()):  # missing, or of another layout
            arrays = {name: _create(paths[name], *shapes[name]) for name in shapes}
        _reserve(folder, list(paths.values()))
        self.arrays = {name: array for name, array in arrays.items() if array is not None}
        self.index = self.arrays.pop("index")  # sample index + 1; 0 marks an empty slot

    def refresh(self, step: int) -> None:
        """Render the samples that the pool must hold at `step` and does not hold yet.

        During training these are the `per_step` new samples of the step. After a start or restart there are more, and
        several processes render them.
        """
        end = self._end(step)
        wanted = np.arange(max(0, end - self.capacity), end)
        missing = wanted[self.index[wanted % self.capacity] != wanted + 1].tolist()
        chunks = [missing[i : i + CHUNK] for i in range(0, len(missing), CHUNK)]
        if len(chunks) == 1:
            self._store(missing, self.render(missing))
        elif chunks:
            log.info("Rendering %d samples.", len(missing))
            workers = ProcessPoolExecutor(NUM_PROCESSES, get_context("spawn"), initializer=_start_worker)
            try:
                for indices, entry in zip(chunks, workers.map(self.render, chunks)):
                    self._store(indices, entry)
            finally:  # if a signal ends the run, wait only for the chunks in progress
                workers.shutdown(cancel_futures=True)

    def batch(self, step: int, draws: np.ndarray) -> Entry:
        """Entries of the pool at `step`, selected by `draws`: one number in [0, 1) per entry."""
        end = self._end(step)
        available = min(end, self.capacity)
        slots = (end - 1 - (draws * available).astype(np.int64)) % self.capacity
        return {name: np.asarray(values[slots]) for name, values in self.arrays.items()}

    def groups(self, step: int, draws: np.ndarray, size: int) -> Entry:
        """Groups of `size` consecutive samples, aligned to multiples of `size` and selected by `draws`."""
        end = self._end(step)
        first = -(-max(0, end - self.capacity) // size)
        chosen = first + (draws * (end // size - first)).astype(np.int64)
        slots = (chosen[:, None] * size + np.arange(size)).reshape(-1) % self.capacity
        return {name: np.asarray(values[slots]) for name, values in self.arrays.items()}

    def _end(self, step: int) -> int:
        """One past the newest sample index at a step."""
        return self.start + self.per_step * step

    def _store(self, indices: Sequence[int], entry: Entry) -> None:
        entry = self.encode(entry) if self.encode is not None else entry
        slots = np.asarray(indices) % self.capacity
        for name, values in entry.items():
            self.arrays[name][slots] = values
        self.index[slots] = np.asarray(indices) + 1


def _start_worker() -> None:
    """Leave signals to the main process, which ends the workers, and end with it if it is killed. Use one CPU core."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"  # read when rendering imports torch


def _reopen(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray | None:
    """The existing file, or None if it is missing, damaged or has another layout."""
    if not path.exists():
        return None
    try:
        existing = np.lib.format.open_memmap(path, mode="r+")
    except ValueError as error:  # for example an empty file after a power failure
        log.warning("%s is damaged (%s); its samples are rendered again.", path, error)
        return None
    return existing if existing.shape == shape and existing.dtype == np.dtype(dtype) else None


def _create(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def _reserve(folder: Path, paths: Sequence[Path]) -> None:
    """Allocate the disk space of the files, which are sparse when they are new.

    Otherwise, if the disk becomes full, the next write to a mapped file ends the process with SIGBUS.

    Raises:
        ValueError: the disk has too little space.
    """
    needed = sum(max(0, status.st_size - 512 * status.st_blocks) for status in map(os.stat, paths))
    free = shutil.disk_usage(folder).free
    full = ValueError(
        f"the samples need another {needed / 1e6:.0f} MB in {folder}, but {free / 1e6:.0f} MB are free; free space, or "
        "choose a folder on another disk with --out."
    )
    if needed > free:
        raise full
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        for path in paths:
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise full from error
