"""What all sources share: the files of a data set by name, bounds on what is read, and words for messages."""

import abc
from collections.abc import Iterable, Sequence
from typing import BinaryIO, Protocol

from dmosnet_jax.core import files

# The most bytes of an image that are read, whatever a file has or claims.
MAX_BYTES = files.MAX_IMAGE_BYTES
# The most bytes of another file: the largest, `cuhk-03.mat`, has about 2 GB.
MAX_LARGE_BYTES = 2**32
_IGNORED = {"__macosx", "thumbs.db", "desktop.ini"}


class Files(Protocol):
    """Read access to the images of a data set.

    Attributes:
      location: what the user gave, for messages.
      names: paths relative to the root, with forward slashes, sorted.
    """

    location: str
    names: list[str]

    def read(self, name: str) -> bytes:
        """The content of a file; safe to call from several threads.

        Raises:
          DataError: it cannot be read, or is larger than any image; says why, the caller names the file.
        """


class Tree(abc.ABC):
    """All files below the root of a folder or zip, see `Files`."""

    def __init__(self, location: str, names: Iterable[str]):
        """Takes what the user gave, and the names of the files relative to the root."""
        self.location = location
        self.names = sorted(names)
        self._root = ""

    def narrow(self, root: str) -> None:
        """Makes `root` (empty, or ending in a slash) the root."""
        self._root += root
        self.names = [name.removeprefix(root) for name in self.names if name.startswith(root)]

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """See `Files`."""

    @abc.abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A large file for reading at any position.

        Raises:
          DataError: as `read`.
        """


def is_ignored(name: str) -> bool:
    """Whether operating systems or archivers left the file behind."""
    return any(part.startswith(".") or part.lower() in _IGNORED for part in name.split("/"))


def some(names: Sequence[str], most: int = 20) -> str:
    """The first few of many names, without control characters."""
    shown = ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def reason(error: BaseException) -> str:
    """Why something could not be read, in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
