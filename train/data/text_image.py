"""Captioned images in tar shards (webdataset layout) as a source; the reference is the target image itself.

laion/00000.tar    0001.jpg 0001.txt    0002.png 0002.json    ...
laion/00001.tar    ...
"""

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np

from .caption import names_sides, parse_caption
from .decode import Limits, decode
from .index import Findings, Index, NoUsableRecord, content_hash, index_shard, read_part, rows_with_hash
from .sample import BrokenRecord, Record
from .sidecar import Columns, unpack_name

log = logging.getLogger(__name__)

MAX_CACHED = 256  # indexes in memory, of about a megabyte each


class TextImageSource:
    """The records of all tar shards below a folder, or of one shard; see `Source`.

    A record is an image file (.jpg, .jpeg, .png, .webp) and a caption file of the same name; see `parse_caption`.

    Args:
        path: folder or tar file.
        name: prefix of the keys; default: the name of the path.
        limits: which images are used.
        may_flip: mirror half of the samples, except those whose caption names left or right. Not for images of text.
    Attributes:
        findings: what is broken, as far as the index shows. Images are decoded only when they are loaded.
        fingerprint: hash of the records and their order; a run can be resumed exactly only with the same one.
    Raises:
        ValueError: there is no shard, or no usable record.
    """

    shows_views = False
    shows_originals = True

    def __init__(
        self, path: Path | str, name: str | None = None, *, limits: Limits | None = None, may_flip: bool = False
    ) -> None:
        self.path = Path(path)
        self.name = name or self.path.stem
        self.limits, self.may_flip = limits or Limits(), may_flip
        self.findings = Findings()
        self.shards = find_shards(self.path, self.findings)
        if not self.shards:
            problem = "contains no .tar file" if self.path.exists() else "does not exist"
            if unreadable := self.findings.counts["unreadable"]:
                problem = f"has {unreadable} files or folders without permission to read them"
            elif links := self.findings.counts["link"]:
                problem = f"contains only links ({links}), which are not followed"
            raise ValueError(f"{self.path} {problem}; give a folder of tar shards. See docs/training_data.md.")
        digest = blake2b(repr(self.limits).encode(), digest_size=8)
        sizes, rows, counts = [], [], []
        self._digests: list[str] = []
        self._cache: OrderedDict[int, Columns] = OrderedDict()  # indexes that were used last
        for shard, index in zip(self.shards, _index_all(self.path, self.shards)):
            self.findings.merge(index.findings)
            usable = self._usable(index, self._shard_name(shard))
            rows.append(usable.astype(np.int32))
            sizes.append(index.columns["size"][usable])
            counts.append(len(usable))
            self._digests.append(index.digest)
            for column in ("hash", "caption"):
                digest.update(index.columns[column][usable].tobytes())
        self.fingerprint = digest.hexdigest()
        self.sizes = np.concatenate(sizes)
        self._rows, self._ends = np.concatenate(rows), np.cumsum(counts)
        if not len(self.sizes):
            raise NoUsableRecord(self.path, f"usable record in {len(self.shards)} shards", self.findings)
        log.info("%s: %d records in %d shards; %s.", self.name, len(self.sizes), len(self.shards), self.findings)

    def load(self, number: int, other_view: bool, rng: np.random.Generator) -> Record:
        """The record of a number; see `Source.load`."""
        assert not other_view, "the source has no other views"
        shard = int(np.searchsorted(self._ends, number, side="right"))
        path, row = self.shards[shard], int(self._rows[number])
        key = f"{self.name}:{self._shard_name(path)}"
        try:
            columns = self._columns(shard)
            key = f"{key}/{unpack_name(columns, row)}"
            with open(path, "rb") as file:
                image, text, json = (
                    read_part(file, offset, size, key)
                    for offset, size in (columns[column][row].tolist() for column in ("image", "text", "json"))
                )
        except (FileNotFoundError, IsADirectoryError) as error:
            raise BrokenRecord("changed", key, "the shard was removed") from error
        except PermissionError as error:
            raise BrokenRecord("unreadable", key) from error
        if content_hash(image) != columns["hash"][row].tobytes():
            raise BrokenRecord("changed", key)
        caption, target_phrase = parse_caption(text or None, json or None, key)
        pixels = decode(image, key, self.limits)
        content = content_hash(image).hex()
        return Record(
            image=pixels, reference=pixels, caption=caption, target_phrase=target_phrase, key=key,
            content=(content, content), may_flip=self.may_flip and not names_sides(caption),
        )  # fmt: skip

    def find_hashes(self, hashes: Collection[bytes]) -> Iterator[tuple[bytes, str]]:
        """Hash and key of the records in the index that have one of these hashes, also of those beyond the limits."""
        for shard in self.shards:
            name = self._shard_name(shard)
            columns = index_shard(shard, name).columns
            for row in rows_with_hash(columns, hashes):
                yield columns["hash"][row].tobytes(), f"{self.name}:{name}/{unpack_name(columns, row)}"

    def _columns(self, shard: int) -> Columns:
        """The index of a shard, as it was when the source was created.

        Raises:
            BrokenRecord: the shard was replaced since then.
        """
        if shard not in self._cache:
            path = self.shards[shard]
            index = index_shard(path, self._shard_name(path))
            if index.digest != self._digests[shard]:
                raise BrokenRecord("changed", self._shard_name(path), "the shard was replaced")
            self._cache[shard] = index.columns
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        self._cache.move_to_end(shard)
        return self._cache[shard]

    def __getstate__(self) -> dict:
        """Without the cache: a worker fills its own."""
        return {**self.__dict__, "_cache": OrderedDict()}

    def _usable(self, index: Index, shard: str) -> np.ndarray:
        """Rows of an index within the limits; the others are counted."""
        sizes = index.columns["size"].astype(np.int64)
        inside = (sizes.min(1, initial=1 << 40) >= self.limits.min_side) & (sizes.prod(1) <= self.limits.max_pixels)
        for row in np.flatnonzero(~inside).tolist():
            try:
                self.limits.check(
                    (int(sizes[row, 0]), int(sizes[row, 1])), f"{shard}/{unpack_name(index.columns, row)}"
                )
            except BrokenRecord as broken:
                self.findings.add(broken)
        return np.flatnonzero(inside)

    def _shard_name(self, shard: Path) -> str:
        return shard_name(self.path, shard)


def find_shards(path: Path, findings: Findings) -> list[Path]:
    """Tar files below a folder, in the order of their relative paths.

    Links, which are not followed, and files and folders without permission to read them are counted.
    """
    if path.is_file():
        if os.access(path, os.R_OK):
            return [path]
        findings.add(BrokenRecord("unreadable", path.name))
    shards = []

    def unreadable(error: OSError) -> None:
        if isinstance(error, PermissionError):
            findings.add(BrokenRecord("unreadable", Path(error.filename).relative_to(path).as_posix()))
        elif not isinstance(error, FileNotFoundError):
            raise error

    for folder, subfolders, files in os.walk(path, onerror=unreadable):
        for name in (*subfolders, *files):
            if (entry := Path(folder) / name).is_symlink():
                findings.add(BrokenRecord("link", entry.relative_to(path).as_posix()))
            elif name.lower().endswith(".tar") and name in files:
                if not os.access(entry, os.R_OK):
                    findings.add(BrokenRecord("unreadable", entry.relative_to(path).as_posix()))
                elif entry.is_file():
                    shards.append(entry)
                else:  # a device or a pipe could block
                    findings.add(BrokenRecord("link", entry.relative_to(path).as_posix()))
    return sorted(shards, key=lambda shard: shard.relative_to(path).as_posix())


def shard_name(path: Path, shard: Path) -> str:
    """Name of a shard in keys: its path relative to the source, without extension."""
    return shard.stem if shard == path else shard.relative_to(path).with_suffix("").as_posix()


def _index_all(path: Path, shards: list[Path]) -> Iterator[Index]:
    cancelled = threading.Event()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        try:
            yield from threads.map(lambda shard: index_shard(shard, shard_name(path, shard), cancelled.is_set), shards)
        finally:  # on Ctrl-C, the executor would wait for the shards that it is reading
            cancelled.set()
