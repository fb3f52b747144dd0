"""LUPerson (Fu et al., CVPR 2021) as people have it: folders, a flat folder of numbered files, or an LMDB.

- `country/city/video/*.jpg`, or without the level of the video, as the data set's own `extract.py` writes it;
- `CC_CC_VVVV_MMMMMMMM.jpg` in one folder or its `images`: numbers of country, city, video and image, the names of the
  published lists of CFS scores;
- an LMDB with keys `CC_CC_VVVV_MMMMMMMM`, and beside it `keys.pkl`, a list of the keys or a dict with `keys`.

The numbers count the sorted folders and files, so images in folders of videos can be numbered too; they are those of
the published lists if no image is missing. The order of the images is the same in every form.
"""

import collections
import dataclasses
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from data_prep.sources.base import is_ignored, reason, some
from data_prep.sources.folder import read_file, refuse_link_out
from data_prep.sources.lmdb import KEYS_FILE, Database, listed_keys
from dmosnet_jax.core import files
from dmosnet_jax.core.errors import ConfigError, DataError, printable

IMAGES = 4_180_243
TREE, FLAT, LMDB = "tree", "flat", "lmdb"
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


@dataclasses.dataclass(frozen=True)
class Source:
    """LUPerson in one of its forms.

    Attributes:
      kind: `tree`, `flat` or `lmdb`; with `root`, all that a worker needs to open it again.
      root: folder or file that the references belong to.
      location: what the user gave, for messages.
    """

    kind: str
    root: str
    location: str

    def images(self, left_out: "LeftOut | None" = None) -> Iterator[Image]:
        """All images in their order; what is none is added to `left_out`.

        Raises:
          DataError: something is there that LUPerson does not have.
        """
        read = {TREE: _tree_images, FLAT: _flat_images, LMDB: _lmdb_images}[self.kind]
        return read(self.root, self.location, LeftOut() if left_out is None else left_out)


class LeftOut:
    """Counts what is in a source and no image of it."""

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()
        self._first = ""

    def add(self, name: str, kind: str = "", count: int = 1) -> None:
        """Counts a file, or a key; of files the kind is the suffix."""
        self._counts[kind or os.path.splitext(name)[1].lower() or "without suffix"] += count
        self._first = self._first or name

    def __str__(self) -> str:
        """A sentence; empty where there is nothing."""
        if not self._counts:
            return ""
        kinds = [f"{count:,} {kind}" for kind, count in self._counts.most_common(8)]
        return f"{self._counts.total():,} files are left out ({some(kinds)}), e.g. {some([self._first])}"


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
            return Source(LMDB, location, location)
    top = _entries(location, location)
    names = {entry.name for entry in top}
    if _DATA_FILE in names:
        return Source(LMDB, files.join(location, _DATA_FILE), location)
    for entry in top:
        inner = files.join(location, entry.name, _DATA_FILE)
        if entry.is_folder and not files.is_remote(location) and os.path.isfile(inner):
            return Source(LMDB, inner, location)
    if any(not entry.is_folder and _is_numbered(entry.name) for entry in top):
        return Source(FLAT, location, location)
    inner = files.join(location, "images")
    if "images" in names and any(_is_numbered(entry.name) for entry in _entries(inner, location)):
        return Source(FLAT, inner, location)
    return Source(TREE, location, location)


def reader(kind: str, root: str) -> Callable[[str], bytes]:
    """The function that reads an image of a source by its reference, or says why it cannot be read (DataError)."""
    return Database(root).read if kind == LMDB else functools.partial(_read_file, root)


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


def _jpegs(entries: Iterable[files.Entry], left_out: LeftOut) -> Iterator[files.Entry]:
    for entry in entries:
        if _is_jpeg(entry):
            yield entry
        else:
            left_out.add(entry.name)


def _tree_images(root: str, location: str, left_out: LeftOut) -> Iterator[Image]:
    video = -1
    for i, country in enumerate(_only_folders(root, "", location, left_out)):
        for j, city in enumerate(_only_folders(root, country, location, left_out)):
            inside = _entries(files.join(root, country, city), location)
            folders = [entry.name for entry in inside if entry.is_folder]
            single = list(_jpegs((entry for entry in inside if not entry.is_folder), left_out))
            if folders and single:
                raise DataError(
                    f"source {location}: {country}/{city} holds both images and folders of videos: it must be one of "
                    "them"
                )
            for entry in single:
                yield Image(f"{country}/{city}/{entry.name}", None, 0, entry.size)
            for k, name in enumerate(folders):
                video += 1
                crops = _jpegs(_entries(files.join(root, country, city, name), location), left_out)
                for m, entry in enumerate(crops):
                    number = f"{i:02d}_{j:02d}_{k:04d}_{m:08d}.jpg"
                    yield Image(f"{country}/{city}/{name}/{entry.name}", number, video, entry.size)


def _only_folders(root: str, prefix: str, location: str, left_out: LeftOut) -> list[str]:
    """Folders in a folder of the upper two levels, which hold no images."""
    inside = _entries(files.join(root, prefix) if prefix else root, location)
    stray = next((entry.name for entry in inside if _is_jpeg(entry)), None)
    if stray is not None:
        where = f"{prefix}/{stray}" if prefix else stray
        raise DataError(f"source {location} holds the image {where}: LUPerson's are laid out as {_LAYOUT}")
    for entry in inside:
        if not entry.is_folder:
            left_out.add(entry.name)
    return [entry.name for entry in inside if entry.is_folder]


def _flat_images(root: str, location: str, left_out: LeftOut) -> Iterator[Image]:
    found = _jpegs(_entries(root, location), left_out)
    return _numbered(((entry.name, entry.size) for entry in found), location)


def _lmdb_images(root: str, location: str, left_out: LeftOut) -> Iterator[Image]:
    database = Database(root)
    keys = listed_keys(root)
    if keys is None:
        found = database.all_keys()
        keys = [key for key in found if _KEY.fullmatch(key)]
        for key in found:
            if not _KEY.fullmatch(key):
                left_out.add(key)
    elif database.entries > len(keys):
        left_out.add(f"not in {KEYS_FILE}", f"in the LMDB and not in {KEYS_FILE}", database.entries - len(keys))
    keys.sort()
    wrong = next((key for key in keys if not _KEY.fullmatch(key)), None)
    if wrong is not None:
        raise DataError(f"source {location}: its key {printable(wrong)} is not {_NUMBERED}")
    for one, other in itertools.pairwise(keys):
        if one == other:
            raise DataError(f"source {location}: its {KEYS_FILE} lists {one} twice")
    return _numbered(((key, database.size(key)) for key in keys), location)


def _numbered(found: Iterable[tuple[str, int]], location: str) -> Iterator[Image]:
    """Images by their numbered names, in sorted order."""
    video, before = -1, ""
    for ref, size in found:
        key = os.path.splitext(ref)[0]
        if not _KEY.fullmatch(key):
            raise DataError(f"source {location}: {printable(ref)} is not {_NUMBERED}")
        now = key.rpartition("_")[0]
        video, before = video + (now != before), now
        yield Image(ref, f"{key}.jpg", video, size)
