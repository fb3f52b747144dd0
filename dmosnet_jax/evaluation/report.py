"""A self-contained HTML page about one run (`report.html`): figures, curves, rank lists, clusters, configuration.

The page refers to nothing outside itself and has no script (its content policy forbids both), follows the reader's
light or dark setting, works with the keyboard alone, and tells matches from mismatches by sign and line style as well
as by colour. Every picture has a bound of bytes; how many there are is the caller's choice.
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
from dmosnet_jax.evaluation.activation import coloured
from dmosnet_jax.evaluation.ranking import CameraPairs
from dmosnet_jax.evaluation.report_charts import Chart, Line, charts_from_metrics, cluster_charts, describe, draw_svg
from dmosnet_jax.evaluation.thresholds import Thresholds

__all__ = [
    "Chart",
    "ClusterSheet",
    "Clusters",
    "EmbeddingMap",
    "Line",
    "MapPoint",
    "RankItem",
    "RankList",
    "charts_from_metrics",
    "cluster_charts",
    "cmc_chart",
    "library_versions",
    "roc_chart",
    "similarity_chart",
    "thumbnail",
    "write_report",
]

# Width, height and bytes of a picture; JPEG's quality falls until it has no more.
_THUMBNAIL, _THUMBNAIL_BYTES = (128, 192), 6000
_SMALL, _SMALL_BYTES = (64, 96), 1600
# A map has 16 x 8 places in all.
_HEAT, _HEAT_BYTES = (32, 48), 900
_QUALITIES = (88, 75, 60, 40, 20)
_CMC_RANKS = 20
# Axes of shares begin at nothing, and have some room above all.
_PERCENT = (0.0, 102.0)
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
        rank: None: its place in the list, from 1.
        activation: its activation map, float [h, w]; None draws none.
    """

    image: bytes | np.ndarray
    caption: str
    match: bool | None
    rank: int | None = None
    activation: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class RankList:
    """A query image and its best gallery images, best first, under a line that says how well it was found.

    A list whose query has an activation map, as in `RankItem`, has a box that lays the maps over the pictures.
    """

    query: bytes | np.ndarray
    query_caption: str
    items: Sequence[RankItem]
    note: str = ""
    query_activation: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class ClusterSheet:
    """Images of a cluster, from the one nearest to its centroid to the farthest.

    Attributes:
        note: a line about the cluster.
        items: `match` says whether an image shows the person whom most of the cluster's images show.
    """

    note: str
    items: Sequence[RankItem]


@dataclasses.dataclass(frozen=True)
class Clusters:
    """The clusters that a run trained on.

    Attributes:
        note: how many there are, and of when.
        sizes: how many images are in a cluster, and how many such clusters there are.
        sheets: some of the clusters, by heading.
    """

    note: str
    sizes: Sequence[tuple[str, int]]
    sheets: Mapping[str, Sequence[ClusterSheet]]


@dataclasses.dataclass(frozen=True)
class MapPoint:
    """An image in the map of the embeddings.

    Attributes:
        image: as in `RankItem`.
        caption: e.g. "id 12, camera 3, query".
        place: on the two axes.
        camera: its number.
        identity: its number.
    """

    image: bytes | np.ndarray
    caption: str
    place: tuple[float, float]
    camera: int
    identity: int


@dataclasses.dataclass(frozen=True)
class EmbeddingMap:
    """Images where a network puts them.

    Attributes:
        points: the images that are shown.
        shares: of the variance, that along each of the two axes, fractions.
        note: which images these are.
    """

    points: Sequence[MapPoint]
    shares: tuple[float, float]
    note: str


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
    table: Sequence[Mapping[str, str]] = (),
    cmc: Sequence[float] | np.ndarray = (),
    curves: Sequence[Chart] = (),
    rank_lists: Mapping[str, Sequence[RankList]] | None = None,
    clusters: Clusters | None = None,
    pairs: CameraPairs | None = None,
    embedding: EmbeddingMap | None = None,
    network: Mapping[str, Any] | None = None,
    command: str = "",
    config: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> pathlib.Path:
    """Writes the page; it appears under its name only when complete.

    Args:
        path: the `.html` file; its folder is made where it is missing.
        title: heading, plain text as all texts here.
        results: the fields of `results.json`; the scores are fractions. Unknown fields are listed below the known ones.
        subtitle: one line under the heading, e.g. dataset and checkpoint.
        table: rows with the same keys, which are the header.
        cmc: matching rate at ranks 1, 2, ..., fractions.
        curves: charts of the training, see `charts_from_metrics`.
        rank_lists: queries with their best matches, by heading.
        clusters: of a run without labels.
        pairs: mAP by pair of cameras.
        embedding: the map of the embeddings.
        network: what is to be said of the network, e.g. its parameters.
        command: what makes this page again.
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
        table=list(table),
        charts=[(chart.title, _described_svg(chart, f"chart{index}")) for index, chart in enumerate(charts)],
        rank_lists={heading: lists for heading, lists in (rank_lists or {}).items() if lists},
        known=any(
            item.match is not None for lists in (rank_lists or {}).values() for entry in lists for item in entry.items
        ),
        mapped=any(entry.query_activation is not None for lists in (rank_lists or {}).values() for entry in lists),
        clusters=clusters,
        pairs=_pair_rows(pairs) if pairs else None,
        cameras=pairs.gallery_cameras.tolist() if pairs else [],
        embedding=_placed(embedding) if embedding else None,
        command=command,
        tables=[
            ("Network", list((network or {}).items())),
            ("Thresholds", list(_threshold_rows(results.get("thresholds")))),
            ("Further results", list(_flat(others))),
            ("Configuration", list(_flat(config or {}))),
            ("Versions", list(versions.items())),
        ],
        thumbnail=thumbnail,
        heat=_heat,
        small=lambda image, name: thumbnail(image, name, _SMALL, _SMALL_BYTES),
    )
    target = pathlib.Path(path)
    with atomic_write(target) as part:
        part.write_text(page, encoding="utf-8")
    return target


def cmc_chart(curves: Mapping[str, Sequence[float]], of: str = "") -> Chart:
    """Matching rates (fractions) at ranks 1, 2, ..., a line for each name; `of` ends the title."""
    lines = [
        Line(name, list(range(1, len(rates[:_CMC_RANKS]) + 1)), [100 * float(rate) for rate in rates[:_CMC_RANKS]])
        for name, rates in curves.items()
    ]
    title = "Cumulative matching characteristic" + (f" on {of}" if of else "")
    return Chart(title, "rank", "queries matched (%)", lines, y_range=_PERCENT)


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


def roc_chart(thresholds: Thresholds) -> Chart:
    """How many pairs of the same person are accepted where so many of different people are."""
    far, tar = 100 * thresholds.curve[:, ::-1]
    line = Line("true accepts", far.tolist(), tar.tolist())
    labels = "pairs of different people accepted (%)", "pairs of the same person accepted (%)"
    return Chart("Receiver operating characteristic", *labels, [line], x_log=True, y_range=_PERCENT)


def _pair_rows(pairs: CameraPairs) -> list[tuple[int, list[tuple[float | None, int, float]]]]:
    """Query camera; and for each gallery camera mAP in percent, queries, and a shade from 0 (lowest) to 100."""
    known = pairs.mean_ap[np.isfinite(pairs.mean_ap)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
    shades = 100 * (pairs.mean_ap - low) / (high - low if high > low else 1.0)
    percent = [[None if math.isnan(value) else 100 * value for value in row] for row in pairs.mean_ap.tolist()]
    cells = [list(zip(*row, strict=True)) for row in zip(percent, pairs.queries.tolist(), shades.tolist(), strict=True)]
    return list(zip(pairs.query_cameras.tolist(), cells, strict=True))


def _placed(embedding: EmbeddingMap) -> dict[str, Any]:
    """The map for the page: places in percent of its width and height, from the left to the right."""
    places = np.array([point.place for point in embedding.points], np.float64).reshape(-1, 2)
    low, high = places.min(axis=0), places.max(axis=0)
    shown = 100 * (places - low) / np.where(high > low, high - low, 1.0)
    cameras, identities = (
        {value: number for number, value in enumerate(sorted(values))}
        for values in ({point.camera for point in embedding.points}, {point.identity for point in embedding.points})
    )
    return {
        "note": embedding.note,
        "shares": [f"{100 * share:.1f} %" for share in embedding.shares],
        "cameras": cameras,
        "points": [
            (
                embedding.points[row],
                shown[row],
                cameras[embedding.points[row].camera],
                identities[embedding.points[row].identity],
            )
            for row in np.argsort(shown[:, 0], kind="stable")
        ],
    }


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
    rates = [float(rate) for rate in cmc[:_CMC_RANKS]]
    return [cmc_chart({"matching rate": rates})] if len(rates) > 1 else []


def _described_svg(chart: Chart, salt: str) -> Markup:
    label = Markup('<svg role="img" aria-label="{}" ').format(describe(chart))
    return Markup(draw_svg(chart, salt).replace("<svg ", label, 1))


def thumbnail(
    image: bytes | np.ndarray, name: str, box: tuple[int, int] = _THUMBNAIL, most_bytes: int = _THUMBNAIL_BYTES
) -> str:
    """A small JPEG in base64; originals may be megabytes, and of formats that browsers do not show.

    Args:
        image: as in `RankItem`.
        name: what a message calls it.
        box: width and height that it fits into, pixels.
        most_bytes: lowers the quality, where the picture would have more.

    Raises:
        DataError: it can't be decoded.
    """
    return _jpeg(_fitted(image, name, box), most_bytes)


def _fitted(image: bytes | np.ndarray, name: str, box: tuple[int, int]) -> Image.Image:
    try:
        # As the network saw it.
        picture = Image.fromarray(transforms.decode(image) if isinstance(image, bytes) else image).convert("RGB")
    except (DataError, ValueError, TypeError) as error:
        raise DataError(f"report: {name}: the image cannot be decoded ({error}); convert the dataset again") from error
    picture.thumbnail(box, Image.Resampling.LANCZOS)
    return picture


def _jpeg(picture: Image.Image, most_bytes: int) -> str:
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= most_bytes:
            break
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _heat(values: np.ndarray, image: bytes | np.ndarray, name: str) -> str:
    """A map in colours, of the picture's proportions, for the browser to enlarge over it."""
    width, height = _fitted(image, name, _HEAT).size
    return _jpeg(Image.fromarray(coloured(values, (height, width))), _HEAT_BYTES)


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names, as on the command line."""
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
