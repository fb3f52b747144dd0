"""CUHK03 with boxes by a pedestrian detector, see `cuhk03`."""

import os
from typing import Any, ClassVar

from data_prep.builders import cuhk03
from data_prep.builders.base import Listing, ReidBuilder
from data_prep.check.rules import Official, Rules
from data_prep.sources.base import Files
from dmosnet_jax.data import records


class Cuhk03Detected(ReidBuilder):
    """Builder of `cuhk03_detected`."""

    name = "cuhk03_detected"
    DESCRIPTION = "CUHK03, new protocol, boxes by a pedestrian detector: 1,467 people, two of ten cameras each."
    HOMEPAGE = cuhk03.HOMEPAGE
    CITATION = cuhk03.CITATION
    ENCODING = "png"
    RULES: ClassVar = Rules(
        official={
            records.TRAIN: Official(7_365, 767),
            records.QUERY: Official(1_400, 700),
            records.GALLERY: Official(5_332, 700),
        }
    )

    @classmethod
    def read_source(cls, source: str | os.PathLike[str], **options: Any) -> tuple[Files, Listing]:
        """See `cuhk03.read_source`."""
        return cuhk03.read_source(source, "detected")
