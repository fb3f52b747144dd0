"""The index beside each shard: where its records are, and their identities and cameras.

`<shard>.index.npz` lets a split of millions of images open without reading them. It is made again where it is missing
or of another file. For a remote shard, a copy is kept on this machine, in `$DMOSNET_CACHE` (default:
`~/.cache/dmosnet_jax/indices`).
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Sequence
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from dmosnet_jax.core import files
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.files import Path
from dmosnet_jax.core.safe_npz import read_arrays
from dmosnet_jax.data import records
from dmosnet_jax.data.framing import FOOTER, HEADER, OVERHEAD, damage, masked

INDEX_SUFFIX = ".index.npz"
ENDS = 4096
# Records of each shard whose labels are compared with the index when it is opened; all are when they are read.
_COMPARED = 8
_COLUMNS: dict[str, Any] = {"offset": np.int64, "length": np.int64, "pid": np.int32, "camid": np.int32}
_SCALARS: dict[str, Any] = {"shard_bytes": np.int64, "shard_ends": np.uint32}
FIX = "copy the file again, or convert the data set again"

Index = dict[str, np.ndarray]


def load_index(path: Path) -> Index:
    """The index of a shard: from its sidecar, or made from the shard where that is missing or of another file.

    A new sidecar is written beside the shard where the folder allows it; that of a remote shard is kept locally.

    Args:
      path: of the shard.

    Returns:
      `offset` int64 [n] (bytes from the file's start to the record's), `length` int64 [n] (bytes of its data), `pid`
      and `camid` int32 [n], `shard_bytes` int64 [], `shard_ends` uint32 [] (checksum of the file's two ends) and
      `checksum` uint32 [] (of all the others; indices of earlier conversions lack it).

    Raises:
      DataError: the shard is missing, cut short or damaged.
    """
    path = os.fspath(path)
    remote = files.is_remote(path)
    try:
        size, ends = _remote_ends(path) if remote else _local_ends(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): {FIX}") from error
    sidecar = path + INDEX_SUFFIX
    local = _cached(path) if remote else sidecar
    stored = _read_index(local, size)
    if stored is not None and fits(stored, size, ends) and (remote or _labels_agree(path, stored)):
        return stored
    index = _read_index(sidecar, size) if remote else None
    if index is None or not fits(index, size, ends):
        index = make_index(_scan(path, size), size, ends)
    # A folder that cannot be written to: the next process makes the index again.
    with contextlib.suppress(OSError):
        files.write(local, to_bytes(index))
    return index


def checksum_of_ends(head: bytes, tail: bytes) -> int:
    """Tells apart most files of equal size, whatever a copy did to their dates.

    Args:
      head: the first `ENDS` bytes of the file, or all of them.
      tail: the last `ENDS` bytes of the file, or all of them.
    """
    return google_crc32c.extend(google_crc32c.value(head), tail)


def make_index(rows: Sequence[tuple[int, int, int, int]], size: int, ends: int) -> Index:
    """The index of a shard; see `load_index`.

    Args:
      rows: offset, length, identity and camera of every record.
      size: bytes of the shard.
      ends: its `checksum_of_ends`.
    """
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    index = {name: column.astype(kind) for (name, kind), column in zip(_COLUMNS.items(), columns, strict=True)}
    index |= {"shard_bytes": np.array(size, np.int64), "shard_ends": np.array(ends, np.uint32)}
    return index | {"checksum": np.array(_checksum(index), np.uint32)}


def _checksum(index: Index) -> int:
    value = 0
    for name in (*_COLUMNS, *_SCALARS):
        value = google_crc32c.extend(value, index[name].tobytes())
    return value


def to_bytes(index: Index) -> bytes:
    """An index as the content of its file."""
    file = io.BytesIO()
    np.savez(file, **index)  # type: ignore[arg-type]
    return file.getvalue()


def fits(index: Index, size: int, ends: int) -> bool:
    """Whether an index is whole and describes a file of `size` bytes from its first to its last byte."""
    checksum = {"checksum": np.uint32} if "checksum" in index else {}
    scalars = _SCALARS | checksum
    if set(index) != {*_COLUMNS, *scalars}:
        return False
    shape = index["offset"].shape
    if any(index[name].dtype != kind for name, kind in (_COLUMNS | scalars).items()):
        return False
    if any(index[name].shape != shape or len(shape) != 1 for name in _COLUMNS) or any(index[n].shape for n in scalars):
        return False
    if checksum and index["checksum"] != _checksum(index):
        return False
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(index["length"] + OVERHEAD)])
    contiguous = (index["length"] >= 0).all() and np.array_equal(bounds[:-1], index["offset"])
    return bool(contiguous and bounds[-1] == size == index["shard_bytes"] and index["shard_ends"] == ends)


def corrupt(path: str, number: int, offset: int, reason: str) -> DataError:
    """The error of a damaged record."""
    return DataError(f"{path}: record {number} at byte {offset} is corrupt ({reason}): {FIX}")


def _local_ends(path: str) -> tuple[int, int]:
    """Size of a shard and checksum of its ends."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = os.pread(file.fileno(), ENDS, 0)
        return size, checksum_of_ends(head, os.pread(file.fileno(), ENDS, max(0, size - ENDS)))


def _remote_ends(path: str) -> tuple[int, int]:
    size = files.size(path)
    parts = [files.read_range(path, start, min(ENDS, size - start)) for start in (0, max(0, size - ENDS))]
    return size, checksum_of_ends(*parts)


def _cached(path: str) -> str:
    """Where the index of a remote shard is kept on this machine."""
    folder = os.environ.get("DMOSNET_CACHE") or os.path.expanduser("~/.cache/dmosnet_jax/indices")
    return os.path.join(folder, hashlib.blake2b(path.encode(), digest_size=16).hexdigest() + INDEX_SUFFIX)


def _labels_agree(path: str, index: Index) -> bool:
    """Whether some records of a local shard, evenly spread, have the identities and cameras of its index."""
    count = len(index["offset"])
    with open(path, "rb") as file:
        for row in np.unique(np.linspace(0, count - 1, min(count, _COMPARED)).astype(int)):
            length = int(index["length"][row])
            raw = os.pread(file.fileno(), length + OVERHEAD, int(index["offset"][row]))
            if raw[:8] != length.to_bytes(8, "little"):
                return False
            if damage(raw, length) is not None:
                # Told, with its place, to whoever reads it.
                continue
            record = records.parse(raw[HEADER.size : -FOOTER.size])
            if (record.pid, record.camid) != (index["pid"][row], index["camid"][row]):
                return False
    return True


def _scan(path: str, size: int) -> list[tuple[int, int, int, int]]:
    """Reads a whole shard, checking every record."""
    rows: list[tuple[int, int, int, int]] = []
    offset = 0
    try:
        with files.open_stream(path) as file:
            while offset < size:
                raw = _next(file, path, len(rows), offset, size)
                try:
                    record = records.parse(raw[HEADER.size : -FOOTER.size])
                except DataError as error:
                    raise DataError(f"{path}: record {len(rows)} at byte {offset}: {error}; convert again") from error
                rows.append((offset, len(raw) - OVERHEAD, record.pid, record.camid))
                offset += len(raw)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): {FIX}") from error
    return rows


def _next(file: BinaryIO, path: str, number: int, offset: int, size: int) -> bytes:
    """The record at the file's position, with its framing."""
    header = file.read(HEADER.size)
    length = 0
    if len(header) == HEADER.size:
        length, checksum = HEADER.unpack(header)
        if masked(header[:8]) != checksum:
            raise corrupt(path, number, offset, "the checksum of its length differs")
    if offset + OVERHEAD + length > size:
        raise DataError(f"{path}: is cut short: record {number} at byte {offset} goes beyond its {size} bytes: {FIX}")
    raw = header + file.read(length + FOOTER.size)
    reason = damage(raw, length)
    if reason is not None:
        raise corrupt(path, number, offset, reason)
    return raw


def _read_index(path: str, shard_bytes: int) -> Index | None:
    try:
        # A record with its framing is hardly shorter than its row in the index.
        return read_arrays(path, max_bytes=2 * shard_bytes + 2**16)
    except DataError:
        # It is made again.
        return None
