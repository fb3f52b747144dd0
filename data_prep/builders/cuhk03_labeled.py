"""CUHK03 with boxes drawn by hand, see `cuhk03`."""

from typing import ClassVar

from data_prep.builders.cuhk03 import Cuhk03Builder
from data_prep.check.rules import Official, Rules
from dmosnet_jax.data import records


class Cuhk03Labeled(Cuhk03Builder):
    """Builder of `cuhk03_labeled`."""

    name = "cuhk03_labeled"
    DESCRIPTION = "CUHK03, new protocol, boxes drawn by hand: 1,467 people, two of ten cameras each."
    KIND = "labeled"
    RULES: ClassVar = Rules(
        official={
            records.TRAIN: Official(7_368, 767),
            records.QUERY: Official(1_400, 700),
            records.GALLERY: Official(5_328, 700),
        }
    )
