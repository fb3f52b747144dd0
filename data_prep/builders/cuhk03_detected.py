"""CUHK03 with boxes by a pedestrian detector, see `cuhk03`."""

from typing import ClassVar

from data_prep.builders.cuhk03 import Cuhk03Builder
from data_prep.check.rules import Official, Rules
from dmosnet_jax.data import records


class Cuhk03Detected(Cuhk03Builder):
    """Builder of `cuhk03_detected`."""

    name = "cuhk03_detected"
    DESCRIPTION = "CUHK03, new protocol, boxes by a pedestrian detector: 1,467 people, two of ten cameras each."
    KIND = "detected"
    RULES: ClassVar = Rules(
        official={
            records.TRAIN: Official(7_365, 767),
            records.QUERY: Official(1_400, 700),
            records.GALLERY: Official(5_332, 700),
        }
    )
