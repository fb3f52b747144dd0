"""Market-1501 (Zheng et al., ICCV 2015), and its layout, which other data sets share.

Folders `bounding_box_train`, `query`, `bounding_box_test`; files `<pid>_c<camera>s<sequence>_<frame>_<detection>.jpg`.
Identity -1 is junk (dropped), 0000 a distractor (kept in the gallery).
"""

import re
from collections.abc import Sequence
from typing import ClassVar

from data_prep.builder import Item, Listing, Official, ReidBuilder
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import records

FOLDERS = {"bounding_box_train": records.TRAIN, "query": records.QUERY, "bounding_box_test": records.GALLERY}
# The official archive has a few files that end in .jpg.jpg.
_NAME = re.compile(r"(-1|\d+)_c(\d+)s\d+_\d+_\d+(\.jpe?g)+", re.IGNORECASE)
_IMAGE = re.compile(r".*\.(jpe?g|png|bmp|webp|gif|tiff?)", re.IGNORECASE)
_INT32 = 2**31


def scan(names: Sequence[str]) -> Listing:
    """Sorts files in the layout of Market-1501 into splits; files that are no images are left out.

    Args:
      names: paths relative to the root, `<folder>/<file>`.

    Returns:
      The images of `train`, `query` and `gallery` in the order of `names`, and how many were junk.

    Raises:
      DataError: an image is not named so, or a distractor is not in the gallery; the message lists every such file.
    """
    splits: dict[str, list[Item]] = {split: [] for split in FOLDERS.values()}
    junk = 0
    wrong = []
    for name in names:
        folder, file = name.split("/")
        match = _NAME.fullmatch(file)
        if match is None:
            wrong += [name] if _IMAGE.fullmatch(file) else []
            continue
        pid, camid = int(match[1]), int(match[2])
        if pid == -1:
            junk += 1
        elif max(pid, camid) >= _INT32 or (pid == 0 and FOLDERS[folder] != records.GALLERY):
            wrong.append(name)
        else:
            splits[FOLDERS[folder]].append(Item(name, pid, camid))
    if wrong:
        raise DataError(
            f"{len(wrong)} images are not named <pid>_c<camera>s<sequence>_<frame>_<detection>.jpg, with pid 0 only in "
            f"bounding_box_test; rename or remove them: {', '.join(wrong)}"
        )
    return Listing(splits, junk)


class Market1501(ReidBuilder):
    """Builder of `market1501`."""

    DESCRIPTION = "Market-1501: 1,501 people, six cameras in front of a supermarket, boxes by a pedestrian detector."
    HOMEPAGE = "https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html"
    CITATION = "Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015"
    FOLDERS = tuple(FOLDERS)
    OFFICIAL: ClassVar = {
        records.TRAIN: Official(12_936, 751),
        records.QUERY: Official(3_368, 750),
        records.GALLERY: Official(15_913, 750),
    }

    @classmethod
    def scan(cls, names: Sequence[str]) -> Listing:
        """See `scan` of this module."""
        return scan(names)
