"""Market-1501 (Zheng et al., ICCV 2015).

Files `<pid>_c<camera>s<sequence>_<frame>_<detection>.jpg`. Identity -1 is junk (dropped), 0000 a distractor (kept in
the gallery).
"""

import re
from typing import ClassVar

from data_prep.builders.market_layout import MarketLayoutBuilder
from data_prep.check.rules import Official, Rules
from dmosnet_jax.data import records


class Market1501(MarketLayoutBuilder):
    """Builder of `market1501`."""

    DESCRIPTION = "Market-1501: 1,501 people, six cameras in front of a supermarket, boxes by a pedestrian detector."
    HOMEPAGE = "https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html"
    CITATION = "Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015"
    # Six official queries end in .jpg.jpg.
    FILE_NAME = re.compile(r"(-1|\d+)_c(\d+)s\d+_\d+_\d+(?:\.jpe?g)+", re.IGNORECASE)
    FORM = "<pid>_c<camera>s<sequence>_<frame>_<detection>.jpg"
    RULES: ClassVar = Rules(
        official={
            records.TRAIN: Official(12_936, 751),
            records.QUERY: Official(3_368, 750),
            records.GALLERY: Official(15_913, 750),
        },
        reserved_ids=True,
    )
