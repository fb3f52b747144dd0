"""All files of a raw data set at any depth, in a folder or a zip, for data sets that lists or tables describe.

What a list names is only ever looked up among the files found here, so no list can lead elsewhere.
"""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Protocol

from data_prep.raw import (
    UNREADABLE_ENTRY,
    is_ignored,
    open_archive,
    read_entry,
    read_file,
    reason,
    refuse_links_out,
    safe_entries,
    some,
)
from dmosnet_jax.core.errors import DataError

# The largest single file that a data set is given out as has about 2 GB.
_MAX_PART = 2**34
# Nested deeper, a file of the right name belongs to something else.
_DEPTH = 2


class RawTree(Protocol):
    """As `raw.RawFiles`, of every file below the root.

    Attributes:
      location: what the user gave, for messages.
      names: paths of all files relative to the root, with forward slashes, sorted.
    """

    location: str
    names: list[str]

    def read(self, name: str) -> bytes:
        """The content of a file; safe to call from several threads.

        Raises:
          DataError: it cannot be read, or is larger than any image; says why, the caller names the file.
        """

    def open(self, name: str) -> BinaryIO:
        """A large file for reading at any position.

        Raises:
          DataError: as `read`.
        """

    def narrow(self, prefix: str) -> None:
        """Makes `prefix` (empty, or ending in a slash) the root."""


def open_tree(source: str | os.PathLike[str], marks: Sequence[str] = ()) -> RawTree:
    """Opens a folder or zip.

    Args:
      source: folder or zip file.
      marks: names of files or folders of which the root has at least one; the root is the source or a folder nested in
        it. Without marks the root is the source.

    Returns:
      All files below the root, without those that operating systems leave behind.

    Raises:
      DataError: the source is missing or of another kind, is an unsafe zip, holds a link that leads out of it, or has
        no such root, or several.
    """
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        tree: _FolderTree | _ZipTree = _FolderTree(path)
    else:
        tree = _ZipTree(path)
    if marks:
        tree.narrow(_root(tree, marks))
    return tree


def open_beside(path: pathlib.Path) -> RawTree:
    """The files in the folder of a file, not in folders below it."""
    return _FolderTree(path.absolute().parent, deep=False)


def open_listed(folder: pathlib.Path, names: Sequence[str]) -> RawTree:
    """The files of a folder that a table names.

    Raises:
      DataError: some are not files inside of the folder; lists them.
    """
    inside = folder.resolve()
    wrong = [name for name in names if not _is_inside(folder, name, inside)]
    if wrong:
        raise DataError(
            f"source {folder}: {len(wrong)} paths of the table are not files inside of it (give them relative to the "
            f"table): {some(wrong)}"
        )
    tree = _FolderTree(folder, deep=False)
    tree.names = sorted(set(names))
    return tree


def _is_inside(folder: pathlib.Path, name: str, inside: pathlib.Path) -> bool:
    parts = pathlib.PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/") or "\0" in name:
        return False
    path = folder / name
    return path.is_file() and path.resolve().is_relative_to(inside)


class _Tree:
    location: str
    names: list[str]
    _prefix = ""

    def narrow(self, prefix: str) -> None:
        """Makes `prefix` (empty, or ending in a slash) the root."""
        self._prefix += prefix
        self.names = [name.removeprefix(prefix) for name in self.names if name.startswith(prefix)]


class _FolderTree(_Tree):
    def __init__(self, path: pathlib.Path, deep: bool = True):
        self.location = str(path)
        self._path = path
        if deep:
            self.names = sorted(_walk(path, self.location))
        else:
            self.names = sorted(entry.name for entry in path.iterdir() if entry.is_file())

    def read(self, name: str) -> bytes:
        return read_file(self._path / (self._prefix + name))

    def open(self, name: str) -> BinaryIO:
        try:
            return (self._path / (self._prefix + name)).open("rb")
        except OSError as error:
            raise DataError(reason(error)) from error


class _ZipTree(_Tree):
    def __init__(self, path: pathlib.Path):
        self.location = str(path)
        self._archive = open_archive(path)
        self._entries = safe_entries(self.location, self._archive)
        self.names = sorted(self._entries)

    def read(self, name: str) -> bytes:
        return read_entry(self._archive, self._entries[self._prefix + name])

    def open(self, name: str) -> BinaryIO:
        info = self._entries[self._prefix + name]
        if info.file_size > _MAX_PART:
            raise DataError(f"it has more than {_MAX_PART} bytes")
        # A compressed entry can be read from front to back only. The copy has no name: it goes when it is closed, or
        # with the process.
        copy = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
        try:
            with self._archive.open(info) as entry:
                shutil.copyfileobj(entry, copy, 2**22)
        except UNREADABLE_ENTRY as error:
            copy.close()
            raise DataError(f"{reason(error)}: extract it and give the folder") from error
        copy.seek(0)
        return copy


def _walk(top: pathlib.Path, location: str) -> Iterator[str]:
    """Names of all files below a folder, relative to it; links are followed where they stay inside."""
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(top / prefix) as found:
                entries = [entry for entry in found if not is_ignored(entry.name)]
            for entry in entries:
                name = prefix + entry.name
                if entry.is_symlink():
                    refuse_links_out(top, [pathlib.Path(entry.path)])
                if entry.is_file():
                    yield name
                elif entry.is_symlink() and entry.is_dir():
                    raise DataError(f"source {location} is refused: {name} is a link to a folder: copy the folder")
                elif entry.is_dir():
                    pending.append(f"{name}/")
        except OSError as error:
            raise DataError(f"folder {top / prefix} cannot be read ({reason(error)})") from error


def _root(tree: _Tree, marks: Sequence[str]) -> str:
    """The least deep folder that has one of the marks."""
    roots: dict[str, int] = {}
    for name in tree.names:
        parts = name.split("/")
        for depth, part in enumerate(parts[: _DEPTH + 1]):
            if part in marks:
                roots["".join(f"{above}/" for above in parts[:depth])] = depth
                break
    if not roots:
        held = some(sorted({name.split("/")[0] for name in tree.names}), 5) or "nothing"
        raise DataError(
            f"source {tree.location} has no {' or '.join(marks)}; it holds {held}: "
            "give the root of the data set or its zip file"
        )
    least = [root for root, depth in roots.items() if depth == min(roots.values())]
    if len(least) > 1:
        raise DataError(
            f"source {tree.location} holds several data sets ({', '.join(sorted(least))}): give one of them"
        )
    return least[0]
