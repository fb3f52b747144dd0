"""Line charts as SVG fragments that take their text colour from the page around them."""

import dataclasses
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Readable on white and on near-black; the dashes tell lines apart without colour.
_LINE_STYLES = (("#3b82f6", "-"), ("#d9701f", "--"), ("#1f9d63", "-."), ("#a855c7", ":"))
# Drawn colours that become the page's text colour; no other element uses them.
_INK = "#010203"
_MAX_POINTS = 1000


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart; `x` and `y` are of equal length, points that are not finite are left out."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Chart:
    """A titled line chart.

    Attributes:
        title: above it.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        lines: what is drawn.
        steps: draws histograms, whose x are the middles of bins and no whole numbers.
        x_log: the horizontal axis is logarithmic; points at or below 0 are left out.
        y_range: ends of the vertical axis; None: as the lines need.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    steps: bool = False
    x_log: bool = False
    y_range: tuple[float, float] | None = None


# Which metrics share a chart: title, y label, names (the last part of `stage/name`).
_METRIC_CHARTS = (
    ("Loss", "loss", r"loss|.*_loss|loss_.*"),
    ("Accuracy", "fraction", r"mAP|rank1|mINP"),
    ("Learning rate", "rate", r"learning_rate|lr"),
    ("Speed", "images per second", r"images_per_second|images_per_sec"),
)
# Those of SpCL have a value for each epoch.
_CLUSTER_CHARTS = (
    ("Clusters", "count", r"clusters|unclustered|largest_cluster"),
    ("Pseudo-labels against identities", "agreement", r"pseudo_.*"),
)


def charts_from_metrics(rows: Iterable[Mapping[str, Any]], x: str = "step") -> list[Chart]:
    """Charts of a training run.

    Args:
        rows: the lines of `metrics.jsonl`: mappings with `x` and any of the known metrics (loss, mAP, rank1, mINP,
            learning rate, images per second), also with a prefix such as `train/loss`; others are ignored.
        x: the name of the horizontal axis, "step" or "epoch"; rows without it are ignored.

    Returns:
        One chart per kind of metric that has at least two points.
    """
    return _charts(rows, x, _METRIC_CHARTS)


def cluster_charts(rows: Iterable[Mapping[str, Any]]) -> list[Chart]:
    """Charts of a run's clusters and of how well they agree with identities, by epoch from 1, as the log counts them.

    Args:
        rows: the lines of `metrics.jsonl`; those without `epoch` and `clusters` are ignored.

    Returns:
        Up to two charts; none of a single epoch.
    """
    epochs = [{**row, "epoch": row["epoch"] + 1} for row in rows if _is_number(row.get("epoch")) and "clusters" in row]
    return _charts(epochs, "epoch", _CLUSTER_CHARTS)


def _charts(rows: Iterable[Mapping[str, Any]], x: str, kinds: Iterable[tuple[str, str, str]]) -> list[Chart]:
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if not _is_number(row.get(x)):
            continue
        for name, value in row.items():
            if name != x and _is_number(value):
                xs, ys = series.setdefault(name, ([], []))
                xs.append(float(row[x]))
                ys.append(float(value))
    charts = []
    for title, label, pattern in kinds:
        names = [name for name in series if re.fullmatch(pattern, name.rsplit("/", 1)[-1])]
        lines = [
            Line(name.removeprefix("pseudo_").replace("_", " "), *series[name])
            for name in names
            if len(series[name][0]) > 1
        ]
        if lines:
            charts.append(Chart(title, x, label, lines))
    return charts


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _points(chart: Chart, line: Line) -> list[tuple[float, float]]:
    """The points that the axes can show, thinned evenly (the last one kept): a long run does not make a huge page."""
    finite = [
        (float(x), float(y))
        for x, y in zip(line.x, line.y, strict=True)
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not chart.x_log)
    ]
    step = math.ceil(len(finite) / _MAX_POINTS) or 1
    return finite[::-1][::step][::-1]


def describe(chart: Chart) -> str:
    """What the chart shows in words, for readers who cannot see it."""
    parts = []
    for line in chart.lines:
        points = _points(chart, line)
        if points:
            (x0, y0), (x1, y1) = points[0], points[-1]
            parts.append(f"{line.label} goes from {y0:.4g} at {x0:g} to {y1:.4g} at {x1:g}")
    return f"{chart.title}, {chart.y_label} over {chart.x_label}: {'; '.join(parts) or 'no points'}."


def _line_style(index: int) -> tuple[str, str]:
    """Colour and dashes, of which no pair comes twice in sixteen lines."""
    number = len(_LINE_STYLES)
    return _LINE_STYLES[index % number][0], _LINE_STYLES[(index + index // number) % number][1]


def draw_svg(chart: Chart, salt: str, width: float = 5.2, height: float = 2.9) -> str:
    """The chart as an `<svg>` element.

    Args:
        chart: what to draw.
        salt: tells apart the internal identifiers of several charts on one page.
        width: inches.
        height: inches.
    """
    # The SVG settings exist only as global parameters; the context puts them back.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        _style(axes, chart)
        for index, line in enumerate(chart.lines):
            colour, dashes = _line_style(index)
            points = _points(chart, line)
            marker = "o" if len(points) <= 30 and not chart.steps else None
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                dashes,
                drawstyle="steps-mid" if chart.steps else "default",
                color=colour,
                marker=marker,
                markersize=3.5,
                linewidth=1.8,
                label=line.label.lstrip("_"),
            )
        if len(chart.lines) > 1:
            axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Fixed sizes would overflow narrow screens; the view box keeps the aspect.
    opening = svg[: svg.index(">")]
    return re.sub(r' (?:width|height)="[^"]*"', "", opening) + svg[len(opening) :]


def _style(axes: Axes, chart: Chart) -> None:
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_INK)
        axes.spines[side].set_alpha(0.5)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.grid(color=_INK, alpha=0.12, linewidth=0.8)
    axes.set_axisbelow(True)
    if chart.x_log:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=not chart.steps))
    if chart.y_range is not None:
        axes.set_ylim(*chart.y_range)
    # Dollar signs in labels are text here, not formulas.
    axes.set_xlabel(chart.x_label, color=_INK, fontsize=9, parse_math=False)
    axes.set_ylabel(chart.y_label, color=_INK, fontsize=9, parse_math=False)
