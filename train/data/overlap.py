"""Overlap of training data and evaluation images: an image that the model was trained on says nothing about new ones.

The index knows a hash of every image file, so identical files are found without reading the source again. Copies that
were resized or compressed again are found by a perceptual hash of the decoded image, which `check` computes.
"""

import logging
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from realcustom.reference_image import to_rgb

from .decode import EXTENSIONS
from .index import content_hash

log = logging.getLogger(__name__)

HASH_SIDE = 16
MAX_DISTANCE = 20  # of 480 bits; unrelated images differ in about 240
MAX_NAMED = 10


class Hashed(Protocol):
    """A source with hashes of its image files."""

    @property
    def name(self) -> str: ...

    def find_hashes(self, hashes: Collection[bytes]) -> Iterable[tuple[bytes, str]]:
        """Hash and key of each record that has one of these hashes."""
        ...


class EvaluationImages:
    """The images below the folders of evaluation sets.

    Args:
        folders: folders, or image files.
    Raises:
        ValueError: a folder contains no image.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.by_hash: dict[bytes, str] = {}
        names, hashes = [], []
        for folder in folders:
            paths = [folder] if folder.is_file() else sorted(folder.rglob("*"))
            paths = [path for path in paths if path.suffix.lower().lstrip(".") in EXTENSIONS and path.is_file()]
            if not paths:
                raise ValueError(f"the evaluation set {folder} contains no image; give a folder of image files.")
            for path in paths:
                name = path.name if path == folder else f"{folder.name}/{path.relative_to(folder).as_posix()}"
                try:
                    self.by_hash[content_hash(path.read_bytes())] = name
                    with Image.open(path) as image:
                        hashes.append(perceptual_hash(to_rgb(image)))
                except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                    log.warning("%s cannot be read (%s); at most identical files are found.", path, error)
                    continue
                names.append(name)
        self.names = names
        self._perceptual = np.stack(hashes) if hashes else np.zeros((0, 1), bool)

    def similar(self, image: Image.Image) -> str | None:
        """Name of the evaluation image that an RGB image is a copy of, also if it was resized or compressed again."""
        if not self.names:
            return None
        distance = (self._perceptual != perceptual_hash(image)).sum(1)
        nearest = int(distance.argmin())
        return self.names[nearest] if distance[nearest] <= MAX_DISTANCE else None


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """Difference hash of an RGB image: where a small gray version becomes brighter, bool [480]."""
    gray = image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX)
    values = np.asarray(gray, np.int16)
    return np.concatenate([(np.diff(values, axis=axis) > 0).ravel() for axis in (0, 1)])


def find_identical(source: Hashed, evaluation: EvaluationImages) -> list[tuple[str, str]]:
    """(key, evaluation image) for each record whose file is an evaluation image."""
    return [(key, evaluation.by_hash[value]) for value, key in source.find_hashes(evaluation.by_hash)]


def warn_if_overlapping(sources: Iterable[Hashed], folders: Sequence[Path]) -> int:
    """Log a warning with the number and the names of records that are evaluation images; return their number."""
    evaluation, total = EvaluationImages(folders), 0
    for source in sources:
        if found := find_identical(source, evaluation):
            total += len(found)
            names = ", ".join(f"{key} is {name}" for key, name in found[:MAX_NAMED])
            more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
            log.warning(
                "%s: %d records are images of the evaluation sets, whose results will be too good: %s%s.",
                source.name, len(found), names, more,
            )  # fmt: skip
    return total
