"""Random access to the records of TFRecord shards, checked by their CRCs, through an index beside each shard.

A shard is a sequence of records, each `uint64 length, uint32 crc(length), data, uint32 crc(data)`, little-endian, with
masked CRC32C checksums (tensorflow/core/lib/io/record_writer.h). `<shard>.index.npz` holds where each record is, and
its identity and camera, so that a split of millions of images opens without reading them.
"""

import bisect
import contextlib
import os
import struct
import tempfile
import weakref
from collections.abc import Sequence
from typing import BinaryIO

import google_crc32c
import numpy as np

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import records

INDEX_SUFFIX = ".index.npz"

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_OVERHEAD = _HEADER.size + _FOOTER.size
# Beyond so many shards a file is opened for each read: the limit on open files is often 1024.
_MAX_OPEN = 256
_ENDS = 4096
_FIX = "copy the file again, or convert the data set again"

Path = str | os.PathLike[str]
Index = dict[str, np.ndarray]


class RecordSource:
    """A sequence of serialised records over shards, in their order.

    Reads are positioned (`pread`), so threads and forked or spawned workers may share one source; it pickles without
    its open files.

    Attributes:
      paths: of the shards.
      pids: identities, int32 [N].
      camids: cameras, int32 [N].
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int] | None = None):
        """Opens the shards, whose missing or stale indices are made again.

        Args:
          paths: of the shards, local files.
          counts: how many records each shard must hold, where known: a shard cut between two records looks whole.

        Raises:
          DataError: a shard is missing, cut short, or damaged where its index had to be made again.
        """
        self.paths = [os.fspath(path) for path in paths]
        if not self.paths:
            raise DataError("a record source needs at least one shard, and none was given")
        indices = [load_index(path) for path in self.paths]
        for path, index, count in zip(self.paths, indices, counts or [], strict=counts is not None):
            found = len(index["offset"])
            if found != count:
                raise DataError(f"{path}: holds {found} records instead of {count}: {_FIX}")
        self.pids = np.concatenate([index["pid"] for index in indices])
        self.camids = np.concatenate([index["camid"] for index in indices])
        self._offsets = np.concatenate([index["offset"] for index in indices])
        self._lengths = np.concatenate([index["length"] for index in indices])
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
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"record {index} of {count}")
        row = int(index) % count
        shard = bisect.bisect_right(self._firsts, row) - 1
        offset, length = int(self._offsets[row]), int(self._lengths[row])
        raw = self._read(shard, length + _OVERHEAD, offset)
        reason = _damage(raw, length)
        if reason is not None:
            raise _corrupt(self.paths[shard], row - self._firsts[shard], offset, reason)
        return raw[_HEADER.size : -_FOOTER.size]

    def where(self, index: int) -> str:
        """The shard, record number and byte offset of a record, for messages."""
        shard = bisect.bisect_right(self._firsts, index) - 1
        return f"{self.paths[shard]}: record {index - self._firsts[shard]} at byte {int(self._offsets[index])}"

    def close(self) -> None:
        """Closes the files, when nobody reads; a later read opens them again."""
        _close(self._files)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_files"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._keep_files({})

    def _keep_files(self, files: dict[int, int]) -> None:
        self._files = files
        # Unlike __del__, this also works while the interpreter ends.
        weakref.finalize(self, _close, files)

    def _read(self, shard: int, size: int, offset: int) -> bytes:
        file = self._files.get(shard)
        try:
            if file is not None:
                return os.pread(file, size, offset)
            return self._open_and_read(shard, size, offset)
        except OSError as error:
            raise DataError(
                f"{self.paths[shard]}: cannot be read at byte {offset} ({error.strerror}): {_FIX}"
            ) from error

    def _open_and_read(self, shard: int, size: int, offset: int) -> bytes:
        file = os.open(self.paths[shard], os.O_RDONLY)
        try:
            data = os.pread(file, size, offset)
        except BaseException:
            os.close(file)
            raise
        # Another thread may have come first; a lock would not survive a fork in the middle of it.
        kept = self._files.setdefault(shard, file) if len(self._files) < _MAX_OPEN else None
        if kept != file:
            os.close(file)
        return data


def _close(files: dict[int, int]) -> None:
    while files:
        os.close(files.popitem()[1])


def load_index(path: Path) -> Index:
    """The index of a shard: from its sidecar, or made from the shard where that is missing or of another file.

    A new sidecar is written beside the shard where the folder allows it.

    Args:
      path: of the shard.

    Returns:
      `offset` int64 [n] (bytes from the file's start to the record's), `length` int64 [n] (bytes of its data), `pid`
      and `camid` int32 [n], `shard_bytes` int64 [] and `shard_ends` uint32 [] (checksum of the file's two ends).

    Raises:
      DataError: the shard is missing, cut short or damaged.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            ends = _checksum_of_ends(file.fileno(), size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): {_FIX}") from error
    stored = _read_index(path + INDEX_SUFFIX)
    if stored is not None and _fits(stored, size, ends):
        return stored
    index = _scan(path, size)
    index |= {"shard_bytes": np.array(size, np.int64), "shard_ends": np.array(ends, np.uint32)}
    # A folder that cannot be written to: the next process makes the index again.
    with contextlib.suppress(OSError):
        _write_index(path + INDEX_SUFFIX, index)
    return index


def _scan(path: str, size: int) -> Index:
    """Reads a whole shard, checking every record."""
    rows: list[tuple[int, int, int, int]] = []
    offset = 0
    with open(path, "rb", buffering=1 << 20) as file:
        while offset < size:
            raw = _next(file, path, len(rows), offset, size)
            try:
                record = records.parse(raw[_HEADER.size : -_FOOTER.size])
            except DataError as error:
                raise DataError(f"{path}: record {len(rows)} at byte {offset}: {error}; convert again") from error
            rows.append((offset, len(raw) - _OVERHEAD, record.pid, record.camid))
            offset += len(raw)
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    return {
        "offset": columns[0].copy(),
        "length": columns[1].copy(),
        "pid": columns[2].astype(np.int32),
        "camid": columns[3].astype(np.int32),
    }


def _next(file: BinaryIO, path: str, number: int, offset: int, size: int) -> bytes:
    """The record at the file's position, with its framing."""
    header = file.read(_HEADER.size)
    length = 0
    if len(header) == _HEADER.size:
        length, checksum = _HEADER.unpack(header)
        if _masked(header[:8]) != checksum:
            raise _corrupt(path, number, offset, "the checksum of its length differs")
    if offset + _OVERHEAD + length > size:
        raise DataError(f"{path}: is cut short: record {number} at byte {offset} goes beyond its {size} bytes: {_FIX}")
    raw = header + file.read(length + _FOOTER.size)
    reason = _damage(raw, length)
    if reason is not None:
        raise _corrupt(path, number, offset, reason)
    return raw


def _damage(raw: bytes, length: int) -> str | None:
    """What is wrong with a record of `length` bytes of data, framing included; None where nothing is."""
    if len(raw) != length + _OVERHEAD:
        return "the file ends before it does"
    stored, checksum = _HEADER.unpack_from(raw)
    if _masked(raw[:8]) != checksum:
        return "the checksum of its length differs"
    if stored != length:
        return f"it has {stored} bytes, in its index {length}"
    if _masked(raw[_HEADER.size : -_FOOTER.size]) != _FOOTER.unpack_from(raw, len(raw) - _FOOTER.size)[0]:
        return "the checksum of its data differs"
    return None


def _masked(data: bytes) -> int:
    """TFRecord's checksum; the mask keeps checksums of data that itself holds checksums apart."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _corrupt(path: str, number: int, offset: int, reason: str) -> DataError:
    return DataError(f"{path}: record {number} at byte {offset} is corrupt ({reason}): {_FIX}")


def _checksum_of_ends(file: int, size: int) -> int:
    """Tells apart most files of equal size, whatever a copy did to their dates."""
    head = os.pread(file, _ENDS, 0)
    return google_crc32c.extend(google_crc32c.value(head), os.pread(file, _ENDS, max(0, size - _ENDS)))


def _read_index(path: str) -> Index | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception:
        # Whatever is wrong with it, it is only a cache.
        return None


def _fits(index: Index, size: int, ends: int) -> bool:
    """Whether an index is whole and describes a file of `size` bytes from its first to its last byte."""
    kinds = {"offset": np.int64, "length": np.int64, "pid": np.int32, "camid": np.int32}
    scalars = {"shard_bytes": np.int64, "shard_ends": np.uint32}
    if set(index) != {*kinds, *scalars}:
        return False
    shape = index["offset"].shape
    if any(index[name].dtype != kind for name, kind in (kinds | scalars).items()):
        return False
    if any(index[name].shape != shape or len(shape) != 1 for name in kinds) or any(index[n].shape for n in scalars):
        return False
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(index["length"] + _OVERHEAD)])
    contiguous = (index["length"] >= 0).all() and np.array_equal(bounds[:-1], index["offset"])
    return bool(contiguous and bounds[-1] == size == index["shard_bytes"] and index["shard_ends"] == ends)


def _write_index(path: str, index: Index) -> None:
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=os.path.basename(path) + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **index)  # type: ignore[arg-type]
        # mkstemp makes private files; an index is as public as its shard.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
