"""CUHK03 with boxes drawn by hand, see `cuhk03`."""

import os
from typing import Any, ClassVar

from data_prep.builders import cuhk03
from data_prep.builders.base import Listing, ReidBuilder
from data_prep.check.rules import Official, Rules
from data_prep.sources.base import Files
from dmosnet_jax.data import records


class Cuhk03Labeled(ReidBuilder):
    """Builder of `cuhk03_labeled`."""

    name = "cuhk03_labeled"
    DESCRIPTION = "CUHK03, new protocol, boxes drawn by hand: 1,467 people, two of ten cameras each."
    HOMEPAGE = cuhk03.HOMEPAGE
    CITATION = cuhk03.CITATION
    ENCODING = "png"
    RULES: ClassVar = Rules(
        official={
            records.TRAIN: Official(7_368, 767),
            records.QUERY: Official(1_400, 700),
            records.GALLERY: Official(5_328, 700),
        }
    )

    @classmethod
    def read_source(cls, source: str | os.PathLike[str], **options: Any) -> tuple[Files, Listing]:
        """See `cuhk03.read_source`."""
        return cuhk03.read_source(source, "labeled")
