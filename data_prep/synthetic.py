"""Builder of `synthetic`: rendered pedestrians, laid out and converted as Market-1501 is (see `pedestrians`)."""

from collections.abc import Sequence

from data_prep import market1501
from data_prep.builder import Listing, ReidBuilder


class Synthetic(ReidBuilder):
    """Builder of `synthetic`; its source is a folder written by `pedestrians.render`."""

    DESCRIPTION = "Rendered pedestrians: identity, camera and image vary independently; nobody's picture was taken."
    FOLDERS = tuple(market1501.FOLDERS)

    @classmethod
    def scan(cls, names: Sequence[str]) -> Listing:
        """See `market1501.scan`."""
        return market1501.scan(names)
