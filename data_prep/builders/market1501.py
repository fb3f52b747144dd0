"""Market-1501 (Zheng et al., ICCV 2015).

Files `<pid>_c<camera>s<sequence>_<frame>_<detection>.jpg`. Identity -1 is junk (dropped), 0000 a distractor (kept in
the gallery).
"""

import re
from collections.abc import Sequence
from typing import ClassVar

from data_prep.builders import market_layout
from data_prep.builders.base import Listing
from data_prep.check.rules import Official, Rules
from dmosnet_jax.data import records

# The official archive has a few files that end in .jpg.jpg.
_NAME = re.compile(r"(-1|\d+)_c(\d+)s\d+_\d+_\d+(?:\.jpe?g)+", re.IGNORECASE)


def scan(names: Sequence[str]) -> Listing:
    """Sorts files named as those of Market-1501 into splits, see `market_layout.scan`."""
    return market_layout.scan(names, _NAME, "<pid>_c<camera>s<sequence>_<frame>_<detection>.jpg", reserved=True)


class Market1501(market_layout.MarketLayoutBuilder):
    """Builder of `market1501`."""

    DESCRIPTION = "Market-1501: 1,501 people, six cameras in front of a supermarket, boxes by a pedestrian detector."
    HOMEPAGE = "https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html"
    CITATION = "Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015"
    RULES: ClassVar = Rules(
        official={
            records.TRAIN: Official(12_936, 751),
            records.QUERY: Official(3_368, 750),
            records.GALLERY: Official(15_913, 750),
        },
        reserved_ids=True,
    )

    @classmethod
    def scan(cls, names: Sequence[str]) -> Listing:
        """See `scan` of this module."""
        return scan(names)
