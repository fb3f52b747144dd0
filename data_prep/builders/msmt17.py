"""MSMT17 (Wei et al., CVPR 2018), V1 and V2.

Folders `train` and `test` (V2: `mask_train_v2`, `mask_test_v2`) with a folder for each identity, and four lists with
lines `<pid>/<pid>_<number>_<camera>_<time>_<frame>_<box>.jpg <identity>`. The paper trains on `list_train.txt` alone,
others on `list_val.txt` too: that becomes the split `val`. Numbers of identities start anew in the test set.

Copies renamed like Market-1501 (`bounding_box_train/0000_c12_0033.jpg`) do not tell the two apart: there the training
images are the split `trainval`.
"""

import collections
import os
import re
from typing import Any, ClassVar

from data_prep.builders import market_layout
from data_prep.builders.base import Item, Listing, ReidBuilder
from data_prep.check.rules import Official, Rules
from data_prep.sources.base import Files, Tree, some
from data_prep.sources.root import open_tree
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import records

LISTS = {records.TRAIN: "train", records.VAL: "train", records.QUERY: "test", records.GALLERY: "test"}
_VERSIONS = {"v1": {"train": "train", "test": "test"}, "v2": {"train": "mask_train_v2", "test": "mask_test_v2"}}
_RENAMED = re.compile(r"(\d+)_c(\d+)_\d+(?:\.jpe?g)+", re.IGNORECASE)
_LINE = re.compile(r"(\S+)\s+(\d{1,9})")
_FILE = re.compile(r"(\d+)_\d+_(\d{1,9})_.*\.jpe?g", re.IGNORECASE)


def read_lists(tree: Tree) -> Listing:
    """Sorts the images into splits as the lists say.

    Raises:
      DataError: a list is missing or has lines of another kind, or names images that are not there.
    """
    names = set(tree.names)
    present = [v for v, folders in _VERSIONS.items() if all(_has(tree, folder) for folder in folders.values())]
    if len(present) != 1:
        found = "both V1 and V2: give one of them" if present else "neither V1 (train, test) nor V2: copy it again"
        raise DataError(f"source {tree.location} has the lists of MSMT17 but the folders of {found}")
    splits: dict[str, list[Item]] = {}
    for split, part in LISTS.items():
        splits[split] = _read_list(tree, names, f"list_{split}.txt", _VERSIONS[present[0]][part])
    counts = collections.Counter(item.filename for items in splits.values() for item in items)
    double = [name for name, count in counts.items() if count > 1]
    if double:
        raise DataError(f"source {tree.location}: {len(double)} images are listed twice: {some(double)}")
    folders = tuple(f"{folder}/" for folder in _VERSIONS[present[0]].values())
    spare = sum(name.startswith(folders) for name in names) - len(counts)
    notes = (f"{spare:,} files in the folders are in no list and are left out",) if spare else ()
    lists = frozenset(f"list_{split}.txt" for split in LISTS)
    return Listing(splits, details={"layout": f"msmt17 {present[0]}"}, notes=notes, known=lists)


def _read_list(tree: Tree, names: set[str], file: str, folder: str) -> list[Item]:
    where = f"source {tree.location}: {file}"
    if file not in names:
        raise DataError(f"{where} is missing: copy the data set again")
    try:
        lines = tree.read(file).decode("utf-8-sig").splitlines()
    except (DataError, UnicodeDecodeError) as error:
        raise DataError(f"{where} cannot be read ({error}): copy the data set again") from error
    items, wrong, missing = [], [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        named = match and _FILE.fullmatch(match[1].rsplit("/", 1)[-1])
        if not match or not named:
            wrong.append(f"line {number} {line[:80]!r}")
            continue
        # Looked up among the files that were found: a list cannot lead to any other.
        name = f"{folder}/{match[1]}"
        if name in names:
            items.append(Item(name, int(match[2]), int(named[2])))
        else:
            missing.append(name)
    if wrong:
        raise DataError(f"{where} has {len(wrong)} lines that are not <path> <identity>: {some(wrong)}")
    if missing:
        raise DataError(f"{where} names {len(missing)} files that are not in the source: {some(missing)}")
    return items


def _has(tree: Tree, folder: str) -> bool:
    return any(name.startswith(f"{folder}/") for name in tree.names)


class Msmt17(ReidBuilder):
    """Builder of `msmt17`."""

    DESCRIPTION = "MSMT17: 4,101 people under 15 cameras on a campus, indoors and outdoors, boxes by a detector."
    HOMEPAGE = "https://www.pkuvmc.com/dataset.html"
    CITATION = "Wei et al., Person Transfer GAN to Bridge Domain Gap for Person Re-Identification, CVPR 2018"
    RULES: ClassVar = Rules(
        official={
            records.TRAIN: Official(30_248, 1_041),
            records.VAL: Official(2_373, None),
            records.TRAINVAL: Official(32_621, 1_041),
            records.QUERY: Official(11_659, 3_060),
            records.GALLERY: Official(82_161, 3_060),
        },
        common_ids=False,
    )

    @classmethod
    def read_source(cls, source: str | os.PathLike[str], **options: Any) -> tuple[Files, Listing]:
        """See the base class."""
        marks = [f"list_{split}.txt" for split in LISTS]
        tree = open_tree(source, (*marks, *market_layout.FOLDERS))
        if any(mark in tree.names for mark in marks):
            return tree, read_lists(tree)
        return tree, scan_renamed(tree.names)


def scan_renamed(names: list[str]) -> Listing:
    """Sorts the files of a copy renamed like Market-1501 into splits, see `market_layout.scan`."""
    splits = market_layout.scan(names, _RENAMED, "<pid>_c<camera>_<number>.jpg").splits
    order = {records.TRAINVAL: records.TRAIN, records.QUERY: records.QUERY, records.GALLERY: records.GALLERY}
    found = {new: splits[old] for new, old in order.items() if old in splits}
    return Listing(found, details={"layout": "msmt17 renamed"})
