"""Report on a source: what it contains, and what is broken, by reason. Every image is decoded."""

import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from .decode import Limits
from .index import Findings
from .multiview import MultiviewSource, has_views
from .overlap import EvaluationImages, find_identical
from .sample import REASONS, BrokenRecord
from .text_image import TextImageSource, find_shards
from .transforms import aspect_buckets, nearest_bucket

CHUNK = 64

Folder = TextImageSource | MultiviewSource


def open_folder(path: Path, limits: Limits, name: str | None = None) -> Folder:
    """The source at a path; its kind follows from the files.

    Raises:
        ValueError: the path has neither layout, or no usable record.
    """
    if has_views(path):
        return MultiviewSource(path, name, limits=limits)
    findings = Findings()
    # The source itself says that it cannot use links or files without permission.
    if find_shards(path, findings) or findings.counts["link"] or findings.counts["unreadable"]:
        return TextImageSource(path, name, limits=limits)
    raise ValueError(
        f"{path} {'has no .tar file and no CATEGORY/INSTANCE/images folder' if path.exists() else 'does not exist'}; "
        "see docs/training_data.md for both layouts."
    )


@dataclass
class Contents:
    """What decoding some records has found.

    Attributes:
        usable: number of records that can be used in training.
        findings: what is broken.
        phrases: number of records by target phrase.
        copies: (key, evaluation image) of records that show an evaluation image.
    """

    usable: int = 0
    findings: Findings = field(default_factory=Findings)
    phrases: Counter[str] = field(default_factory=Counter)
    copies: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: "Contents") -> None:
        """Add the contents of other records."""
        self.usable += other.usable
        self.findings.merge(other.findings)
        self.phrases += other.phrases
        self.copies += other.copies


@dataclass(frozen=True)
class Report:
    """Result of `check`: a source and the contents of all its records."""

    source: Folder
    contents: Contents

    def lines(self, num_examples: int = 3, resolution: int = 512) -> Iterator[str]:
        """The report as text."""
        source, contents = self.source, self.contents
        if isinstance(source, MultiviewSource):
            yield f"{source.path}: folders of views (MVImgNet layout)"
            yield f"  {contents.usable} usable views of {source.num_instances} instances"
        else:
            yield f"{source.path}: captioned images in tar shards"
            yield f"  {contents.usable} usable records in {len(source.shards)} shards"
        height, width = np.median(source.sizes, 0).astype(int).tolist()
        smallest, largest = source.sizes[source.sizes.prod(1).argsort()[[0, -1]]].tolist()
        yield (
            f"  size: median {width}x{height}, from {smallest[1]}x{smallest[0]} to {largest[1]}x{largest[0]} px "
            f"(width x height)"
        )
        buckets = aspect_buckets(resolution)
        counts = np.bincount(nearest_bucket(source.sizes, buckets), minlength=len(buckets))
        used = ", ".join(f"{w}x{h}: {n}" for (h, w), n in zip(buckets, counts.tolist()) if n)
        yield f"  aspect buckets at {resolution}: {used}"
        common = ", ".join(f"{phrase} {count}" for phrase, count in contents.phrases.most_common(5))
        yield f"  target phrases: {len(contents.phrases)} different; most frequent: {common or 'none'}"
        yield f"  broken: {sum(contents.findings.counts.values())}"
        yield from describe(contents.findings, num_examples)
        if contents.copies:
            yield f"  evaluation images in the training data: {len(contents.copies)}"
            yield from (f"      {key} is {name}" for key, name in contents.copies[:num_examples])


def describe(findings: Findings, num_examples: int) -> Iterator[str]:
    """Number, reason and examples of broken records, the most frequent reason first."""
    for reason, count in findings.counts.most_common():
        yield f"    {count:7} {reason}: {REASONS[reason]}"
        yield from (f"              {example}" for example in findings.examples[reason][:num_examples])


def check(source: Folder, evaluation: Sequence[Path] = (), workers: int = 0) -> Report:
    """Decode every record of a source and parse its caption.

    Args:
        evaluation: folders of evaluation images to compare with.
        workers: number of processes; 0 decodes in this one.
    """
    contents, images = Contents(), EvaluationImages(evaluation)
    contents.findings.merge(source.findings)
    numbers = range(len(source.sizes))
    chunks = [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]
    if workers:
        context = get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=_set_source, initargs=(source, images)) as pool:
            for part in pool.map(_examine_in_worker, chunks):
                contents.add(part)
    else:
        for chunk in chunks:
            contents.add(_examine(source, images, chunk))
    found = dict(contents.copies)
    contents.copies += [pair for pair in find_identical(source, images) if pair[0] not in found]
    return Report(source, contents)


def _examine(source: Folder, evaluation: EvaluationImages, numbers: range) -> Contents:
    """The contents of some records."""
    contents = Contents()
    for number in numbers:
        try:
            record = source.load(number, False, np.random.default_rng(0))
        except BrokenRecord as broken:
            contents.findings.add(broken)
            continue
        contents.usable += 1
        contents.phrases[record.target_phrase] += 1
        if (name := evaluation.similar(record.image)) is not None:
            contents.copies.append((record.key, name))
    return contents


_in_worker: list[tuple[Folder, EvaluationImages]] = []


def _set_source(source: Folder, evaluation: EvaluationImages) -> None:
    """Keep the source in a worker process, instead of sending it with every chunk. Ctrl-C is for the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _in_worker[:] = [(source, evaluation)]


def _examine_in_worker(numbers: range) -> Contents:
    return _examine(*_in_worker[0], numbers)


def default_workers() -> int:
    """Number of processes for `check`: one per core, none if there is only one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if cores > 1 else 0
