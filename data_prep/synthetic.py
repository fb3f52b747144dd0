"""Builder of `synthetic`: rendered pedestrians, laid out and converted as Market-1501 is (see `pedestrians`)."""

from collections.abc import Sequence

from data_prep import boxes, market1501
from data_prep.builder import FoldersBuilder, Listing


class Synthetic(FoldersBuilder):
    """Builder of `synthetic`; its source is a folder written by `pedestrians.render`."""

    DESCRIPTION = "Rendered pedestrians: identity, camera and image vary independently; nobody's picture was taken."
    FOLDERS = tuple(boxes.FOLDERS)
    RESERVED_IDS = True

    @classmethod
    def scan(cls, names: Sequence[str]) -> Listing:
        """See `market1501.scan`."""
        return market1501.scan(names)
