"""Compute the features of a run's samples in advance: `python -m train.data precompute RECIPE --out FOLDER`.

The samples of a run are a function of (seed, step), so the features that it will need are known. Samples of several
epochs share a feature if they share image, size and crop.
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..arguments import ensure_writable
from .features import FeatureStore
from .kinds import NAMES, Kind
from .loader import batches
from .mixture import Mixture
from .sample import Sample
from .sidecar import write_atomically

log = logging.getLogger(__name__)

FILE_BYTES = 1 << 28  # size at which a file is written

Encode = Callable[[Sequence[Sample]], Sequence[tuple[Tensor, ...]]]


@dataclass
class Summary:
    """What `precompute` has done: number of new and of already stored features by kind, and bytes written."""

    new: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    written_bytes: int = 0

    def __str__(self) -> str:
        parts = [f"{kind}: {self.new[kind]} new, {self.found[kind]} found" for kind in self.new | self.found]
        return f"{'; '.join(parts) or 'nothing to do'}; {self.written_bytes / 1e6:.1f} MB written"


def precompute(
    mixture: Mixture,
    store: FeatureStore,
    encoders: dict[Kind, Encode],
    *,
    num_steps: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    encode_size: int = 16,
) -> Summary:
    """Store the features of the first `num_steps` steps of a mixture.

    An interrupted call is continued by the next one with the same mixture and encoders.

    Args:
        encoders: kinds to store, and the function that encodes samples of one bucket: per sample, the tensors `NAMES`.
        rank, world_size: process a part of each step, so that several processes share the work and the folder.
        workers: see `batches`.
        encode_size: number of samples that are encoded together.
    Raises:
        ValueError: the features need more space than the disk has.
    """
    summary, pending = Summary(), {}
    progress = _Progress(store, mixture, tuple(encoders), rank, world_size)
    first = progress.read()
    if first:
        log.info("Continuing at step %d.", first)

    def write(next_step: int) -> None:
        if pending:
            summary.written_bytes += store.write(pending).stat().st_size
            pending.clear()
        progress.write(next_step)

    steps = batches(
        mixture, first_step=min(first, num_steps), last_step=num_steps, rank=rank, world_size=world_size,
        workers=workers,
    )  # fmt: skip
    with closing(steps):
        for step, samples in steps:
            for kind, encode in encoders.items():
                new = _missing(store, kind, samples, pending, summary)
                keys = list(new)
                for start in range(0, len(keys), encode_size):
                    part = keys[start : start + encode_size]
                    for key, tensors in zip(part, encode([new[key] for key in part]), strict=True):
                        named = zip(NAMES[kind], tensors)  # SD1.5 has no pooled text
                        pending.update({f"{key}.{name}": tensor.cpu() for name, tensor in named})
            size = sum(tensor.nbytes for tensor in pending.values())
            if step == first:
                _check_space(store.folder, size, num_steps - first)
            if size >= FILE_BYTES:
                write(step + 1)
    write(max(first, num_steps))
    return summary


def create_folder(folder: Path) -> None:
    """Create the folder of the features.

    Raises:
        ValueError: it cannot be created or written to.
    """
    try:
        ensure_writable(folder)
    except OSError as error:
        raise ValueError(
            f"--out is {folder}, which is not a folder that can be written to ({error}); choose another one."
        ) from error


def _missing(
    store: FeatureStore, kind: Kind, samples: Sequence[Sample], pending: dict[str, Tensor], summary: Summary
) -> dict[str, Sample]:
    """Key -> a sample, for the features that are neither stored nor about to be stored."""
    missing: dict[str, Sample] = {}
    for sample in samples:
        key = store.key(kind, sample)
        if key is None or key in missing:
            continue
        if store.contains(kind, key) or f"{key}.{NAMES[kind][0]}" in pending:
            summary.found[kind] += 1
        else:
            missing[key] = sample
    summary.new[kind] += len(missing)
    return missing


@dataclass(frozen=True)
class _Progress:
    """The step at which an interrupted call continues; stored in the folder of the features."""

    store: FeatureStore
    mixture: Mixture
    kinds: tuple[Kind, ...]
    rank: int
    world_size: int

    @property
    def _path(self) -> Path:
        return self.store.folder / f"progress-{self.rank}-of-{self.world_size}.json"

    @property
    def _identity(self) -> list:
        return [self.mixture.fingerprint, {kind: self.store.revision(kind) for kind in self.kinds}]

    def read(self) -> int:
        if not self._path.is_file():
            return 0
        try:
            stored = json.loads(self._path.read_text())
            complete = len(self.store) >= stored["num_tensors"]  # no file was removed or damaged since
            return int(stored["next_step"]) if complete and stored["identity"] == self._identity else 0
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%r); starting at step 0.", self._path, error)
            return 0

    def write(self, next_step: int) -> None:
        self.store.folder.mkdir(parents=True, exist_ok=True)
        content = {"identity": self._identity, "next_step": next_step, "num_tensors": len(self.store)}
        write_atomically(self._path, json.dumps(content).encode())


def _check_space(folder: Path, bytes_per_step: int, num_steps: int) -> None:
    """Compare the space that all steps need, if no feature is shared, with the space that is left."""
    needed, free = bytes_per_step * num_steps, shutil.disk_usage(_existing(folder)).free
    log.info("%d steps need up to %.1f GB; %.1f GB are free.", num_steps, needed / 1e9, free / 1e9)
    if needed > free:
        raise ValueError(
            f"{num_steps} steps need up to {needed / 1e9:.1f} GB in {folder}, but {free / 1e9:.1f} GB are free; use "
            "fewer steps, fewer kinds (vision features are by far the largest), or another folder."
        )


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)
