"""Rendered pedestrians, laid out and converted as Market-1501 is."""

from typing import ClassVar

from data_prep.builders.market1501 import Market1501
from data_prep.builders.market_layout import MarketLayoutBuilder
from data_prep.check.rules import Rules


class Synthetic(MarketLayoutBuilder):
    """Builder of `synthetic`; its source is a folder written by `data_prep.synthetic.pedestrians.render`."""

    DESCRIPTION = "Rendered pedestrians: identity, camera and image vary independently; nobody's picture was taken."
    FILE_NAME = Market1501.FILE_NAME
    FORM = Market1501.FORM
    RULES: ClassVar = Rules(reserved_ids=True)
