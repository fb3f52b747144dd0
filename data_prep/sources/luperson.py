"""LUPerson (Fu et al., CVPR 2021) as people have it: folders, a flat folder of numbered files, or an LMDB.

- `country/city/video/*.jpg`, or without the level of the video, as the data set's own `extract.py` writes it;
- `CC_CC_VVVV_MMMMMMMM.jpg` in one folder or its `images`: numbers of country, city, video and image, the names of the
  published lists of CFS scores;
- an LMDB with keys `CC_CC_VVVV_MMMMMMMM`, and beside it `keys.pkl`, a list of the keys or a dict with `keys`.

The numbers are places in the sorted folders, so folders with the level of the video have such names too, true where
nothing is missing. Images come in one order, whatever the form.
"""

import functools
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from data_prep.sources.base import is_ignored, reason
from data_prep.sources.folder import read_file, refuse_link_out
from data_prep.sources.lmdb import KEYS_FILE, Database, listed_keys
from dmosnet_jax.core import files
from dmosnet_jax.core.errors import ConfigError, DataError, printable

IMAGES = 4_180_243
_KEY = re.compile(r"\d{2,}_\d{2,}_\d{4,}_\d{1,18}", re.ASCII)
_NUMBERED = "numbered as CC_CC_VVVV_MMMMMMMM, like 34_01_0341_00001865"
_JPEG = re.compile(r"\.jpe?g", re.IGNORECASE)
_DATA_FILE = "data.mdb"
_LAYOUT = "country/city/video/*.jpg, country/city/*.jpg, CC_CC_VVVV_MMMMMMMM.jpg, or an LMDB with keys.pkl"


class Image(NamedTuple):
    """An image of the source.

    Attributes:
      ref: what the source knows it by: path relative to the root, or key of the LMDB.
      number: `CC_CC_VVVV_MMMMMMMM.jpg`, its name in lists; None where folders lack the level of the video.
      video: number of the video within the source, from 0; 0 where that is not known.
      size: bytes; 0 where it is missing.
    """

    ref: str
    number: str | None
    video: int
    size: int


class Source(Protocol):
    """One of the forms.

    Attributes:
      kind: `tree`, `flat` or `lmdb`; with `root`, all that a worker needs to open it again.
      root: folder or file that the references belong to.
      location: what the user gave, for messages.
    """

    kind: str
    root: str
    location: str

    def images(self) -> Iterator[Image]:
        """All images in their order.

        Raises:
          DataError: something is there that LUPerson does not have.
        """


def find(source: str | os.PathLike[str]) -> Source:
    """Tells the form of a source: a folder, a URL of one, or the file of an LMDB.

    Raises:
      ConfigError: an LMDB behind a URL.
      DataError: it is not there, or of no known form.
    """
    location = files.tidy(source)
    if os.path.basename(location) == _DATA_FILE or location.endswith((".mdb", ".lmdb")):
        if files.is_remote(location):
            raise ConfigError(f"source {location}: an LMDB is read in place: copy it to this machine")
        if os.path.isfile(location):
            return _Lmdb(location, location)
    top = _entries(location, location)
    names = {entry.name for entry in top}
    if _DATA_FILE in names:
        return _Lmdb(location, files.join(location, _DATA_FILE))
    for entry in top:
        inner = files.join(location, entry.name, _DATA_FILE)
        if entry.is_folder and not files.is_remote(location) and os.path.isfile(inner):
            return _Lmdb(location, inner)
    if any(not entry.is_folder and _is_numbered(entry.name) for entry in top):
        return _Flat(location, location)
    inner = files.join(location, "images")
    if "images" in names and any(_is_numbered(entry.name) for entry in _entries(inner, location)):
        return _Flat(location, inner)
    return _Tree(location)


def reader(kind: str, root: str) -> Callable[[str], bytes]:
    """The function that reads an image of a source by its reference.

    It raises `DataError` with the reason where the image cannot be read.
    """
    return Database(root).read if kind == _Lmdb.kind else functools.partial(_read_file, root)


def _read_file(root: str, ref: str) -> bytes:
    path = files.join(root, ref)
    try:
        return files.read(path) if files.is_remote(path) else read_file(path)
    except OSError as error:
        raise DataError(reason(error)) from error


def _is_numbered(name: str) -> bool:
    stem, suffix = os.path.splitext(name)
    return bool(_JPEG.fullmatch(suffix) and _KEY.fullmatch(stem))


def _is_jpeg(entry: files.Entry) -> bool:
    return not entry.is_folder and bool(_JPEG.fullmatch(os.path.splitext(entry.name)[1]))


def _entries(folder: str, location: str) -> list[files.Entry]:
    """Entries of a folder without those that systems leave behind."""
    try:
        found = [entry for entry in files.entries(folder) if not is_ignored(entry.name)]
    except NotADirectoryError as error:
        raise DataError(f"source {location} is neither a folder nor an LMDB: give {_LAYOUT}") from error
    except FileNotFoundError as error:
        raise DataError(f"source {folder} does not exist: give the folder of LUPerson") from error
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read ({error.strerror})") from error
    for entry in found:
        if entry.is_link:
            refuse_link_out(pathlib.Path(location), os.path.relpath(os.path.join(folder, entry.name), location))
    return found


class _Tree:
    kind = "tree"

    def __init__(self, location: str):
        self.location = self.root = location

    def images(self) -> Iterator[Image]:
        video = -1
        countries = self._folders("")
        for i, country in enumerate(countries):
            for j, city in enumerate(self._folders(country)):
                inside = _entries(files.join(self.root, country, city), self.location)
                folders = [entry.name for entry in inside if entry.is_folder]
                single = [entry for entry in inside if _is_jpeg(entry)]
                if folders and single:
                    raise DataError(
                        f"source {self.location}: {country}/{city} holds both images and folders of videos: it must be "
                        "one of them"
                    )
                for entry in single:
                    yield Image(f"{country}/{city}/{entry.name}", None, 0, entry.size)
                for k, name in enumerate(folders):
                    video += 1
                    below = f"{country}/{city}/{name}"
                    crops = filter(_is_jpeg, _entries(files.join(self.root, *below.split("/")), self.location))
                    for m, entry in enumerate(crops):
                        number = f"{i:02d}_{j:02d}_{k:04d}_{m:08d}.jpg"
                        yield Image(f"{below}/{entry.name}", number, video, entry.size)

    def _folders(self, place: str) -> list[str]:
        """Folders below a place where no image may be."""
        inside = _entries(files.join(self.root, place) if place else self.root, self.location)
        stray = next((entry.name for entry in inside if _is_jpeg(entry)), None)
        if stray is not None:
            where = f"{place}/{stray}" if place else stray
            raise DataError(f"source {self.location} holds the image {where}: LUPerson's are laid out as {_LAYOUT}")
        return [entry.name for entry in inside if entry.is_folder]


class _Flat:
    kind = "flat"

    def __init__(self, location: str, root: str):
        self.location, self.root = location, root

    def images(self) -> Iterator[Image]:
        found = filter(_is_jpeg, _entries(self.root, self.location))
        yield from _numbered(((entry.name, entry.size) for entry in found), self.location)


class _Lmdb:
    kind = "lmdb"

    def __init__(self, location: str, data: str):
        self.location = location
        self.root = data

    def images(self) -> Iterator[Image]:
        database = Database(self.root)
        keys = listed_keys(self.root)
        if keys is None:
            keys = [key for key in database.all_keys() if _KEY.fullmatch(key)]
        keys.sort()
        wrong = next((key for key in keys if not _KEY.fullmatch(key)), None)
        if wrong is not None:
            raise DataError(f"source {self.location}: its key {printable(wrong)} is not {_NUMBERED}")
        for one, other in itertools.pairwise(keys):
            if one == other:
                raise DataError(f"source {self.location}: its {KEYS_FILE} lists {one} twice")
        yield from _numbered(((key, database.size(key)) for key in keys), self.location)


def _numbered(found: Iterator[tuple[str, int]], location: str) -> Iterator[Image]:
    """Images by their numbered names, in sorted order."""
    video, before = -1, ""
    for ref, size in found:
        key = os.path.splitext(ref)[0]
        if not _KEY.fullmatch(key):
            raise DataError(f"source {location}: {printable(ref)} is not {_NUMBERED}")
        now = key.rpartition("_")[0]
        video, before = video + (now != before), now
        yield Image(ref, f"{key}.jpg", video, size)
