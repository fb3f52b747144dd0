"""The layout of Market-1501, which other data sets share, and the names that people give its folders.

Folders `bounding_box_train`, `query` and `bounding_box_test`; the file's name tells identity and camera. A copy may
have the first alone, to train on, or the other two alone, to evaluate on. Copies that were prepared for other programs
have `train_all` (or `train` and `val`), `query` and `gallery` instead, with a folder for each identity (layumi's
Person_reID_baseline_pytorch), or `train`, `query` and `test`. Of `gt_bbox` (there `multi-query`), where there is one,
the images are kept that show a query's person under the query's camera: for evaluation with multiple queries.
"""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from data_prep.builders.base import Item, Listing, ReidBuilder
from data_prep.sources.base import Files, some
from data_prep.sources.root import open_tree
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import records

FOLDERS = {"bounding_box_train": records.TRAIN, "query": records.QUERY, "bounding_box_test": records.GALLERY}
# In lower case. Of several for one split, the first that is there counts: `train_all` is `train` with `val`.
NAMES = {
    records.TRAIN: ("bounding_box_train", "train_all", "trainval", "train", "training"),
    records.VAL: ("val", "valid", "validation"),
    records.QUERY: ("query", "queries", "probe"),
    records.GALLERY: ("bounding_box_test", "gallery", "test", "testing"),
}
_WITH_VAL = ("bounding_box_train", "train_all", "trainval")
# Images for multiple queries; of several, the first that is there counts.
MULTIPLE = ("gt_bbox", "multi-query")
_IMAGE = re.compile(r".*\.(jpe?g|png|bmp|webp|gif|tiff?)", re.IGNORECASE | re.DOTALL)
_INT32 = 2**31


def is_image(name: str) -> bool:
    """Whether a file is one, by its name."""
    return _IMAGE.fullmatch(name) is not None


def is_split(name: str) -> bool:
    """Whether a folder is called as splits are."""
    return any(name.lower() in words for words in NAMES.values())


def splits_of(folders: Iterable[str]) -> dict[str, str]:
    """Which of some folders, by any usual name, are which splits; those that repeat others are not among them."""
    present = {folder.lower(): folder for folder in sorted(folders, reverse=True)}
    chosen: dict[str, str] = {}
    for split, words in NAMES.items():
        word = next((word for word in words if word in present), None)
        if word is not None and not (split == records.VAL and chosen.keys() & {present.get(w) for w in _WITH_VAL}):
            chosen[present[word]] = split
    return chosen


def scan(
    names: Sequence[str],
    pattern: re.Pattern[str],
    form: str,
    *,
    root: str = "",
    reserved: bool = False,
    prepared: bool = False,
) -> Listing:
    """Sorts files into splits by folder; files in other folders, and those that are no images, are left out.

    Args:
      names: paths of files, whose order is kept.
      pattern: of file names; its first two groups are identity and camera.
      form: the same in words, for messages.
      root: what comes before the folders (empty, or ending in a slash).
      reserved: -1 is junk (left out) and 0 a distractor (gallery only), as in Market-1501.
      prepared: take the folders of prepared copies too, in which each identity may have a folder.

    Raises:
      DataError: images are not named so; the message names them.
    """
    tops = {name.removeprefix(root).split("/")[0] for name in names if name.startswith(root)}
    folders = FOLDERS if not prepared else splits_of(tops)
    splits: dict[str, list[Item]] = {split: [] for split in folders.values()}
    more = next((folder for folder in MULTIPLE if folder in tops), None)
    multiple: list[Item] = []
    junk, wrong = [], []
    for name in names:
        top, _, rest = name.removeprefix(root).partition("/")
        *inside, file = rest.split("/")
        if not name.startswith(root) or top not in (*folders, more) or len(inside) > prepared:
            continue
        match = pattern.fullmatch(file)
        if match is None:
            wrong += [name] if is_image(file) else []
            continue
        pid, camid = int(match[1]), int(match[2])
        if inside and inside[0].lstrip("0") != match[1].lstrip("0"):
            wrong.append(name)
        elif top == more:
            multiple.append(Item(name, pid, camid))
        elif reserved and pid == -1:
            junk.append(name)
        elif max(pid, camid) >= _INT32 or (reserved and pid == 0 and folders[top] != records.GALLERY):
            wrong.append(name)
        else:
            splits[folders[top]].append(Item(name, pid, camid))
    if wrong:
        only = ", with pid 0 only in bounding_box_test" if reserved else ""
        raise DataError(f"{len(wrong)} images are not named {form}{only}; rename or remove them: {some(wrong)}")
    queries = {item[1:] for item in splits.get(records.QUERY, ())}
    kept = splits[records.MULTI_QUERY] = [item for item in multiple if item[1:] in queries]
    # Those of other people are no part of the split by its nature; without any of it, nothing of the folder is.
    known = frozenset([*junk, *(item.filename for item in multiple if kept)])
    return Listing({split: items for split, items in splits.items() if items}, len(junk), known=known)


class MarketLayoutBuilder(ReidBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base of the builders of data sets that have just this layout."""

    # See `scan` of this module: `pattern` and `form`.
    FILE_NAME: ClassVar[re.Pattern[str]]
    FORM: ClassVar[str]

    @classmethod
    def scan(cls, names: Sequence[str]) -> Listing:
        """See `scan` of this module."""
        return scan(names, cls.FILE_NAME, cls.FORM, reserved=cls.RULES.reserved_ids, prepared=True)

    @classmethod
    def read_source(cls, source: str | os.PathLike[str], **options: Any) -> tuple[Files, Listing]:
        """See the base class."""
        files = open_tree(source, tuple(FOLDERS), ("train_all", "gallery"))
        return files, cls.scan(files.names)
