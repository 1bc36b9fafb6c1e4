"""Sidecar files: the index of a source, written once and read again unless the source has changed.

A sidecar is a safetensors file (no code is executed by reading it) beside the source, or in the user's cache folder if
the source's folder is read-only. It is written under another name and renamed, so that several processes may write it
at the same time and a reader never sees a part of it.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

log = logging.getLogger(__name__)

VERSION = 4
Columns = dict[str, np.ndarray]


def stamp_of_file(path: Path) -> dict[str, Any]:
    """What identifies the state of a file: size, modification time and a hash of its first 64 KiB."""
    status = path.stat()
    with open(path, "rb") as file:
        head = blake2b(file.read(65_536), digest_size=16).hexdigest()
    return {"version": VERSION, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "head": head}


def load_or_build(
    source: Path, stamp: dict[str, Any], build: Callable[[], tuple[Columns, dict[str, Any]]]
) -> tuple[Columns, dict[str, Any]]:
    """Columns and information of the sidecar of `source`; built and written if it is missing, stale or damaged.

    Args:
        source: a file or a folder.
        stamp: a sidecar with another stamp is stale.
        build: returns the columns, and further information that JSON can represent.
    """
    places = [source.with_name(f"{source.name}.index")]
    if (cache := _cache_folder()) is not None:
        places.append(cache / f"{source.name}-{_digest(source)}.index")
    for place in places:
        if (found := _read(place, stamp)) is not None:
            return found
    columns, information = build()
    if not any(len(column) for column in columns.values()):  # perhaps not a source at all
        return columns, information
    for place in places:
        try:
            _write(place, columns, stamp, information)
            break
        except OSError as error:
            if place == places[-1]:
                log.warning("The index of %s cannot be stored (%s); the next run builds it again.", source, error)
    return columns, information


def _read(place: Path, stamp: dict[str, Any]) -> tuple[Columns, dict[str, Any]] | None:
    if not place.is_file():
        return None
    try:
        with safe_open(place, "numpy") as file:
            metadata = file.metadata() or {}
            if json.loads(metadata["stamp"]) != stamp:
                log.info("%s is out of date and is built again.", place)
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["information"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        log.warning("%s is damaged (%s) and is built again.", place, error)
        return None


def _write(place: Path, columns: Columns, stamp: dict[str, Any], information: dict[str, Any]) -> None:
    content = save(columns, {"stamp": json.dumps(stamp), "information": json.dumps(information)})
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, content)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it either has all of `content` or does not exist; folders must exist."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # `mkstemp` makes the file readable by its owner only
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _cache_folder() -> Path | None:
    """The user's cache folder; None for a user without a home directory, as in a container with an arbitrary user."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "realcustom" / "index"
    except RuntimeError:
        return None


def _digest(source: Path) -> str:
    return blake2b(os.fsencode(source.resolve()), digest_size=8).hexdigest()


def pack_names(names: list[str]) -> Columns:
    """Names as two columns: UTF-8 bytes, and where each name ends."""
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    return {
        "name_bytes": np.frombuffer(b"".join(encoded), np.uint8),
        "name_ends": np.cumsum([len(name) for name in encoded], dtype=np.int64),
    }


def unpack_name(columns: Columns, row: int) -> str:
    """Inverse of `pack_names` for one name."""
    start = int(columns["name_ends"][row - 1]) if row else 0
    return columns["name_bytes"][start : int(columns["name_ends"][row])].tobytes().decode("utf-8", "surrogateescape")
