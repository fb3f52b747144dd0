"""The tables that `python -m dmosnet_jax.tools.reproduce` makes, declared row by row."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dmosnet_jax.recipes.paper import MARKET, figures


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table: a training run for each seed, and its score.

    Attributes:
        name: of the row, unique in its table.
        about: what it is, for the table.
        config: the experiment, as it stands after `--config=configs/`; empty: the start is scored as it is.
        overrides: fields of the config that differ from it.
        seeds: a run for each.
        start: file name of the weights that it starts from, in the folder of weights.
        start_row: name of the row that it starts from instead: the run of the same seed.
        trains_on: data sets that the training needs.
        scored_on: data set of the score; empty: the row only prepares others.
        figures: mAP and rank-1 to compare with, in percent; None where not published.
        whose: where these figures are from.
    """

    name: str
    about: str
    config: str = ""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    start: str = ""
    start_row: str = ""
    trains_on: tuple[str, ...] = (MARKET,)
    scored_on: str = MARKET
    figures: tuple[float | None, float | None] = (None, None)
    whose: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows, each after the one that it starts from, and the sizes that make a score the official one.

    Attributes:
        title: heading.
        rows: in order.
        official: numbers of query and gallery images of each data set under its official protocol.
    """

    title: str
    rows: tuple[Row, ...]
    official: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=lambda: {MARKET: (3_368, 15_913)})


_MSMT17 = "osnet_x0_25_msmt17.pth"
_OF_TABLE_2: dict[tuple[int, int, int], tuple[str, dict[str, Any]]] = {
    (0, 0, 0): ("osnet_x1_0", {"model.neck": "bnneck"}),
    (1, 0, 0): ("dmosnet_x1_0", {}),
    (1, 1, 1): ("dmosnet_x1_0", {"model.attention": (1, 1, 1)}),
}


def _paper() -> tuple[Row, ...]:
    return tuple(
        Row(
            f"attention_{''.join(map(str, mask))}",
            f"attention [{','.join(map(str, mask))}], x1.0, from scratch",
            f"finetune.py:{MARKET},model={model}",
            {"model.dtype": "bfloat16"} | overrides,
            seeds=(0, 1, 2),
            figures=figures(model, mask),
            whose="the paper, Table 2",
        )
        for mask, (model, overrides) in _OF_TABLE_2.items()
    )


def _paper_small() -> tuple[Row, ...]:
    size = {"image_size": (128, 64)}
    # Half of the paper's epochs and warm-up, and the rate lowered at the same shares of the run.
    tuned = size | {"model.neck": "bnneck", "optim.decay_epochs": (25, 50), "optim.warmup_steps": 1000}
    rows = []
    for name, title, mask in (("osnet", "OSNet", (0, 0, 0)), ("dmosnet", "DM-OSNet [1,0,0]", (1, 0, 0))):
        common: dict[str, Any] = {"overrides": tuned, "seeds": (0, 1)}
        config = f"finetune.py:{MARKET},model={name}_x0_25,epochs=60"
        before = f"{name}_spcl"
        rows += [
            Row(
                f"{name}_scratch",
                f"{title} x0.25, from scratch",
                config,
                figures=figures(f"{name}_x1_0", mask),
                whose="the paper at x1.0 and 256x128",
                **common,
            ),
            Row(
                before,
                f"{title} x0.25, SpCL on unlabelled crops",
                f"spcl_luperson.py:model={name}_x0_25",
                size | {"model.neck": "bnneck", "model.dtype": "float32"},
                seeds=(0, 1),
                trains_on=("luperson",),
                scored_on="",
            ),
            Row(
                f"{name}_pretrained",
                f"{title} x0.25, from those",
                config,
                start_row=before,
                figures=figures(f"{name}_x1_0", mask, pretrained=True),
                whose="the paper at x1.0 and 256x128, from LUPerson",
                **common,
            ),
        ]
    return tuple(rows)


def _adaptation() -> tuple[Row, ...]:
    return (
        Row("msmt17", "OSNet x0.25, MSMT17's weights", start=_MSMT17, trains_on=()),
        Row(
            "spcl",
            "the same adapted by SpCL",
            "spcl_market1501.py:epochs=50",
            {"train.steps_per_epoch": 400, "train.eval_every_epochs": 10},
            start=_MSMT17,
            figures=(73.1, None),
            whose="SpCL, ResNet50 from ImageNet",
        ),
        Row(
            "cluster_contrast",
            "the same adapted by Cluster Contrast",
            "spcl_market1501.py:recipe=cluster_contrast,model=osnet_x0_25",
            start=_MSMT17,
        ),
    )


TABLES = {
    "market_x0_25": Table(
        "OSNet x0.25 on Market-1501",
        (
            Row(
                "finetuned",
                "OSNet x0.25 from ImageNet, the paper's fine-tuning",
                f"finetune.py:{MARKET},model=osnet_x0_25",
                {"model.neck": "bnneck"},
                start="osnet_x0_25_imagenet.pth",
                figures=(75.0, 91.2),
                whose="torchreid's zoo, 256x128",
            ),
            Row(
                "finetuned_cosine",
                "the same in a third of the time: 40 epochs, the rate falling by a cosine from 1e-3",
                f"finetune.py:{MARKET},model=osnet_x0_25,epochs=40",
                {
                    "model.neck": "bnneck",
                    "optim.schedule": "cosine",
                    "optim.learning_rate": 1e-3,
                    "optim.final_factor": 2e-3,
                    "optim.warmup_steps": 1000,
                },
                start="osnet_x0_25_imagenet.pth",
                figures=(75.0, 91.2),
                whose="torchreid's zoo, 256x128",
            ),
        ),
    ),
    "paper_small": Table("The paper's comparison at x0.25, 128x64, 60 epochs", _paper_small()),
    "adaptation": Table("MSMT17 to Market-1501 without labels", _adaptation()),
    "paper": Table("Table 2 of the paper, Market-1501", _paper()),
}
