"""The files of a zip, which is read in place and never extracted."""

import io
import pathlib
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from typing import BinaryIO

from data_prep.sources import base
from data_prep.sources.base import Tree, is_ignored, reason
from dmosnet_jax.core import files
from dmosnet_jax.core.errors import DataError

# Image files hardly get smaller in a zip.
_MAX_RATIO = 100
# Of these, zipfile unpacks no more than was asked for; of bzip2 and LZMA it unpacks everything.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# The decompressors have errors of their own.
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)
_HERE = re.compile(r"^(?:\./+)+")


class ZipTree(Tree):
    """Files of a zip."""

    def __init__(self, path: pathlib.Path):
        """Opens the zip.

        Raises:
          DataError: it is missing, no whole zip, or unsafe.
        """
        self._archive = _open_archive(path)
        self._entries = _safe_entries(str(path), self._archive)
        super().__init__(str(path), self._entries)

    def read(self, name: str) -> bytes:
        """See `Files`."""
        info = self._entries[self._root + name]
        if info.file_size > base.MAX_BYTES:
            raise DataError(f"it has more than {base.MAX_BYTES} bytes")
        try:
            with self._archive.open(info) as entry:
                data = entry.read(info.file_size)
        except _UNREADABLE as error:
            raise DataError(reason(error)) from error
        if len(data) != info.file_size:
            raise DataError(f"it ends after {len(data)} of {info.file_size} bytes")
        return data

    def open(self, name: str) -> BinaryIO:
        """See `Tree`."""
        info = self._entries[self._root + name]
        if info.file_size > base.MAX_LARGE_BYTES:
            raise DataError(f"it has more than {base.MAX_LARGE_BYTES} bytes")
        # A compressed entry can be read from front to back only. The copy has no name: it goes when it is closed, or
        # with the process.
        copy = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
        try:
            with self._archive.open(info) as entry:
                shutil.copyfileobj(entry, copy, 2**22)
        except _UNREADABLE as error:
            copy.close()
            raise DataError(f"{reason(error)}: extract it and give the folder") from error
        copy.seek(0)
        return copy


def _open_archive(path: pathlib.Path) -> zipfile.ZipFile:
    if not path.exists():
        raise DataError(f"source {path} does not exist: give the folder or the zip file of the data set")
    start = b""
    try:
        with files.open_local(path) as file:
            start = file.read(512)
        return zipfile.ZipFile(path)
    # Damaged archives raise more kinds of errors than zipfile documents.
    except Exception as error:
        why = "it is not a zip file" if isinstance(error, zipfile.BadZipFile) else reason(error)
        if found := files.foreign(start):
            raise DataError(f"source {path} {found}") from error
        raise DataError(f"source {path} cannot be opened ({why}): give a folder or a whole zip file") from error


def _safe_entries(location: str, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The files in an archive by name, with forward slashes, without what operating systems leave behind."""
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
    # Entries may overlap, and then claim more than the archive has.
    packed = min(sum(info.compress_size for info in entries.values()), _size(archive))
    unpacked = sum(info.file_size for info in entries.values())
    if unpacked > base.MAX_BYTES + _MAX_RATIO * packed:
        raise DataError(
            f"source {location} is refused: its {packed:,} bytes claim to hold {unpacked:,}, which images never do"
        )
    return entries


def _size(archive: zipfile.ZipFile) -> int:
    assert archive.fp is not None
    return archive.fp.seek(0, io.SEEK_END)


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
    elif info.compress_type not in _COMPRESSIONS:
        why = "is compressed in another way than zip's usual one (deflate): pack it again"
    else:
        return
    raise DataError(f"source {location} is refused: its entry {name!r} {why}")
