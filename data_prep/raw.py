"""Files of a raw data set, as its folder or its zip has them; a zip is read in place and never extracted."""

import os
import pathlib
import re
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from dmosnet_jax.core.errors import DataError

# A person crop is some kilobytes; a zip may claim any size.
MAX_BYTES = 2**26
# The decompressors have errors of their own.
UNREADABLE_ENTRY = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)
# Image files hardly get smaller in a zip.
_MAX_RATIO = 100
_HERE = re.compile(r"^(?:\./+)+")
_IGNORED = {"__macosx", "thumbs.db", "desktop.ini"}
# Nested deeper, a folder of the right name belongs to something else.
_FOLDER_DEPTH = 2


class RawFiles(Protocol):
    """Read access to the files of a data set, by their path relative to its root.

    Attributes:
      location: what the user gave, for messages.
      names: paths of all files in the folders asked for, with forward slashes, sorted.
    """

    location: str
    names: list[str]

    def read(self, name: str) -> bytes:
        """The content of a file; safe to call from several threads.

        Raises:
          DataError: it cannot be read; says why, the caller names the file.
        """


def open_raw(source: str | os.PathLike[str], folders: Sequence[str]) -> RawFiles:
    """Finds a data set in a folder or a zip: at its top, or in a folder nested in it.

    Args:
      source: folder or zip file.
      folders: names of the folders that the root of the data set must have.

    Returns:
      The files in these folders (not in folders below them), without those that operating systems leave behind.

    Raises:
      DataError: the source is missing or of another kind, is an unsafe zip, or lacks a folder.
    """
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return _Folder(path, folders)
    return _Zip(path, open_archive(path), folders)


def open_archive(path: pathlib.Path) -> zipfile.ZipFile:
    """Opens a zip file.

    Raises:
      DataError: it does not exist, or is no whole zip file.
    """
    if not path.exists():
        raise DataError(f"source {path} does not exist: give the folder or the zip file of the data set")
    try:
        return zipfile.ZipFile(path)
    # Damaged archives raise more kinds of errors than zipfile documents.
    except Exception as error:
        why = "it is not a zip file" if isinstance(error, zipfile.BadZipFile) else reason(error)
        raise DataError(f"source {path} cannot be opened ({why}): give a folder or a whole zip file") from error


def safe_entries(location: str, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The files in an archive by name, with forward slashes, without what operating systems leave behind.

    Raises:
      DataError: an entry leads out of the archive, is a link or a device, is encrypted, or comes twice; or the files
        would be far larger than image files can be.
    """
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        # Some Windows tools write the separators of their system.
        name = _HERE.sub("", info.filename.replace("\\", "/"))
        _refuse_unsafe(location, name, info)
        if info.is_dir() or is_ignored(name):
            continue
        if name in entries:
            raise DataError(f"source {location} is refused: it holds {name!r} twice")
        entries[name] = info
    packed = sum(info.compress_size for info in entries.values())
    unpacked = sum(info.file_size for info in entries.values())
    if unpacked > MAX_BYTES + _MAX_RATIO * packed:
        raise DataError(
            f"source {location} is refused: its {packed:,} bytes claim to hold {unpacked:,}, which images never do"
        )
    return entries


class _Folder:
    def __init__(self, path: pathlib.Path, folders: Sequence[str]):
        self.location = str(path)
        below = [path]
        roots: list[pathlib.Path] = []
        for _ in range(1 + _FOLDER_DEPTH):
            roots = [folder for folder in below if any((folder / name).is_dir() for name in folders)]
            if roots:
                break
            below = [entry for folder in below for entry in _entries(folder) if entry.is_dir()]
        prefixes = ["" if root == path else root.relative_to(path).as_posix() + "/" for root in roots]
        self._root = path / _only(self.location, prefixes, folders, (entry.name for entry in _entries(path)))
        present = [name for name in folders if (self._root / name).is_dir()]
        _require(self.location, present, folders)
        found = [entry for name in folders for entry in (self._root / name, *_entries(self._root / name))]
        refuse_links_out(path, (entry for entry in found if entry.is_symlink()))
        self.names = sorted(f"{entry.parent.name}/{entry.name}" for entry in found if entry.is_file())

    def read(self, name: str) -> bytes:
        return read_file(self._root / name)


class _Zip:
    def __init__(self, path: pathlib.Path, archive: zipfile.ZipFile, folders: Sequence[str]):
        self.location = str(path)
        self._archive = archive
        entries = safe_entries(self.location, archive)
        prefixes: dict[str, None] = {}
        for name in entries:
            parts = name.split("/")
            if len(parts) > 1 and parts[-2] in folders:
                prefixes["/".join(parts[:-2]) + "/" if len(parts) > 2 else ""] = None
        prefix = _only(self.location, list(prefixes), folders, sorted({name.split("/")[0] for name in entries}))
        self._infos = {
            name.removeprefix(prefix): info
            for name, info in entries.items()
            if name.startswith(prefix) and name.removeprefix(prefix).rpartition("/")[0] in folders
        }
        self.names = sorted(self._infos)
        _require(self.location, {name.split("/")[0] for name in self.names}, folders)

    def read(self, name: str) -> bytes:
        return read_entry(self._archive, self._infos[name])


def read_file(path: pathlib.Path) -> bytes:
    """The content of an image, list or table.

    Raises:
      DataError: it cannot be read, or is larger than any of these is.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"it has more than {MAX_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise DataError(reason(error)) from error


def read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """The content of an image, list or table in a zip.

    Raises:
      DataError: it is damaged, or larger than any of these is.
    """
    if info.file_size > MAX_BYTES:
        raise DataError(f"it has more than {MAX_BYTES} bytes")
    try:
        return archive.read(info)
    except UNREADABLE_ENTRY as error:
        raise DataError(reason(error)) from error


def _refuse_unsafe(location: str, name: str, info: zipfile.ZipInfo) -> None:
    """Refuses entries that no data set has and that an attack may have."""
    parts = name.split("/")
    mode = info.external_attr >> 16
    if (
        name.startswith("/")
        or ".." in parts
        or (len(parts[0]) == 2 and parts[0][1] == ":")
        or "\0" in info.orig_filename
    ):
        why = "leads out of the archive"
    elif mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        why = "is a link or a device"
    elif info.flag_bits & 1:
        why = "is encrypted"
    else:
        return
    raise DataError(f"source {location} is refused: its entry {name!r} {why}")


def refuse_links_out(source: pathlib.Path, links: Iterable[pathlib.Path]) -> None:
    """Checks symbolic links of a folder, which may have come out of an archive.

    Raises:
      DataError: one leads out of the folder.
    """
    inside = source.resolve()
    for link in links:
        if not link.resolve().is_relative_to(inside):
            name = link.relative_to(source).as_posix()
            raise DataError(
                f"source {source} is refused: {name} is a link that leads out of it: put the files themselves there"
            )


def is_ignored(name: str) -> bool:
    """Whether operating systems or archivers left the file behind."""
    return any(part.startswith(".") or part.lower() in _IGNORED for part in name.split("/"))


def _entries(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read ({reason(error)})") from error
    return (entry for entry in sorted(entries) if not is_ignored(entry.name))


def _only(location: str, prefixes: Sequence[str], folders: Sequence[str], found: Iterable[str]) -> str:
    """The one root of a data set among those found."""
    if len(prefixes) > 1:
        roots = ", ".join(prefix or "." for prefix in prefixes)
        raise DataError(f"source {location} holds several data sets ({roots}): give one of them")
    if not prefixes:
        names = sorted(found)
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise DataError(
            f"source {location} has no folder {', '.join(folders)}; it holds {shown or 'nothing'}: "
            "give the root of the data set or its zip file"
        )
    return prefixes[0]


def _require(location: str, present: Iterable[str], folders: Sequence[str]) -> None:
    missing = [name for name in folders if name not in set(present)]
    if missing:
        raise DataError(f"source {location} lacks the folder {', '.join(missing)}: download or copy the data set again")


def some(names: Sequence[str], most: int = 20) -> str:
    """The first few of many names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def reason(error: BaseException) -> str:
    """Why something could not be read, in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
