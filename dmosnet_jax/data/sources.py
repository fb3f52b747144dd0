"""Random access to the records of TFRecord shards, checked by their CRCs, through an index beside each shard.

Shards are local files or remote ones, which are read by ranged requests. See `framing` and `indices`.
"""

import bisect
import concurrent.futures
import os
import weakref
from collections.abc import Sequence

import numpy as np

from dmosnet_jax.core import files
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.files import Path
from dmosnet_jax.data.framing import FOOTER, HEADER, OVERHEAD, damage
from dmosnet_jax.data.indices import FIX, INDEX_SUFFIX, Index, corrupt, load_index

__all__ = ["INDEX_SUFFIX", "Index", "Path", "RecordSource", "load_index"]

# Beyond so many shards a file is opened for each read: the limit on open files is often 1024.
_MAX_OPEN = 256
# Opening a remote shard waits for several requests; a large data set has hundreds of shards.
_OPENING = 16


class RecordSource:
    """A sequence of serialised records over shards, in their order.

    Reads are positioned (`pread`, or a range of a remote file), so threads and forked or spawned workers may share one
    source; it pickles without its open files.

    Attributes:
      paths: of the shards.
      pids: identities, int32 [N].
      camids: cameras, int32 [N].
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int] | None = None):
        """Opens the shards, whose missing or stale indices are made again.

        Args:
          paths: of the shards, or their URLs.
          counts: how many records each shard must hold, where known: a shard cut between two records looks whole.

        Raises:
          DataError: a shard is missing, cut short, or damaged where its index had to be made again.
        """
        self.paths = [os.fspath(path) for path in paths]
        if not self.paths:
            raise DataError("a record source needs at least one shard, and none was given")
        indices = _load_indices(self.paths)
        for path, index, count in zip(self.paths, indices, counts or [], strict=counts is not None):
            found = len(index["offset"])
            if found != count:
                raise DataError(f"{path}: holds {found} records instead of {count}: {FIX}")
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
        raw = self._read(shard, length + OVERHEAD, offset)
        reason = damage(raw, length)
        if reason is not None:
            raise corrupt(self.paths[shard], row - self._firsts[shard], offset, reason)
        return raw[HEADER.size : -FOOTER.size]

    @property
    def lengths(self) -> np.ndarray:
        """Bytes of each record, int64 [N]."""
        return self._lengths

    def shard(self, index: int) -> str:
        """Path of the shard that holds a record."""
        return self.paths[bisect.bisect_right(self._firsts, index % len(self)) - 1]

    def where(self, index: int) -> str:
        """The shard, record number and byte offset of a record, for messages."""
        row = index % len(self)
        shard = bisect.bisect_right(self._firsts, row) - 1
        return f"{self.paths[shard]}: record {row - self._firsts[shard]} at byte {int(self._offsets[row])}"

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
        path = self.paths[shard]
        try:
            if files.is_remote(path):
                return files.read_range(path, offset, size)
            file = self._files.get(shard)
            if file is not None:
                return os.pread(file, size, offset)
            return self._open_and_read(shard, size, offset)
        except OSError as error:
            raise DataError(f"{path}: cannot be read at byte {offset} ({error.strerror}): {FIX}") from error

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


def _load_indices(paths: Sequence[str]) -> list[Index]:
    if not any(map(files.is_remote, paths)):
        return [load_index(path) for path in paths]
    with concurrent.futures.ThreadPoolExecutor(_OPENING) as pool:
        return list(pool.map(load_index, paths))
