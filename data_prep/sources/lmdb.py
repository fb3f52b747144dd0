"""The LMDB form of LUPerson: images by keys, which `keys.pkl` beside it may list."""

import io
import os
from collections.abc import Sequence
from typing import Any

from dmosnet_jax.core import files
from dmosnet_jax.core.errors import ConfigError, DataError, printable
from dmosnet_jax.core.safe_pickle import MAX_PLAIN_OPCODES, Global, Opaque, PlainVocabulary, interpret

KEYS_FILE = "keys.pkl"


class Database:
    """An LMDB to read; what is damaged in it is a `DataError`.

    Attributes:
      entries: how many it claims to have.
    """

    def __init__(self, data: str):
        """Opens the database.

        Args:
          data: its file.

        Raises:
          ConfigError: the package is not installed.
          DataError: it is damaged.
        """
        try:
            import lmdb
        except ImportError as error:
            raise ConfigError(
                f"an LMDB needs one more package ({error}): pip install 'dmosnet_jax[convert]'"
            ) from error
        self._data, self._error = data, lmdb.Error
        try:
            self._env = lmdb.open(data, subdir=False, readonly=True, lock=False, readahead=False, max_readers=1)
            self.entries = self._env.stat()["entries"]
            whole = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        except lmdb.Error as error:
            raise DataError(f"{data} cannot be opened ({printable(error)}): copy the LMDB again") from error
        # Beyond the end of the file, the mapped memory would end the process.
        if os.path.getsize(data) < whole:
            self._env.close()
            raise DataError(f"{data} is cut short: it has {os.path.getsize(data):,} of {whole:,} bytes: copy it again")
        self._transaction = self._env.begin(buffers=True)

    def all_keys(self) -> list[str]:
        """All keys.

        Raises:
          DataError: the pages that hold them are damaged.
        """
        try:
            return [bytes(key).decode("ascii", "replace") for key in self._transaction.cursor().iternext(values=False)]
        except self._error as error:
            raise DataError(f"{self._data} is damaged ({printable(error)}): copy the LMDB again") from error

    def size(self, key: str) -> int:
        """Bytes of a value; 0 where it is missing or cannot be read."""
        try:
            return len(self._transaction.get(key.encode()) or b"")
        except self._error:
            return 0

    def read(self, key: str) -> bytes:
        """A value.

        Raises:
          DataError: it is missing, or its page is damaged.
        """
        try:
            value = self._transaction.get(key.encode())
        except self._error as error:
            raise DataError(f"its page in the LMDB is damaged ({printable(error)})") from error
        if value is None:
            raise DataError("it is not in the LMDB")
        return bytes(value)


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
