"""A self-contained HTML page about one evaluation (`report.html`): figures, curves, rank lists, configuration.

The page refers to nothing outside itself (its content policy forbids it), follows the reader's light or dark setting,
and tells matches from mismatches by sign and line style as well as by colour.
"""

import base64
import dataclasses
import importlib.metadata
import io
import math
import os
import pathlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.data import transforms
from dmosnet_jax.evaluation.report_charts import Chart, Line, charts_from_metrics, describe, draw_svg
from dmosnet_jax.evaluation.thresholds import Thresholds

__all__ = [
    "Chart",
    "Line",
    "RankItem",
    "RankList",
    "charts_from_metrics",
    "library_versions",
    "similarity_chart",
    "thumbnail",
    "write_report",
]

_THUMBNAIL = (128, 192)
_CMC_RANKS = 20
_SCORES = (("mAP", "mAP"), ("rank1", "Rank-1"), ("rank5", "Rank-5"), ("rank10", "Rank-10"), ("mINP", "mINP"))
_COUNTS = (("num_query", "queries"), ("num_valid_query", "with a match"), ("num_gallery", "gallery images"))
_LIBRARIES = ("dmosnet_jax", "jax", "jaxlib", "flax", "optax", "grain", "numpy", "pillow")

_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("dmosnet_jax", "evaluation"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


@dataclasses.dataclass(frozen=True)
class RankItem:
    """A gallery image in a rank list.

    Attributes:
        image: an encoded image file's bytes, or uint8 `[H, W, 3]` RGB.
        caption: e.g. "id 12, camera 3".
        match: whether it shows the query's person; None where that is not known.
    """

    image: bytes | np.ndarray
    caption: str
    match: bool | None


@dataclasses.dataclass(frozen=True)
class RankList:
    """A query image and its best gallery images, best first."""

    query: bytes | np.ndarray
    query_caption: str
    items: Sequence[RankItem]


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape a result, those installed."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    results: Mapping[str, Any],
    subtitle: str = "",
    cmc: Sequence[float] | np.ndarray = (),
    curves: Sequence[Chart] = (),
    rank_lists: Sequence[RankList] = (),
    config: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> pathlib.Path:
    """Writes the page; it appears under its name only when complete.

    Args:
        path: the `.html` file; its folder is made where it is missing.
        title: heading, plain text as all texts here.
        results: the fields of `results.json`; the scores are fractions. Unknown fields are listed below the known ones.
        subtitle: one line under the heading, e.g. dataset and checkpoint.
        cmc: matching rate at ranks 1, 2, ..., fractions.
        curves: charts of the training, see `charts_from_metrics`.
        rank_lists: queries with their best matches.
        config: the configuration, nested mappings; None leaves the table out.
        versions: library versions; None takes `library_versions()`.

    Returns:
        The path written.

    Raises:
        DataError: an image cannot be decoded, or the file cannot be written.
    """
    charts = [*_cmc_chart(cmc), *curves]
    known = {key for key, _ in (*_SCORES, *_COUNTS)} | {"cmc", "thresholds"}
    others = {key: value for key, value in results.items() if key not in known}
    versions = library_versions() if versions is None else versions
    page = _PAGES.get_template("report.html").render(
        title=title,
        subtitle=subtitle,
        scores=[(label, _percent(results[key])) for key, label in _SCORES if key in results],
        counts=[f"{int(results[key]):,} {label}" for key, label in _COUNTS if key in results],
        charts=[(chart.title, _described_svg(chart, f"chart{index}")) for index, chart in enumerate(charts)],
        rank_lists=rank_lists,
        known=any(item.match is not None for entry in rank_lists for item in entry.items),
        tables=[
            ("Thresholds", list(_threshold_rows(results.get("thresholds")))),
            ("Further results", list(_flat(others))),
            ("Configuration", list(_flat(config or {}))),
            ("Versions", list(versions.items())),
        ],
        thumbnail=thumbnail,
    )
    target = pathlib.Path(path)
    with atomic_write(target) as part:
        part.write_text(page, encoding="utf-8")
    return target


def similarity_chart(thresholds: Thresholds) -> Chart:
    """How similar pairs of the same person and of different people are."""
    middles = (thresholds.edges[1:] + thresholds.edges[:-1]) / 2
    # One empty bin on both sides, so that the steps come back to zero.
    filled = np.flatnonzero(thresholds.same + thresholds.different)
    shown = slice(max(filled[0] - 1, 0), filled[-1] + 2)
    lines = [
        Line(name, middles[shown].tolist(), (100 * counts / counts.sum())[shown].tolist())
        for name, counts in (("same person", thresholds.same), ("different people", thresholds.different))
    ]
    return Chart("Similarity of pairs", "cosine similarity", "share of the pairs (%)", lines, steps=True)


def _threshold_rows(thresholds: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    if thresholds is not None:
        yield "equal error rate", f"{100 * thresholds['eer']:.2f} % at {thresholds['eer_threshold']:.4f}"
        for row in thresholds["tar_at_far"]:
            name = f"true accepts at {100 * row['far']:g} % false accepts"
            yield name, f"{100 * row['tar']:.2f} %, from {row['threshold']:.4f} on"


def _percent(fraction: Any) -> str | None:
    # Without a valid query there is no score.
    return None if fraction is None or not math.isfinite(fraction) else f"{100 * float(fraction):.2f}"


def _cmc_chart(cmc: Sequence[float] | np.ndarray) -> list[Chart]:
    rates = [100 * float(rate) for rate in cmc[:_CMC_RANKS]]
    if len(rates) < 2:
        return []
    line = Line("matching rate", list(range(1, len(rates) + 1)), rates)
    return [Chart("Cumulative matching characteristic", "rank", "queries matched (%)", [line])]


def _described_svg(chart: Chart, salt: str) -> Markup:
    label = Markup('<svg role="img" aria-label="{}" ').format(describe(chart))
    return Markup(draw_svg(chart, salt).replace("<svg ", label, 1))


def thumbnail(image: bytes | np.ndarray, name: str) -> str:
    """A small JPEG in base64; originals may be megabytes, and of formats that browsers do not show.

    Raises:
        DataError: it can't be decoded.
    """
    try:
        # As the network saw it.
        picture = Image.fromarray(transforms.decode(image) if isinstance(image, bytes) else image).convert("RGB")
    except (DataError, ValueError, TypeError) as error:
        raise DataError(f"report: {name}: the image cannot be decoded ({error}); convert the dataset again") from error
    picture.thumbnail(_THUMBNAIL, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names, as on the command line."""
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
