"""Parameters and multiply-adds of every network (paper, Figure 8), counted over our own programs.

    python -m dmosnet_jax.benchmarks.complexity --output=complexity.csv --picture=complexity.svg

Parameters exclude classifier and BNNeck, as the reference figures do. `weighted` counts convolutions and linear maps,
as usual; `attention products` those between activations that DL-MHSA adds. Accuracies on Market-1501 are the paper's.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dmosnet_jax.benchmarks import command
from dmosnet_jax.core import tables
from dmosnet_jax.core.command import guarded, run_program
from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.models import Model, build, counting, names

PICTURES = (".svg", ".png", ".pdf")


@dataclasses.dataclass(frozen=True)
class Published:
    """mAP and rank-1 on Market-1501 in percent, and where the paper says so."""

    mean_ap: float
    rank1: float | None
    source: str


# Zhou et al., Sensors 2022, 22, 6293.
PUBLISHED: dict[tuple[str, tuple[int, ...]], tuple[Published, ...]] = {
    ("osnet_x1_0", (0, 0, 0)): (Published(84.9, 94.8, "Table 2"), Published(86.16, None, "Table 3, LUPerson")),
    ("dmosnet_x1_0", (1, 0, 0)): (
        Published(86.76, 95.26, "Table 2"),
        Published(87.36, 95.61, "Table 4, LUPerson"),
    ),
    ("dmosnet_x1_0", (0, 1, 0)): (Published(86.68, 95.01, "Table 2"),),
    ("dmosnet_x1_0", (0, 0, 1)): (Published(86.42, 95.06, "Table 2"),),
    ("dmosnet_x1_0", (1, 1, 1)): (Published(84.93, 93.88, "Table 2"),),
    ("resnet50", (0, 0, 0)): (Published(81.95, None, "Table 3, ImageNet"), Published(83.23, None, "Table 3, LUPerson")),
}
_MASKS = ((0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))


def networks(image_size: tuple[int, int], chosen: Sequence[str]) -> list[Model]:
    """The networks of the table: each name with its own head, DM-OSNet with every mask.

    Raises:
        ConfigError: an unknown name, or an image size that a network can't take.
    """
    models = []
    for name in chosen:
        neck = "fc" if name.startswith("osnet") else "bnneck"
        models.append(build(name, neck=neck, image_size=image_size))
        if name == "dmosnet_x1_0":
            models += [build(name, attention=mask, neck=neck, image_size=image_size) for mask in _MASKS]
    return models


def measure(model: Model) -> dict[str, Any]:
    """One row of the table."""
    operations = counting.operations(model)
    # The better of the published figures is that of the whole method.
    published = PUBLISHED.get((model.name, model.attention), ())
    best = max(published, key=lambda figure: figure.mean_ap, default=None)
    return {
        "model": model.name,
        "attention": "".join(map(str, model.attention)) if any(model.attention) else "-",
        "neck": model.neck,
        "parameters": counting.parameters(model),
        "weighted": operations.weighted,
        "attention products": operations.attention,
        "multiply-adds": operations.total,
        "mAP": best.mean_ap if best else None,
        "rank-1": best.rank1 if best else None,
        "source": best.source if best else "-",
    }


# Family: its names' beginning, marker and size; nested sizes keep networks of equal cost apart.
_FAMILIES = (
    ("ResNet50", "resnet50", "D", 60),
    ("OSNet-AIN", "osnet_ain", "s", 110),
    ("OSNet-IBN", "osnet_ibn", "s", 55),
    ("OSNet", "osnet", "s", 16),
    ("DM-OSNet-IBN", "dmosnet_ibn", "o", 80),
    ("DM-OSNet", "dmosnet", "o", 22),
)


def draw(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Writes a picture: parameters against multiply-adds, once for all and once for the networks of full width.

    Raises:
        DataError: the file can't be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    everything, full = figure.subplots(1, 2)
    left = list(rows)
    for number, (label, start, marker, size) in enumerate(_FAMILIES):
        members = [row for row in left if row["model"].startswith(start)]
        left = [row for row in left if row not in members]
        for axes in (everything, full):
            shown = [row for row in members if axes is everything or row["model"].endswith("x1_0")]
            points = np.array([_costs(row) for row in shown]).reshape(-1, 2)
            style = {"marker": marker, "s": size, "facecolors": "none", "edgecolors": f"C{number}"}
            axes.scatter(*points.T, label=label if members else None, **style)
    for row in (row for row in rows if row["mAP"] is not None):
        mask = "" if row["attention"] == "-" else f" [{','.join(row['attention'])}]"
        text = f"{row['model']}{mask}\nmAP {row['mAP']:.2f} ({row['source']})"
        if row["model"].endswith("x1_0"):
            full.annotate(text, _costs(row), (6, 6), textcoords="offset points", fontsize=7)
        else:
            side = {"horizontalalignment": "right", "verticalalignment": "top"}
            everything.annotate(text, _costs(row), (-2, -8), textcoords="offset points", fontsize=7, **side)
    everything.set(xscale="log", yscale="log", title="all networks")
    full.set(title="full width; mAP on Market-1501 as published")
    full.margins(0.25)
    everything.legend(loc="upper left")
    for axes in (everything, full):
        axes.set(xlabel="parameters (millions)", ylabel="multiply-adds (billions)")
        axes.grid(visible=True, which="both", alpha=0.2)
    with atomic_write(path) as part:
        figure.savefig(part, format=path.rpartition(".")[2])


def _costs(row: dict[str, Any]) -> tuple[float, float]:
    return row["parameters"] / 1e6, row["multiply-adds"] / 1e9


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser("complexity", __doc__)
    parser.add_argument("--models", default="", help="comma-separated names; default all")
    parser.add_argument("--image_size", type=int, nargs=2, default=(256, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--picture", default="", help=f"picture to write, {', '.join(PICTURES)}")
    return parser.parse_args(argv)


def _run(options: argparse.Namespace) -> None:
    if options.picture and not options.picture.endswith(PICTURES):
        raise ConfigError(f"--picture={options.picture}: the suffix must be one of {', '.join(PICTURES)}")
    chosen = [name for name in options.models.split(",") if name] or names()
    rows = sorted(map(measure, networks(tuple(options.image_size), chosen)), key=lambda row: row["multiply-adds"])
    print(f"one image of {options.image_size[0]}x{options.image_size[1]}; parameters without classifier and BNNeck")
    tables.publish(rows, options.output)
    if options.picture:
        draw(rows, options.picture)
        print(f"written: {options.picture}")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    options = _arguments(argv)
    return guarded(lambda: _run(options))


if __name__ == "__main__":
    run_program(main)
