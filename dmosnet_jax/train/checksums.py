"""Checksums of a checkpoint's files: damage is found, and named, before anything is read from them.

Arrays are compressed without a checksum of their own, so a flipped bit could otherwise pass for a parameter.
"""

import json
import pathlib
from collections.abc import Iterable

import google_crc32c

from dmosnet_jax.core import safe_json
from dmosnet_jax.core.errors import DataError

FILE = "checksums.json"
_CHUNK_BYTES = 1 << 22


def write(folder: pathlib.Path, parts: Iterable[str], *, also: Iterable[str] = ()) -> None:
    """Writes `checksums.json` into a folder: size in bytes and CRC32C of files.

    Args:
        folder: of a checkpoint.
        parts: sub-folders, of which every file is taken.
        also: patterns of further files.
    """
    files = sorted(path for part in parts for path in (folder / part).rglob("*") if path.is_file())
    files += sorted(path for pattern in also for path in folder.glob(pattern))
    sums = {path.relative_to(folder).as_posix(): [path.stat().st_size, _checksum(path)] for path in files}
    (folder / FILE).write_text(json.dumps(sums, indent=0), encoding="utf-8")


def verify(folder: pathlib.Path, parts: Iterable[str]) -> str | None:
    """What is wrong with the files below the sub-folders `parts`, or None. A folder without checksums is not judged."""
    parts = set(parts)
    try:
        sums = safe_json.read_object(folder / FILE, fix="")
    except FileNotFoundError:
        return None
    except DataError:
        return f"{FILE} is damaged"
    for name, entry in sums.items():
        if name.split("/")[0] not in parts:
            continue
        if not (isinstance(entry, list) and len(entry) == 2) or ".." in name.split("/"):
            return f"{FILE} is damaged"
        size, checksum = entry
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _checksum(path) != checksum:
            return f"the checksum of {name} differs"
    return None


def _checksum(path: pathlib.Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            value = google_crc32c.extend(value, chunk)
    return value
