"""Index of a tar shard: where each record is, its size and its hash; see `sidecar`.

The shard is read once from start to end. Images are not decoded: their size is in the header. Captions are checked.

Legend: N records of the shard.
"""

import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .caption import MAX_BYTES, parse_caption
from .decode import EXTENSIONS, read_size
from .sample import BrokenRecord
from .sidecar import Columns, load_or_build, pack_names, stamp_of_file

MAX_EXAMPLES = 20  # names per reason that the index keeps
CAPTIONS = ("txt", "json")
MAX_IMAGE_BYTES = 2**28
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


@dataclass
class Findings:
    """What is broken, by reason: the number of records and the first names."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, broken: BrokenRecord) -> None:
        """Count a record."""
        self.counts[broken.reason] += 1
        examples = self.examples.setdefault(broken.reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(broken.key + (f" ({broken.detail})" if broken.detail else ""))

    def merge(self, other: "Findings") -> None:
        """Add the findings of another part of the source."""
        self.counts += other.counts
        for reason, examples in other.examples.items():
            mine = self.examples.setdefault(reason, [])
            mine += examples[: MAX_EXAMPLES - len(mine)]

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common()) or "nothing broken"


class NoUsableRecord(ValueError):
    """A source whose records are all broken, or that has none."""

    def __init__(self, path: Path, what: str, findings: Findings) -> None:
        super().__init__(
            f"{path} has no {what} ({findings}). Run `python -m train.data check {path}` for the details; "
            "docs/training_data.md describes the layout."
        )
        self.findings = findings


@dataclass(frozen=True)
class Index:
    """An index as columns, and what is broken.

    Columns of a shard: `image`, `text` and `json` are offset and size of the files, int64 [N, 2], size 0 if missing;
    `size` is height and width, int32 [N, 2]; `hash` of the image file, uint8 [N, 16]; names, see `pack_names`.
    """

    columns: Columns
    findings: Findings

    @property
    def digest(self) -> str:
        """Hash of all columns."""
        digest = blake2b(digest_size=8)
        for name in sorted(self.columns):
            digest.update(self.columns[name].tobytes())
        return digest.hexdigest()


def index_shard(path: Path, name: str, is_cancelled: Callable[[], bool] = lambda: False) -> Index:
    """The index of a shard, from its sidecar if that is up to date.

    Args:
        path: a tar file.
        name: of the shard in keys and messages.
        is_cancelled: asked before each record. A large shard takes minutes, and a thread cannot be interrupted.

    Raises:
        CancelledError: `is_cancelled` returned True; no sidecar is written.
    """

    def build() -> tuple[Columns, dict[str, Any]]:
        findings = Findings()
        columns = _scan(path, name, findings, is_cancelled)
        return columns, {"counts": findings.counts, "examples": findings.examples}

    columns, information = load_or_build(path, stamp_of_file(path), build)
    return Index(columns, Findings(Counter(information["counts"]), information["examples"]))


def content_hash(data: bytes) -> bytes:
    """Hash of an image file or of a caption, 16 bytes."""
    return blake2b(data, digest_size=16).digest()


def rows_with_hash(columns: Columns, hashes: Collection[bytes]) -> list[int]:
    """Rows of an index whose image file has one of these hashes."""
    if not hashes:
        return []
    first = np.frombuffer(b"".join(value[:8] for value in hashes), np.uint64)
    candidates = np.flatnonzero(np.isin(np.ascontiguousarray(columns["hash"][:, :8]).view(np.uint64)[:, 0], first))
    return [row for row in candidates.tolist() if columns["hash"][row].tobytes() in hashes]


def _scan(path: Path, name: str, findings: Findings, is_cancelled: Callable[[], bool]) -> Columns:
    records: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in _members(path, name, findings):
        if is_cancelled():
            raise CancelledError
        key, extension = _split(member.name)
        kind = "image" if extension in EXTENSIONS else extension
        if kind in ("image", *CAPTIONS):
            if kind in records.setdefault(key, {}):
                findings.add(BrokenRecord("duplicate key", f"{name}/{member.name}"))
            else:
                records[key][kind] = member
    rows: dict[str, list] = {"image": [], "text": [], "json": [], "size": [], "hash": [], "caption": []}
    names = []
    with open(path, "rb") as file:
        for key, members in records.items():
            if is_cancelled():
                raise CancelledError
            try:
                size, digest, caption = _inspect(file, f"{name}/{key}", members)
            except BrokenRecord as broken:
                findings.add(broken)
                continue
            names.append(key)
            rows["size"].append(size)
            rows["hash"].append(np.frombuffer(digest, np.uint8))
            rows["caption"].append(np.frombuffer(caption, np.uint8))
            for column, kind in (("image", "image"), ("text", "txt"), ("json", "json")):
                member = members.get(kind)
                rows[column].append((member.offset_data, member.size) if member else (0, 0))
    shapes = {
        "image": ("int64", 2),
        "text": ("int64", 2),
        "json": ("int64", 2),
        "size": ("int32", 2),
        "hash": ("uint8", 16),
        "caption": ("uint8", 16),
    }
    columns = {column: np.array(rows[column], dtype).reshape(-1, width) for column, (dtype, width) in shapes.items()}
    return {**columns, **pack_names(names)}


def _members(path: Path, name: str, findings: Findings) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar archive with safe names, as far as the archive can be read."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.size < 0:  # the next member would be an earlier one, forever
                    raise tarfile.ReadError(f"{member.name} has the size {member.size}")
                if member.isdir():
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    findings.add(BrokenRecord("link", f"{name}/{member.name}"))
                elif PurePosixPath(member.name).is_absolute() or ".." in PurePosixPath(member.name).parts:
                    findings.add(BrokenRecord("unsafe name", f"{name}/{member.name}"))
                else:
                    yield member
            end = archive.offset
        if problem := _problem_at_end(path, end):
            findings.add(BrokenRecord("bad shard", name, problem))
    except (tarfile.TarError, OSError, EOFError, ValueError, MemoryError, OverflowError) as error:
        with open(path, "rb") as file:
            compressed = file.read(4).startswith(COMPRESSED)
        detail = (
            "it is compressed; decompress it, because records are read by their position" if compressed else str(error)
        )
        findings.add(BrokenRecord("bad shard", name, detail))


def _problem_at_end(path: Path, end: int) -> str | None:
    """What is wrong behind the last member of an archive, or None.

    `tarfile` ends quietly at anything that is not a header, so that the members behind a damaged one would be lost
    without notice.

    Args:
        path: of the archive.
        end: position behind the last member.
    """
    with open(path, "rb") as file:
        file.seek(end)
        mark = file.read(2 * tarfile.BLOCKSIZE)
        if mark[: tarfile.BLOCKSIZE].strip(b"\0"):
            return f"corrupt header at byte {end}"
        if len(mark) < 2 * tarfile.BLOCKSIZE or mark.strip(b"\0"):
            return f"no end-of-archive mark at byte {end}"
        while block := file.read(2**20):
            if block.strip(b"\0"):
                return f"data after the end of the archive at byte {end}; shards cannot be joined with `cat`"
    return None


def _split(name: str) -> tuple[str, str]:
    """Key and lower-case extension: the name up to the first dot of its last part, and the rest (webdataset layout)."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _inspect(file, key: str, members: dict[str, tarfile.TarInfo]) -> tuple[tuple[int, int], bytes, bytes]:
    """Size and hash of a record's image, and the hash of its caption, which is checked."""
    if "image" not in members:
        raise BrokenRecord("no image", key)
    text, record = (
        read_part(file, members[kind].offset_data, min(members[kind].size, MAX_BYTES + 1), key)
        if kind in members
        else None
        for kind in CAPTIONS
    )
    caption = repr(parse_caption(text, record, key)).encode()
    if members["image"].size > MAX_IMAGE_BYTES:
        raise BrokenRecord("huge", key, f"the file has {members['image'].size} bytes, more than {MAX_IMAGE_BYTES}")
    image = read_part(file, members["image"].offset_data, members["image"].size, key)
    return read_size(image, key), content_hash(image), content_hash(caption)


def read_part(file, offset: int, size: int, key: str) -> bytes:
    """`size` bytes of an open file at `offset`.

    Raises:
        BrokenRecord: the file ends before.
    """
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise BrokenRecord("truncated", key, "the shard ends before the record")
    return data
