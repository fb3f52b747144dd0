"""Rendered pedestrians, laid out and converted as Market-1501 is."""

from collections.abc import Sequence
from typing import ClassVar

from data_prep.builders import market1501, market_layout
from data_prep.builders.base import Listing
from data_prep.check.rules import Rules


class Synthetic(market_layout.MarketLayoutBuilder):
    """Builder of `synthetic`; its source is a folder written by `data_prep.synthetic.pedestrians.render`."""

    DESCRIPTION = "Rendered pedestrians: identity, camera and image vary independently; nobody's picture was taken."
    RULES: ClassVar = Rules(reserved_ids=True)

    @classmethod
    def scan(cls, names: Sequence[str]) -> Listing:
        """See `market1501.scan`."""
        return market1501.scan(names)
