"""Random access to the records of TFRecord shards, checked by their CRCs, through an index beside each shard.

A record in a shard is `uint64 length, uint32 crc(length), data, uint32 crc(data)`, little-endian, with masked CRC32C
(tensorflow/core/lib/io/record_writer.h). `<shard>.index.npz` holds the offsets of the records, their identities and
cameras, so that a split of millions of images opens without being read; it is rebuilt where it is missing or belongs to
another file. Shards are local files or remote ones, which are read by ranged requests; the index of a remote shard is
kept on this machine, in `$DMOSNET_CACHE` (default: `~/.cache/dmosnet_jax/indices`).
"""

import bisect
import concurrent.futures
import contextlib
import hashlib
import io
import os
import struct
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import google_crc32c
import numpy as np

from dmosnet_jax.core import files
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.files import Path
from dmosnet_jax.core.safe_npz import read_arrays
from dmosnet_jax.data import records

Index = dict[str, np.ndarray]

INDEX_SUFFIX = ".index.npz"
# The checksum of so many bytes at each end of a shard tells most files of equal size apart, also after a copy.
ENDS = 4096
FIX = "copy the file again, or convert the data set again"

_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
_OVERHEAD = _HEADER.size + _FOOTER.size
_COLUMNS: dict[str, Any] = {"offset": np.int64, "length": np.int64, "pid": np.int32, "camid": np.int32}
_SCALARS: dict[str, Any] = {"shard_bytes": np.int64, "shard_ends": np.uint32}
# The limit on open files is often 1024; the files of further shards are opened for each read.
_MAX_OPEN = 256
# Opening a remote shard waits for several requests; a large data set has hundreds of shards.
_OPENING_THREADS = 16


def frame(data: bytes) -> bytes:
    """A record with its length and checksums, as in a shard."""
    length = len(data).to_bytes(8, "little")
    return b"".join((length, _FOOTER.pack(_masked_crc(length)), data, _FOOTER.pack(_masked_crc(data))))


def _masked_crc(data: bytes) -> int:
    """TFRecord's checksum, masked so that data may hold checksums themselves."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _damage(raw: bytes, length: int) -> str | None:
    """What is wrong with a record of `length` bytes of data, framing included; None where nothing is."""
    if len(raw) != length + _OVERHEAD:
        return "the file ends before it does"
    stored, checksum = _HEADER.unpack_from(raw)
    if _masked_crc(raw[:8]) != checksum:
        return "the checksum of its length differs"
    if stored != length:
        return f"it has {stored} bytes, in its index {length}"
    if _masked_crc(raw[_HEADER.size : -_FOOTER.size]) != _FOOTER.unpack_from(raw, len(raw) - _FOOTER.size)[0]:
        return "the checksum of its data differs"
    return None


def _corrupt(path: str, number: int, offset: int, reason: str) -> DataError:
    return DataError(f"{path}: record {number} at byte {offset} is corrupt ({reason}): {FIX}")


def load_index(path: Path) -> Index:
    """The index of a shard: from its sidecar, or built from the shard where that is missing or belongs to another file.

    A new sidecar is written beside the shard where the folder allows it; that of a remote shard is kept locally.

    Returns:
      `offset` int64 [n] (bytes from the file's start to the record's), `length` int64 [n] (bytes of its data), `pid`
      and `camid` int32 [n], `shard_bytes` int64 [] and `shard_ends` uint32 [] (checksum of the file's two ends).
      `splits.Split.record` compares identities and cameras with those of the records.

    Raises:
      DataError: the shard is missing, cut short or damaged.
    """
    path = os.fspath(path)
    is_remote = files.is_remote(path)
    sidecar = path + INDEX_SUFFIX
    local = _cached(path) if is_remote else sidecar
    try:
        size = files.size(path)
        head, tail = (files.read_range(path, start, min(ENDS, size)) for start in (0, max(0, size - ENDS)))
        ends = checksum_of_ends(head, tail)
        index = _read_index(local, size, ends)
        if index is not None:
            return index
        index = _read_index(sidecar, size, ends) if is_remote else None
        if index is None:
            index = make_index(files.again(lambda: list(_scan(path, size)), path), size, ends)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): {FIX}") from error
    # Where the folder cannot be written to, the next process builds the index again.
    with contextlib.suppress(OSError):
        files.write(local, to_bytes(index))
    return index


def make_index(rows: Sequence[tuple[int, int, int, int]], size: int, ends: int) -> Index:
    """The index of a shard of `size` bytes from offset, length, identity and camera of every record."""
    columns = np.array(rows, np.int64).reshape(-1, len(_COLUMNS)).T
    index = {name: column.astype(kind) for (name, kind), column in zip(_COLUMNS.items(), columns, strict=True)}
    return index | {"shard_bytes": np.array(size, np.int64), "shard_ends": np.array(ends, np.uint32)}


def checksum_of_ends(head: bytes, tail: bytes) -> int:
    """The checksum of the first and the last `ENDS` bytes of a file, or of all of it twice."""
    return google_crc32c.extend(google_crc32c.value(head), tail)


def to_bytes(index: Index) -> bytes:
    """An index as the content of its file."""
    file = io.BytesIO()
    np.savez(file, **index)  # type: ignore[arg-type]
    return file.getvalue()


def _read_index(path: str, size: int, ends: int) -> Index | None:
    """A stored index, where it is whole and describes a shard of these bytes and ends."""
    try:
        # A record with its framing is hardly shorter than its row in the index.
        index = read_arrays(path, max_bytes=2 * size + 2**16)
    except DataError:
        return None
    if {name: array.dtype for name, array in index.items()} != _COLUMNS | _SCALARS:
        return None
    rows = index["offset"].size
    if any(array.shape != ((rows,) if name in _COLUMNS else ()) for name, array in index.items()):
        return None
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(index["length"] + _OVERHEAD)])
    contiguous = (index["length"] >= 0).all() and np.array_equal(bounds[:-1], index["offset"])
    fits = contiguous and bounds[-1] == size == index["shard_bytes"] and index["shard_ends"] == ends
    return index if fits else None


def _scan(path: str, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Offset, length, identity and camera of every record, all of which are read and checked."""
    offset = number = 0
    with files.open_stream(path) as file:
        while offset < size:
            header = file.read(_HEADER.size)
            length = 0
            if len(header) == _HEADER.size:
                length, checksum = _HEADER.unpack(header)
                if _masked_crc(header[:8]) != checksum:
                    raise _corrupt(path, number, offset, "the checksum of its length differs")
            end = offset + length + _OVERHEAD
            if end > size:
                text = f"is cut short: record {number} at byte {offset} goes beyond its {size} bytes"
                raise DataError(f"{path}: {text}: {FIX}")
            raw = header + file.read(length + _FOOTER.size)
            reason = _damage(raw, length)
            if reason is not None:
                raise _corrupt(path, number, offset, reason)
            try:
                record = records.parse(raw[_HEADER.size : -_FOOTER.size])
            except DataError as error:
                raise DataError(f"{path}: record {number} at byte {offset}: {error}; convert again") from error
            yield offset, length, record.pid, record.camid
            offset, number = end, number + 1


def where_index_is(path: str) -> str:
    """The file, or the two files, that hold the index of a shard, for messages."""
    return path + INDEX_SUFFIX + (f" and {_cached(path)}" if files.is_remote(path) else "")


def _cached(path: str) -> str:
    """Where the index of a remote shard is kept on this machine."""
    folder = os.environ.get("DMOSNET_CACHE") or os.path.expanduser("~/.cache/dmosnet_jax/indices")
    return os.path.join(folder, hashlib.blake2b(path.encode(), digest_size=16).hexdigest() + INDEX_SUFFIX)


class RecordSource:
    """A sequence of serialised records over shards, in their order, with `lengths` in bytes, `pids` and `camids`, [N].

    Reads are positioned (`pread`, or a range of a remote file), so threads and forked or spawned workers may share one
    source; it pickles without its open files.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int] | None = None):
        """Opens the shards, whose missing or stale indices are built again.

        Args:
          paths: of the shards, or their URLs.
          counts: how many records each shard must hold, where known: a shard cut between two records looks whole.

        Raises:
          DataError: a shard is missing, cut short, or damaged where its index had to be built again.
        """
        self.paths = [os.fspath(path) for path in paths]
        if not self.paths:
            raise DataError("a record source needs at least one shard, and none was given")
        indices = _load_indices(self.paths)
        for path, index, count in zip(self.paths, indices, counts or [], strict=counts is not None):
            found = len(index["offset"])
            if found != count:
                raise DataError(f"{path}: holds {found} records instead of {count}: {FIX}")
        columns = {name: np.concatenate([index[name] for index in indices]) for name in _COLUMNS}
        self.lengths, self.pids, self.camids = columns["length"], columns["pid"], columns["camid"]
        self._offsets = columns["offset"]
        # Number of the first record of each shard; a list, because bisect on arrays makes a scalar per comparison.
        self._firsts = [0, *np.cumsum([len(index["offset"]) for index in indices]).tolist()]
        self._keep_files({})

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> bytes:
        """The record's bytes, after their checksums were compared.

        Raises:
          IndexError: there is no such record.
          DataError: the record is damaged; the message names the shard, the record in it, and its byte offset.
        """
        path, number, offset = self.locate(index)
        length = int(self.lengths[index])
        try:
            raw = self._read(path, length + _OVERHEAD, offset)
        except OSError as error:
            raise DataError(f"{path}: cannot be read at byte {offset} ({error.strerror}): {FIX}") from error
        reason = _damage(raw, length)
        if reason is not None:
            raise _corrupt(path, number, offset, reason)
        return raw[_HEADER.size : -_FOOTER.size]

    def locate(self, index: int) -> tuple[str, int, int]:
        """Path of the shard, record number in it, and byte offset of a record.

        Raises:
          IndexError: there is no such record.
        """
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"record {index} of {count}")
        row = int(index) % count
        shard = bisect.bisect_right(self._firsts, row) - 1
        return self.paths[shard], row - self._firsts[shard], int(self._offsets[row])

    def close(self) -> None:
        """Closes the files, when nobody reads; a later read opens them again."""
        _close(self._files)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_files"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._keep_files({})

    def _keep_files(self, opened: dict[str, int]) -> None:
        self._files = opened
        # Unlike __del__, this also works while the interpreter ends.
        weakref.finalize(self, _close, opened)

    def _read(self, path: str, size: int, offset: int) -> bytes:
        if files.is_remote(path):
            return files.read_range(path, offset, size)
        kept = self._files.get(path)
        if kept is not None:
            return os.pread(kept, size, offset)
        file = os.open(path, os.O_RDONLY)
        try:
            data = os.pread(file, size, offset)
            # Another thread may have come first; a lock would not survive a fork in the middle of it.
            kept = self._files.setdefault(path, file) if len(self._files) < _MAX_OPEN else None
        finally:
            if kept != file:
                os.close(file)
        return data


def _close(opened: dict[str, int]) -> None:
    while opened:
        os.close(opened.popitem()[1])


def _load_indices(paths: Sequence[str]) -> list[Index]:
    if not any(map(files.is_remote, paths)):
        return [load_index(path) for path in paths]
    with concurrent.futures.ThreadPoolExecutor(_OPENING_THREADS) as pool:
        return list(pool.map(load_index, paths))
