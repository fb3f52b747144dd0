"""The LMDB form of LUPerson: images by keys, which `keys.pkl` beside it may list."""

import bisect
import functools
import io
import operator
import os
import struct
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.sources import base
from data_prep.sources.base import reason
from dmosnet_jax.core import files
from dmosnet_jax.core.errors import DataError, printable
from dmosnet_jax.core.safe_pickle import MAX_PLAIN_OPCODES, Global, Opaque, PlainVocabulary, interpret

KEYS_FILE = "keys.pkl"


# <lmdb.h>, mdb.c of LMDB 0.9: the format of its file, on the 64-bit little-endian machines that write such.
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_PAGE_HEADER = 16
_BRANCH, _LEAF, _OVERFLOW = 0x01, 0x02, 0x04
_BIG, _OTHER_DATA = 0x01, 0x02 | 0x04
# Fields behind the header of the first two pages: magic, version, page size; flags, entries and root of the main
# database; last page, transaction.
_META = struct.Struct("<II16xI44x4xHxx24xQQQQ")
_NODE = struct.Struct("<HHHH")
# Every level holds at least two pages for one of the level above.
_MOST_LEVELS = 32
_PAGE_SIZES = tuple(2**power for power in range(9, 17))
_KEPT_PAGES = 512


class _DamagedError(Exception):
    pass


_DAMAGED = (_DamagedError, OSError, struct.error, IndexError, ValueError)


class Database:
    """An LMDB to read; what is damaged in it is a `DataError`.

    Its own library maps the file into memory and believes what is there: a damaged page ends the process. Here every
    page, offset and size is checked against the file.

    Attributes:
      entries: how many it claims to have.
    """

    def __init__(self, data: str):
        """Opens the database.

        Args:
          data: its file.

        Raises:
          DataError: it is damaged.
        """
        self._data = data
        try:
            self._file = files.open_local(data)
            weakref.finalize(self, self._file.close)
            self._size = os.fstat(self._file.fileno()).st_size
            page_size, last, self.entries, self._root = self._newest_meta()
        except _DAMAGED as error:
            raise DataError(f"{data} cannot be opened ({printable(reason(error))}): copy the LMDB again") from error
        self._page_size = page_size
        whole = (last + 1) * page_size
        if self._size < whole:
            raise DataError(f"{data} is cut short: it has {self._size:,} of {whole:,} bytes: copy it again")
        self._page = functools.lru_cache(_KEPT_PAGES)(self._read_page)

    def _newest_meta(self) -> tuple[int, int, int, int]:
        """Page size, last page, entries and root of the newer of the two descriptions that are whole."""
        found = []
        start = self._read(0, 2**16 + 4096)
        for offset in (0, *_PAGE_SIZES):
            if offset + _PAGE_HEADER + _META.size > len(start):
                continue
            magic, version, size, flags, entries, root, last, number = _META.unpack_from(start, offset + _PAGE_HEADER)
            is_whole = (magic, version, flags) == (_MAGIC, _VERSION, 0) and size in _PAGE_SIZES
            # The second is one page behind the first, whatever a page is.
            if is_whole and offset in (0, size):
                found.append((number, size, last, entries, root))
        if not found:
            raise _DamagedError("it is no LMDB of this format")
        return max(found)[1:]

    def _read(self, offset: int, size: int) -> bytes:
        if offset > self._size:
            raise _DamagedError("a page beyond the end of the file")
        return os.pread(self._file.fileno(), size, offset)

    def _read_page(self, number: int) -> tuple[int, list[tuple[bytes, int, int, int]]]:
        """Whether a page is a branch or a leaf, and its nodes: key, place behind it, number in the header, flags."""
        page = self._read(number * self._page_size, self._page_size)
        own, _, kind, lower, upper = struct.unpack_from("<QHHHH", page)
        kind &= _BRANCH | _LEAF | _OVERFLOW
        if own != number or kind not in (_BRANCH, _LEAF) or not _PAGE_HEADER <= lower <= upper <= self._page_size:
            raise _DamagedError(f"page {number} is no page of keys")
        nodes = []
        for place in struct.unpack_from(f"<{(lower - _PAGE_HEADER) // 2}H", page, _PAGE_HEADER):
            low, high, flags, length = _NODE.unpack_from(page, place)
            begin = place + _NODE.size
            if place < upper or begin + length > self._page_size:
                raise _DamagedError(f"page {number} has a key outside of it")
            nodes.append((page[begin : begin + length], begin + length, low | high << 16, flags))
        return kind, nodes

    def _leaves(self) -> Iterator[tuple[int, list[tuple[bytes, int, int, int]]]]:
        """Numbers and nodes of the leaves, from left to right."""
        pending, seen = [(self._root, 0)], set[int]()
        while pending:
            number, depth = pending.pop()
            if number in seen or depth > _MOST_LEVELS:
                raise _DamagedError(f"page {number} is below itself")
            seen.add(number)
            kind, nodes = self._page(number)
            if kind == _LEAF:
                yield number, nodes
            else:
                pending += [(low | flags << 32, depth + 1) for _, _, low, flags in reversed(nodes)]

    def all_keys(self) -> list[str]:
        """All keys.

        Raises:
          DataError: the pages that hold them are damaged.
        """
        if not self.entries:
            return []
        try:
            keys = [key.decode("ascii", "replace") for _, nodes in self._leaves() for key, *_ in nodes]
        except _DAMAGED as error:
            raise DataError(f"{self._data} is damaged ({printable(reason(error))}): copy the LMDB again") from error
        if len(keys) != self.entries:
            raise DataError(f"{self._data} is damaged (it has {len(keys):,} of {self.entries:,} keys): copy it again")
        return keys

    def _find(self, key: bytes) -> tuple[int, int] | None:
        """Offset and size of a value; None where there is no such key."""
        number = self._root
        for _ in range(_MOST_LEVELS if self.entries else 0):
            kind, nodes = self._page(number)
            if kind == _LEAF:
                at = bisect.bisect_left(nodes, key, key=operator.itemgetter(0))
                if at == len(nodes) or nodes[at][0] != key:
                    return None
                return self._value(number, *nodes[at][1:])
            # The first key of a branch is empty, and stands for all that is less.
            at = bisect.bisect_right(nodes, key, lo=1, key=operator.itemgetter(0)) - 1
            number = nodes[at][2] | nodes[at][3] << 32
        if self.entries:
            raise _DamagedError("its pages go round in circles")
        return None

    def _value(self, number: int, place: int, size: int, flags: int) -> tuple[int, int]:
        start = number * self._page_size
        if flags & _OTHER_DATA or size > base.MAX_BYTES:
            raise _DamagedError(f"page {number} holds something else than an image")
        if not flags & _BIG:
            if place + size > self._page_size:
                raise _DamagedError(f"page {number} has a value outside of it")
            return start + place, size
        (first,) = struct.unpack("<Q", self._read(start + place, 8))
        own, _, kind, pages = struct.unpack("<QHHI", self._read(first * self._page_size, _PAGE_HEADER))
        if own != first or not kind & _OVERFLOW or pages * self._page_size < size + _PAGE_HEADER:
            raise _DamagedError(f"page {first} holds no value of {size:,} bytes")
        return first * self._page_size + _PAGE_HEADER, size

    def size(self, key: str) -> int:
        """Bytes of a value; 0 where it is missing or cannot be read."""
        try:
            found = self._find(key.encode())
        except _DAMAGED:
            return 0
        return found[1] if found else 0

    def read(self, key: str) -> bytes:
        """A value.

        Raises:
          DataError: it is missing, or its page is damaged.
        """
        try:
            found = self._find(key.encode())
            value = self._read(*found) if found else b""
        except _DAMAGED as error:
            raise DataError(f"its page in the LMDB is damaged ({printable(reason(error))})") from error
        if found is None:
            raise DataError("it is not in the LMDB")
        if len(value) != found[1]:
            raise DataError("its page in the LMDB is damaged (the file ends in it)")
        return value


def listed_keys(data: str) -> list[str] | None:
    """The keys of `keys.pkl`, in the folder of the database or above it; None where there is no such file."""
    folder = os.path.dirname(data) or "."
    for path in (os.path.join(folder, KEYS_FILE), os.path.join(os.path.dirname(folder), KEYS_FILE)):
        if os.path.isfile(path):
            return read_keys(path)
    return None


class _KeysVocabulary(PlainVocabulary):
    """Lists of labels beside the keys may be NumPy arrays: they become marks that nobody looks at."""

    _INERT = frozenset(
        f"{module}.{name}"
        for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy._core.numeric")
        for name in ("dtype", "ndarray", "_reconstruct", "scalar", "_frombuffer")
    )

    def resolve(self, name: str) -> Global:
        return Global(name) if name in self._INERT else super().resolve(name)

    def call(self, function: Global, arguments: Sequence[Any]) -> Any:
        return Opaque(function.name) if function.name in self._INERT else super().call(function, arguments)


def read_keys(path: str | os.PathLike[str]) -> list[str]:
    """Reads `keys.pkl`; nothing in it is ever run.

    Args:
      path: a pickled list of keys, or a dict with `keys`.

    Raises:
      DataError: it cannot be read, is refused, or holds something else.
    """
    where = os.fspath(path)
    try:
        content = files.read(where)
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror})") from error
    vocabulary = _KeysVocabulary(where)
    value = interpret(io.BytesIO(content), vocabulary, where, kind="a list of keys", max_opcodes=MAX_PLAIN_OPCODES)
    if isinstance(value, dict):
        value = value.get("keys", value.get(b"keys"))
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{where}: holds neither a list of keys nor a dict with `keys`: copy the file again")
    keys = [key.decode("ascii", "replace") if isinstance(key, bytes) else key for key in value]
    wrong = next((key for key in keys if not isinstance(key, str)), None)
    if wrong is not None:
        raise DataError(f"{where}: {printable(wrong, 60)} among the keys is not text: copy the file again")
    return keys
