"""Folders with several views of each instance (MVImgNet layout) as a source.

mvimgnet/categories.json               {"7": "teapot", ...}; optional, for folders that are not named by a word
mvimgnet/7/000a1b/images/001.jpg       a view
mvimgnet/7/000a1b/images/001.txt       its caption; optional, also .json
mvimgnet/7/000a1b/caption.txt          caption of all views of the instance; optional, also .json
"""

import errno
import json
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from realcustom.words import is_encodable, words_of

from .caption import names_sides, parse_caption
from .decode import EXTENSIONS, Limits, decode, read_size
from .index import CAPTIONS, Findings, Index, NoUsableRecord, content_hash, rows_with_hash
from .sample import BrokenRecord, Record
from .sidecar import VERSION, Columns, load_or_build, pack_names, unpack_name

log = logging.getLogger(__name__)

CATEGORIES_FILE = "categories.json"
_SHARED_CAPTIONS = tuple(f"caption.{kind}" for kind in CAPTIONS)  # of all views of an instance


class MultiviewSource:
    """The views of all instances below a folder; see `Source`. Each view is a record.

    The reference is another view of the same instance. Without a text-image source in the mixture, the source also
    gives records whose reference is the target image itself. An instance without a caption gets "a photo of a
    CATEGORY". The target phrase is the category if the caption contains it.

    Args:
        path: folder with the layout CATEGORY/INSTANCE/images/*.jpg.
        name: prefix of the keys; default: the name of the folder.
        limits: which images are used.
        may_flip: mirror half of the samples, except those whose caption names left or right.
    Attributes:
        findings: what is broken, as far as the index shows.
        fingerprint: hash of the records and their order.
    Raises:
        ValueError: there is no view, or no instance with two usable views.
    """

    shows_views = True
    shows_originals = False

    def __init__(
        self, path: Path | str, name: str | None = None, *, limits: Limits | None = None, may_flip: bool = False
    ) -> None:
        self.path = Path(path)
        self.name = name or self.path.name
        self.limits, self.may_flip = limits or Limits(), may_flip
        if not self.path.is_dir():
            raise ValueError(
                f"{self.path} is not a folder; give a folder CATEGORY/INSTANCE/images. See docs/training_data.md."
            )
        self.categories = _read_categories(self.path / CATEGORIES_FILE)
        index = index_views(self.path, self.categories)
        self.findings = index.findings
        self._columns = index.columns
        self._rows, self._first, self._count = self._usable(index)
        if not len(self._rows):
            what = "instance with two usable views in CATEGORY/INSTANCE/images"
            raise NoUsableRecord(self.path, what, self.findings)
        self.sizes = index.columns["size"][self._rows]
        digest = blake2b(repr((self.limits, self.categories)).encode(), digest_size=8)
        for column in ("hash", "caption"):
            digest.update(index.columns[column][self._rows].tobytes())
        names = [unpack_name(index.columns, row) for row in self._rows.tolist()]
        for name in names:  # they show which views have the same instance and category
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        numbers = sorted(
            {folder for name in names if (folder := name.split("/")[0]).isdecimal()} - set(self.categories)
        )
        if numbers:
            log.warning(
                "%s: %d categories are numbers, such as %s, and captions say so; name them in %s.",
                self.path, len(numbers), numbers[0], self.path / CATEGORIES_FILE,
            )  # fmt: skip
        self.fingerprint = digest.hexdigest()
        self.num_instances = len(np.unique(self._first))
        log.info("%s: %d views of %d instances; %s.", self.name, len(self._rows), self.num_instances, self.findings)

    def load(self, number: int, other_view: bool, rng: np.random.Generator) -> Record:
        """The view of a number, with another view as the reference; see `Source.load`.

        If the other view that was drawn is broken, the next one of the instance is used.
        """
        image, key, content = self._read(number)
        name = unpack_name(self._columns, int(self._rows[number]))
        caption, target_phrase = _read_caption(self.path, name, self.categories, key)
        reference, reference_content, skipped = image, content, []
        if other_view:
            reference, reference_content = self._other_view(number, rng, key, skipped)
        return Record(
            image=image, reference=reference, caption=caption, target_phrase=target_phrase, key=key,
            content=(content, reference_content), skipped=tuple(skipped),
            may_flip=self.may_flip and not names_sides(caption),
        )  # fmt: skip

    def find_hashes(self, hashes: Collection[bytes]) -> Iterator[tuple[bytes, str]]:
        """Hash and key of the views in the index that have one of these hashes, also of those beyond the limits."""
        for row in rows_with_hash(self._columns, hashes):
            yield self._columns["hash"][row].tobytes(), f"{self.name}:{unpack_name(self._columns, row)}"

    def _other_view(
        self, number: int, rng: np.random.Generator, key: str, skipped: list[tuple[str, str]]
    ) -> tuple[Image.Image, str]:
        """Another view of the instance and its hash; broken ones are added to `skipped`."""
        first, count = int(self._first[number]), int(self._count[number])
        start = int(rng.integers(count - 1))
        for offset in range(count - 1):
            other = first + (number - first + 1 + (start + offset) % (count - 1)) % count
            try:
                image, _, content = self._read(other)
                return image, content
            except BrokenRecord as broken:
                skipped.append((broken.key, broken.reason))
        raise BrokenRecord("no other view", key)

    def _read(self, number: int) -> tuple[Image.Image, str, str]:
        """The image of a number, its key and its hash."""
        row = int(self._rows[number])
        name = unpack_name(self._columns, row)
        key = f"{self.name}:{name}"
        data = _read_view(self.path / name, key)
        if content_hash(data) != self._columns["hash"][row].tobytes():
            raise BrokenRecord("changed", key)
        return decode(data, key, self.limits), key, content_hash(data).hex()

    def _usable(self, index: Index) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows within the limits of instances with two of them; first number and number of views of their instance."""
        sizes, names = index.columns["size"].tolist(), index.columns
        instances: dict[str, list[int]] = {}
        for row, (height, width) in enumerate(sizes):
            name = unpack_name(names, row)
            try:
                self.limits.check((height, width), name)
            except BrokenRecord as broken:
                self.findings.add(broken)
                continue
            instances.setdefault(name.rsplit("/", 2)[0], []).append(row)
        rows: list[int] = []
        first: list[int] = []
        count: list[int] = []
        for instance, views in instances.items():
            if len(views) < 2:
                self.findings.add(BrokenRecord("no other view", instance))
                continue
            first += [len(rows)] * len(views)
            count += [len(views)] * len(views)
            rows += views
        return np.array(rows, np.int64), np.array(first, np.int64), np.array(count, np.int32)


def has_views(path: Path) -> bool:
    """Whether a folder contains CATEGORY/INSTANCE/images."""
    return path.is_dir() and any(entry.is_dir() for entry in path.glob("*/*/images"))


def index_views(path: Path, categories: dict[str, str]) -> Index:
    """The index of a folder of views, from its sidecar if no file was added, removed or changed."""
    findings = Findings()
    files = sorted(_find_files(path, findings))
    views = [name for name, *_ in files if _extension(name) in EXTENSIONS]
    listing = repr((files, categories)).encode("utf-8", "surrogateescape")
    stamp = {"version": VERSION, "listing": blake2b(listing, digest_size=16).hexdigest()}

    def build() -> tuple[Columns, dict[str, Any]]:
        broken = Findings()
        names, sizes, hashes, captions = [], [], [], []
        for name in views:
            try:
                data = _read_view(path / name, name)
                caption = repr(_read_caption(path, name, categories, name)).encode()
                sizes.append(read_size(data, name))
            except BrokenRecord as error:
                broken.add(error)
                continue
            names.append(name)
            hashes.append(np.frombuffer(content_hash(data), np.uint8))
            captions.append(np.frombuffer(content_hash(caption), np.uint8))
        columns = {
            "size": np.array(sizes, np.int32).reshape(-1, 2),
            "hash": np.array(hashes, np.uint8).reshape(-1, 16),
            "caption": np.array(captions, np.uint8).reshape(-1, 16),
            **pack_names(names),
        }
        return columns, {"counts": broken.counts, "examples": broken.examples}

    columns, information = load_or_build(path / "views", stamp, build)
    findings.merge(Findings(Counter(information["counts"]), information["examples"]))
    return Index(columns, findings)


def _find_files(path: Path, findings: Findings) -> Iterator[tuple[str, int, int]]:
    """Relative path, size and modification time of each view and each caption file.

    Links, which are not followed, folders without permission to read them, and folders without views are counted.
    """

    def entries(folder: str) -> list[os.DirEntry]:
        kept = []
        try:
            found = list(os.scandir(folder))
        except PermissionError:
            findings.add(BrokenRecord("unreadable", Path(folder).relative_to(path).as_posix()))
            found = []
        for entry in found:
            if entry.is_symlink():
                findings.add(BrokenRecord("link", Path(entry.path).relative_to(path).as_posix()))
            else:
                kept.append(entry)
        return kept

    for category in entries(str(path)):
        if not category.is_dir():
            continue
        for instance in entries(category.path):
            name = f"{category.name}/{instance.name}"
            inside = entries(instance.path) if instance.is_dir() else []
            images = [entry for entry in inside if entry.name == "images" and entry.is_dir()]
            if not images:
                continue
            views = [entry for entry in entries(images[0].path) if _extension(entry.name) in (*EXTENSIONS, *CAPTIONS)]
            if not any(_extension(view.name) in EXTENSIONS for view in views):
                findings.add(BrokenRecord("no other view", name))
            shared = [entry for entry in inside if entry.name in _SHARED_CAPTIONS]
            for folder, files in ((name, shared), (f"{name}/images", views)):
                for entry in files:
                    if entry.is_file():
                        status = entry.stat()
                        yield f"{folder}/{entry.name}", status.st_size, status.st_mtime_ns


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _read_caption(path: Path, name: str, categories: dict[str, str], key: str) -> tuple[str, str]:
    """Caption and target phrase of a view: of its own file, of that of its instance, or from the category."""
    view = Path(name)
    folder = view.parts[0]
    category = categories.get(folder, folder.replace("_", " "))
    for stem in (path / view.with_suffix(""), path / view.parent.parent / "caption"):
        files = [stem.with_name(f"{stem.name}.{kind}") for kind in CAPTIONS]
        text, record = (_read_view(file, key) if _is_regular(file) else None for file in files)
        if text is not None or record is not None:
            return parse_caption(text, record, key, subject=category)
    if not is_encodable(category) or not words_of(category):
        raise BrokenRecord("bad caption", key, f"the category is {category!a}, which is not a word")
    article = "an" if category[0].lower() in "aeiou" else "a"
    return f"a photo of {article} {category}", category


def _read_categories(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); write an object, folder name -> category.") from None
    if not isinstance(values, dict) or not all(isinstance(v, str) and v.strip() for v in values.values()):
        raise ValueError(f"{path} must be an object that maps folder names to categories, such as {{'7': 'teapot'}}.")
    return values


def _is_regular(path: Path) -> bool:
    return os.path.isfile(path) and not os.path.islink(path)


def _read_view(path: Path, key: str) -> bytes:
    """Content of a view or of its caption file."""
    try:
        return _read_file(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):  # removed or replaced by a link
            raise BrokenRecord("changed", key, str(error)) from error
        if error.errno == errno.EACCES:
            raise BrokenRecord("unreadable", key, str(error)) from error
        raise  # a failing disk is not a property of the record


def _read_file(path: Path) -> bytes:
    """Content of a regular file; a link could lead out of the source."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return file.read()
