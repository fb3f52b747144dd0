"""The layout of Market-1501, which other data sets share.

Folders `bounding_box_train`, `query` and `bounding_box_test`; the file's name tells identity and camera.
"""

import re
from collections.abc import Sequence

from data_prep.builder import Item, Listing
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import records

FOLDERS = {"bounding_box_train": records.TRAIN, "query": records.QUERY, "bounding_box_test": records.GALLERY}
_IMAGE = re.compile(r".*\.(jpe?g|png|bmp|webp|gif|tiff?)", re.IGNORECASE | re.DOTALL)
_INT32 = 2**31


def is_image(name: str) -> bool:
    """Whether a file is one, by its name."""
    return _IMAGE.fullmatch(name) is not None


def scan(names: Sequence[str], pattern: re.Pattern[str], form: str, *, reserved: bool = False) -> Listing:
    """Sorts files into splits by folder; files that are no images are left out.

    Args:
      names: paths relative to the root, `<folder>/<file>`.
      pattern: of file names; its first two groups are identity and camera.
      form: the same in words, for messages.
      reserved: -1 is junk (left out) and 0 a distractor (gallery only), as in Market-1501.

    Returns:
      The images of `train`, `query` and `gallery` in the order of `names`, and how many were junk.

    Raises:
      DataError: an image is not named so; the message lists every such file.
    """
    splits: dict[str, list[Item]] = {split: [] for split in FOLDERS.values()}
    junk = 0
    wrong = []
    for name in names:
        folder, file = name.rsplit("/", 2)[-2:]
        match = pattern.fullmatch(file)
        if match is None:
            wrong += [name] if is_image(file) else []
            continue
        pid, camid = int(match[1]), int(match[2])
        if reserved and pid == -1:
            junk += 1
        elif max(pid, camid) >= _INT32 or (reserved and pid == 0 and FOLDERS[folder] != records.GALLERY):
            wrong.append(name)
        else:
            splits[FOLDERS[folder]].append(Item(name, pid, camid))
    if wrong:
        only = ", with pid 0 only in bounding_box_test" if reserved else ""
        raise DataError(f"{len(wrong)} images are not named {form}{only}; rename or remove them: {', '.join(wrong)}")
    return Listing(splits, junk)
