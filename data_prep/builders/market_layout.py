"""The layout of Market-1501, which other data sets share.

Folders `bounding_box_train`, `query` and `bounding_box_test`; the file's name tells identity and camera. A copy may
have the first alone, to train on, or the other two alone, to evaluate on. Of `gt_bbox`, where there is one, the images
are kept that show a query's person under the query's camera: they are for evaluation with multiple queries.
"""

import os
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from data_prep.builders.base import Item, Listing, ReidBuilder
from data_prep.sources.base import Files, some
from data_prep.sources.root import open_tree
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import records

FOLDERS = {"bounding_box_train": records.TRAIN, "query": records.QUERY, "bounding_box_test": records.GALLERY}
MULTIPLE = "gt_bbox"
_IMAGE = re.compile(r".*\.(jpe?g|png|bmp|webp|gif|tiff?)", re.IGNORECASE | re.DOTALL)
_INT32 = 2**31


def is_image(name: str) -> bool:
    """Whether a file is one, by its name."""
    return _IMAGE.fullmatch(name) is not None


def scan(
    names: Sequence[str], pattern: re.Pattern[str], form: str, *, root: str = "", reserved: bool = False
) -> Listing:
    """Sorts files into splits by folder; files in other folders, and those that are no images, are left out.

    Args:
      names: paths of files, whose order is kept.
      pattern: of file names; its first two groups are identity and camera.
      form: the same in words, for messages.
      root: what comes before the folders (empty, or ending in a slash).
      reserved: -1 is junk (left out) and 0 a distractor (gallery only), as in Market-1501.

    Raises:
      DataError: images are not named so; the message names them.
    """
    splits: dict[str, list[Item]] = {split: [] for split in FOLDERS.values()}
    multiple: list[Item] = []
    junk = 0
    wrong = []
    for name in names:
        folder, _, file = name.removeprefix(root).rpartition("/")
        if not name.startswith(root) or folder not in (*FOLDERS, MULTIPLE):
            continue
        match = pattern.fullmatch(file)
        if match is None:
            wrong += [name] if is_image(file) else []
            continue
        pid, camid = int(match[1]), int(match[2])
        if folder == MULTIPLE:
            multiple.append(Item(name, pid, camid))
        elif reserved and pid == -1:
            junk += 1
        elif max(pid, camid) >= _INT32 or (reserved and pid == 0 and FOLDERS[folder] != records.GALLERY):
            wrong.append(name)
        else:
            splits[FOLDERS[folder]].append(Item(name, pid, camid))
    if wrong:
        only = ", with pid 0 only in bounding_box_test" if reserved else ""
        raise DataError(f"{len(wrong)} images are not named {form}{only}; rename or remove them: {some(wrong)}")
    queries = {item[1:] for item in splits[records.QUERY]}
    splits[records.MULTI_QUERY] = [item for item in multiple if item[1:] in queries]
    return Listing({split: items for split, items in splits.items() if items}, junk)


class MarketLayoutBuilder(ReidBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base of the builders of data sets that have just this layout."""

    # See `scan` of this module: `pattern` and `form`.
    FILE_NAME: ClassVar[re.Pattern[str]]
    FORM: ClassVar[str]

    @classmethod
    def scan(cls, names: Sequence[str]) -> Listing:
        """See `scan` of this module."""
        return scan(names, cls.FILE_NAME, cls.FORM, reserved=cls.RULES.reserved_ids)

    @classmethod
    def read_source(cls, source: str | os.PathLike[str], **options: Any) -> tuple[Files, Listing]:
        """See the base class."""
        files = open_tree(source, tuple(FOLDERS))
        return files, cls.scan(files.names)
