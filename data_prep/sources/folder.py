"""The files of a folder."""

import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from data_prep.sources import base
from data_prep.sources.base import Tree, is_ignored, reason
from dmosnet_jax.core import files
from dmosnet_jax.core.errors import DataError


class FolderTree(Tree):
    """Files of a folder."""

    def __init__(self, folder: pathlib.Path, names: Iterable[str]):
        """Names files of `folder`, which the caller has found there."""
        super().__init__(str(folder), names)
        self._folder = folder

    def read(self, name: str) -> bytes:
        """See `Files`."""
        return read_file(self._folder / (self._root + name))

    def open(self, name: str) -> BinaryIO:
        """See `Tree`."""
        try:
            return files.open_local(self._folder / (self._root + name))
        except OSError as error:
            raise DataError(reason(error)) from error


def open_listed(folder: pathlib.Path, names: Iterable[str]) -> Tree:
    """Those of `names` that are files inside of `folder`; what a table names may lead elsewhere."""
    inside = folder.resolve()
    return FolderTree(folder, {name for name in names if _is_inside(folder, name, inside)})


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The content of an image, list or table.

    Raises:
      DataError: it cannot be read, is no regular file, or is larger than any of these is.
    """
    try:
        with files.open_local(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > base.MAX_BYTES:
                raise DataError(f"it has more than {base.MAX_BYTES} bytes")
            # Python makes room for as much as is asked for.
            return file.read(size)
    except OSError as error:
        raise DataError(reason(error)) from error


def refuse_link_out(source: pathlib.Path, name: str) -> None:
    """Checks a symbolic link of a folder, which may have come out of an archive.

    Raises:
      DataError: it leads out of the folder.
    """
    if not (source / name).resolve().is_relative_to(source.resolve()):
        raise DataError(
            f"source {source} is refused: {name} is a link that leads out of it: put the files themselves there"
        )


def walk(top: pathlib.Path, root: str) -> Iterator[str]:
    """Names of all files below a root in a folder, relative to the folder; links must stay inside of it."""
    pending = [root]
    while pending:
        prefix = pending.pop()
        for entry in _entries(top / prefix):
            name = prefix + entry.name
            if entry.is_symlink():
                refuse_link_out(top, name)
                if entry.is_dir():
                    raise DataError(f"source {top} is refused: {name} is a link to a folder: copy the folder")
            if entry.is_file():
                yield name
            elif entry.is_dir():
                pending.append(f"{name}/")


def children(top: pathlib.Path, prefix: str) -> dict[str, bool]:
    """Names of what lies in a folder below `top`, and whether it is a folder."""
    return {entry.name: entry.is_dir(follow_symlinks=False) for entry in _entries(top / prefix)}


def _entries(folder: pathlib.Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not is_ignored(entry.name)]
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read ({reason(error)})") from error


def _is_inside(folder: pathlib.Path, name: str, inside: pathlib.Path) -> bool:
    parts = pathlib.PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/") or "\0" in name:
        return False
    path = folder / name
    return path.is_file() and path.resolve().is_relative_to(inside)
