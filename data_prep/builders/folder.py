"""A user's own images: folders `pid/camera/image.jpg`, or a CSV table with the columns `path,pid,camid,split`.

The folders may be in folders `train`, `val`, `query` and `gallery`, which the column `split` names in a table; other
usual names of these are known (`test` beside a `query`, `train_all`), and never become identities. Without splits, a
share of the identities becomes the test set: of each identity in each camera with several images, the first is a query.
Identities and cameras may be numbers, which are kept, or names, which are numbered from 1 in sorted order; `2.0` is the
number 2, and -1, however it is written, is no identity. All of it may be in one more folder, as in many archives.

Where there are no cameras (`camera_policy=none`: `pid/image.jpg`, no column `camid`), every image counts as its own
camera. Evaluation then drops nothing but an image that is its own query: same identity, same camera.
"""

import array
import csv
import dataclasses
import io
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from data_prep.builders.base import Item, Listing, ReidBuilder
from data_prep.builders.market_layout import is_image, is_split, splits_of
from data_prep.sources.base import Files, Tree, some
from data_prep.sources.folder import FolderTree, open_listed
from data_prep.sources.root import open_tree
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data import records

GIVEN, NONE = "given", "none"
SPLITS = (records.TRAIN, records.VAL, records.QUERY, records.GALLERY)
# Of a table: its rows take some 200 bytes of memory each.
MAX_ROWS = 2_000_000
_INT32 = 2**31
_NUMBER = re.compile(r"-?\d{1,18}(?:\.0*)?", re.ASCII)
# What tables have where a value is not known.
_NOTHING = {"nan", "none", "null", "na", "n/a", "<na>"}
_HERE = re.compile(r"^(?:\./)+")


class Row(NamedTuple):
    """One image as the user describes it, with empty text for what is not given."""

    path: str
    pid: str
    camid: str
    split: str


def read_source(source: str | os.PathLike[str], camera_policy: str, test_fraction: float) -> tuple[Files, Listing]:
    """Opens the images and sorts them into splits.

    Args:
      source: a CSV file (paths are relative to its folder), or a folder or zip, with at most one CSV file at its top.
      camera_policy: `given` or `none`.
      test_fraction: share of the identities that are tested on where no splits are given.

    Raises:
      ConfigError: an option has no such value.
      DataError: the source is laid out in another way, or a table names files outside of it.
    """
    if camera_policy not in (GIVEN, NONE):
        raise ConfigError(f"camera_policy={camera_policy} is unknown: use {GIVEN} or {NONE}")
    if not 0 <= test_fraction <= 1:
        raise ConfigError(f"test_fraction={test_fraction} must lie between 0 and 1")
    path = pathlib.Path(source).expanduser()
    if path.is_file() and path.suffix.lower() == ".csv":
        folder = path.absolute().parent
        rows = _read_table(FolderTree(folder, [path.name]), path.name, camera_policy)
        tree = open_listed(folder, [row.path for row in rows])
        layout = "csv"
    else:
        tree = open_tree(path)
        tree.narrow(_top(tree.names, camera_policy))
        tables = _tables(tree.names)
        if len(tables) > 1:
            raise DataError(f"source {path} holds several tables ({', '.join(tables)}): give one of them as source")
        layout = "csv" if tables else "folders"
        rows = _read_table(tree, tables[0], camera_policy) if tables else read_tree(tree, camera_policy)
    _check_present(tree, [row.path for row in rows])
    listing = arrange(rows, camera_policy, test_fraction, tree.location)
    known = listing.known | {*(_tables(tree.names) if layout == "csv" else ())}
    return tree, dataclasses.replace(
        listing, details={"layout": layout, "camera_policy": camera_policy}, known=frozenset(known)
    )


def _top(names: Sequence[str], camera_policy: str) -> str:
    """The folder that everything lies in, as archives often have it, with its slash; empty where there is none."""
    top = ""
    usual = 1 if camera_policy == NONE else 2
    while True:
        below = [name.removeprefix(top) for name in names if name.startswith(top)]
        images = [name for name in below if is_image(name)]
        tops = {name.split("/")[0] for name in images}
        if len(tops) != 1 or any(map(is_split, tops)) or _tables(below):
            return top
        folder = f"{tops.pop()}/"
        tables = _tables([name.removeprefix(folder) for name in below if name.startswith(folder)])
        if not tables and any(name.count("/") <= usual for name in images):
            return top
        top += folder


def _tables(names: Sequence[str]) -> list[str]:
    return [name for name in names if "/" not in name and name.lower().endswith(".csv")]


def _read_table(tree: Tree, name: str, camera_policy: str) -> list[Row]:
    """The rows of a table; a `DataError` names the lines that are wrong."""
    where = f"source {tree.location}: {name}"
    try:
        data = tree.read(name)
    except DataError as error:
        raise DataError(f"{where} cannot be read ({error})") from error
    needed = ("path", "pid") if camera_policy == NONE else ("path", "pid", "camid")
    try:
        reader = csv.DictReader(io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline=""), strict=True)
        columns = [(name or "").strip() for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        missing = [name for name in needed if name not in columns]
        if missing:
            hint = f", or --camera_policy={NONE} where there are no cameras" if missing == ["camid"] else ""
            raise DataError(
                f"{where} has no column {', '.join(missing)}: its first line must be path,pid,camid,split{hint}"
            )
        rows: list[Row] = []
        numbers = array.array("q")
        kept: dict[str, str] = {}
        for line in itertools.islice(reader, MAX_ROWS + 1):
            values = [(line.get(name) or "").strip() for name in Row._fields]
            # Identities, cameras and splits come again and again: one text serves all.
            path, *labels = values
            rows.append(Row(_HERE.sub("", path), *(kept.setdefault(label, label) for label in labels)))
            numbers.append(reader.line_num)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where} is no CSV table in UTF-8 ({error}): write it again") from error
    if len(rows) > MAX_ROWS:
        raise DataError(f"{where} has more than {MAX_ROWS:,} lines: give folders instead")
    if not rows:
        raise DataError(f"{where} has no line below its first: it needs one for each image")
    words = splits_of({row.split for row in rows})
    known = {"": ""} | {word: split for word, split in words.items() if split in SPLITS}
    if "test" in words and records.QUERY not in words.values():
        del known["test"]
    wrong = []
    for at, (place, row) in enumerate(zip(numbers, rows, strict=True)):
        if all(getattr(row, name) for name in needed) and row.split in known:
            rows[at] = row._replace(split=known[row.split])
        else:
            wrong.append(f"line {place}")
    if wrong:
        raise DataError(
            f"{where}: {len(wrong)} lines lack a value, or have a split that is not one of {', '.join(SPLITS)}: "
            f"{some(wrong)}"
        )
    return rows


def read_tree(tree: Tree, camera_policy: str) -> list[Row]:
    """The images of a tree of folders.

    Raises:
      DataError: images lie at other depths; names them.
    """
    images = [name for name in tree.names if is_image(name)]
    folders = _split_folders(tree.location, {name.split("/")[0] for name in images if "/" in name})
    rows, wrong = [], []
    for name in images:
        parts = name.split("/")
        if folders and parts[0] not in folders:
            # A folder that repeats another one, as `train` beside `train_all`, is counted with what is left out.
            continue
        split = folders[parts.pop(0)] if folders else ""
        if camera_policy == NONE and len(parts) >= 2:
            rows.append(Row(name, parts[0], "", split))
        elif camera_policy == GIVEN and len(parts) == 3:
            rows.append(Row(name, parts[0], parts[1], split))
        else:
            wrong.append(name)
    if wrong or not rows:
        form = "pid/image.jpg" if camera_policy == NONE else "pid/camera/image.jpg"
        has_no_cameras = not rows and all(name.count("/") == 1 + bool(folders) for name in wrong)
        other = f"; where there are no cameras, give --camera_policy={NONE}" if has_no_cameras else ""
        which = f"{len(wrong)} images are not" if wrong else "there are no images"
        names = f": {some(wrong)}" if wrong else ""
        raise DataError(
            f"source {tree.location}: {which} at {form}, with or without train, query and gallery above{other}{names}"
        )
    return rows


def _split_folders(location: str, tops: set[str]) -> dict[str, str]:
    """The splits of the topmost folders; empty where none is called so.

    Raises:
      DataError: some are called as splits and others are not, or it is not clear which split they mean.
    """
    named = {top for top in tops if is_split(top)}
    if not named:
        return {}
    chosen, fix = splits_of(named), f"name the folders {', '.join(SPLITS)}"
    if tops - named:
        others = some(sorted(tops - named))
        raise DataError(
            f"source {location}: the folders {some(sorted(named))} are called as splits, and {others} "
            f"beside them are not: {fix}, or rename them where they are identities"
        )
    alone = records.GALLERY in chosen.values() and records.QUERY not in chosen.values()
    doubled = {top for top in named - chosen.keys() if not any(word.lower() == "train_all" for word in chosen)}
    if doubled or (alone and not any(top.lower() == records.GALLERY for top in named)):
        raise DataError(f"source {location}: it is not clear which splits the folders {some(sorted(named))} are: {fix}")
    return chosen


def arrange(rows: Sequence[Row], camera_policy: str, test_fraction: float, location: str) -> Listing:
    """Numbers identities and cameras, and sorts images into splits, in the order of their paths.

    Raises:
      DataError: some images have a split and others none, an image comes twice, or a number is out of range.
    """
    has_split = [bool(row.split) for row in rows]
    if any(has_split) and not all(has_split):
        raise DataError(
            f"source {location}: {has_split.count(False)} of {len(rows)} images have no split: give all or none"
        )
    pids = _numbers((row.pid for row in rows), "identities", location)
    if camera_policy == NONE:
        camids = {path: i for i, path in enumerate(sorted({row.path for row in rows}), 1)}
    else:
        camids = _numbers((row.camid for row in rows), "cameras", location)
    items = [
        (row.split, Item(row.path, pids[row.pid], camids[row.path if camera_policy == NONE else row.camid]))
        for row in rows
    ]
    junk: frozenset[str] = frozenset()
    if not any(has_split):
        if any(item.pid != -1 for _, item in items):
            junk = frozenset(item.filename for _, item in items if item.pid == -1)
        items = _split_up(sorted(item for _, item in items if item.filename not in junk), camera_policy, test_fraction)
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for split, item in items:
        splits[split].append(item)
    for split, found in splits.items():
        found.sort()
        twice = [a.filename for a, b in itertools.pairwise(found) if a.filename == b.filename]
        if twice:
            raise DataError(f"source {location}: images come twice in {split}: {some(twice)}")
    webp = sum(row.path.lower().endswith(".webp") for row in rows)
    notes = [f"{webp:,} images are WebP files, which training reads but tf.data does not"] if webp else []
    if junk:
        notes.append(f"{len(junk):,} images have no identity (-1) and are left out, e.g. {some([min(junk)])}")
    filled = {split: found for split, found in splits.items() if found}
    return Listing(filled, len(junk), notes=tuple(notes), known=junk)


def _split_up(items: Sequence[Item], camera_policy: str, test_fraction: float) -> list[tuple[str, Item]]:
    """Train, query and gallery with identities of their own, the same for everybody.

    Of a tested identity, the first image of each camera that has several is a query, and the others are the gallery;
    where every camera has one image only, the first is the query.
    """
    pids = np.unique([item.pid for item in items if item.pid != -1])
    chosen = np.random.RandomState(0).permutation(len(pids))[: round(test_fraction * len(pids))]
    tested = set(pids[chosen].tolist())
    cameras: dict[int, dict[int, list[Item]]] = {}
    for item in items:
        camera = 0 if camera_policy == NONE else item.camid
        cameras.setdefault(item.pid, {}).setdefault(camera, []).append(item)
    result = []
    for pid, views in cameras.items():
        images = [item for view in views.values() for item in view]
        if pid not in tested:
            result += [(records.TRAIN, item) for item in images]
            continue
        queries = {view[0] for view in views.values() if len(view) > 1}
        if not queries and len(images) > 1:
            queries = {images[0]}
        result += [(records.QUERY if item in queries else records.GALLERY, item) for item in images]
    return result


def _numbers(names: Iterable[str], what: str, location: str) -> dict[str, int]:
    """Numbers as they are, -1 included; names are numbered from 1, in sorted order, and -1 among them stays -1.

    Raises:
      DataError: a number is out of range, is no whole one, or is not known.
    """
    known = sorted(set(names))
    numbers = {name: int(name.partition(".")[0]) for name in known if _NUMBER.fullmatch(name)}
    unknown = [name for name in known if name.lower() in _NOTHING]
    if unknown:
        raise DataError(f"source {location}: {what} are {some(unknown)}: write -1 where there is none")
    if len(numbers) == len(known):
        wrong = [name for name, number in numbers.items() if not -1 <= number < _INT32]
        if wrong:
            raise DataError(f"source {location}: {what} must be from -1 to {_INT32 - 1}: {some(wrong)}")
        return numbers
    too_long = [name for name in known if name not in numbers and re.fullmatch(r"-?\d+(?:\.\d*)?", name, re.ASCII)]
    if len(numbers) + len(too_long) == len(known):
        raise DataError(
            f"source {location}: {what} must be whole numbers from -1 to {_INT32 - 1}, or names: {some(too_long)}"
        )
    named = [name for name in known if numbers.get(name) != -1]
    return dict.fromkeys(known, -1) | {name: i for i, name in enumerate(named, 1)}


def _check_present(tree: Tree, paths: Iterable[str]) -> None:
    # Looked up among the files that were found: a table cannot lead to any other.
    known = set(tree.names)
    missing = [path for path in paths if path not in known]
    if missing:
        raise DataError(
            f"source {tree.location}: {len(missing)} paths of the table are not files inside of it (give them relative "
            f"to the table): {some(missing)}"
        )


class Folder(ReidBuilder):
    """Builder of `folder`."""

    DESCRIPTION = "A user's own images."
    IS_WHOLE = True
    OPTIONS: ClassVar = {"camera_policy": GIVEN, "test_fraction": 0.5}

    @classmethod
    def read_source(cls, source: str | os.PathLike[str], **options: Any) -> tuple[Files, Listing]:
        """See `read_source` of this module."""
        return read_source(source, **{**cls.OPTIONS, **options})
