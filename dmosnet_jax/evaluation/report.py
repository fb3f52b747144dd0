"""A self-contained HTML page about one evaluation: figures, curves, rank lists, configuration.

The page refers to nothing outside itself (its content policy forbids it), follows the reader's light or dark setting,
and tells matches from mismatches by sign and line style as well as by colour.
"""

import base64
import dataclasses
import html
import importlib.metadata
import io
import math
import os
import pathlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.data import transforms
from dmosnet_jax.evaluation.report_charts import Chart, Line, charts_from_metrics, describe, draw_svg

__all__ = ["Chart", "Line", "RankItem", "RankList", "charts_from_metrics", "library_versions", "write_report"]

_THUMBNAIL = (128, 192)
_CMC_RANKS = 20
_SCORES = (("mAP", "mAP"), ("rank1", "Rank-1"), ("rank5", "Rank-5"), ("rank10", "Rank-10"), ("mINP", "mINP"))
_COUNTS = (("num_query", "queries"), ("num_valid_query", "with a match"), ("num_gallery", "gallery images"))
_LIBRARIES = ("dmosnet_jax", "jax", "jaxlib", "flax", "optax", "grain", "numpy", "pillow")

_STYLE = """
:root{color-scheme:light dark;--bg:#f7f7f5;--card:#fff;--ink:#1c2330;--soft:#5b6472;--line:#dcdfe4;--accent:#2456a6;
--good:#157a47;--bad:#c0322b}
@media (prefers-color-scheme:dark){:root{--bg:#13161b;--card:#1c2027;--ink:#e7eaf0;--soft:#a2abb9;--line:#343b47;
--accent:#82b1ff;--good:#4cc38a;--bad:#ff7b72}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:1.7rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:44px 0 14px}
.sub{color:var(--soft);margin:6px 0 0;overflow-wrap:anywhere}
.note{color:var(--soft);margin:-6px 0 14px}
.scores{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:12px;margin:26px 0 0;padding:0}
.score{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.score dt{color:var(--soft);font-size:.85rem}
.score dd{margin:2px 0 0;font-size:1.75rem;font-weight:650;font-variant-numeric:tabular-nums}
.score:first-child dd{color:var(--accent)}
.score small{font-size:.95rem;font-weight:500;color:var(--soft);margin-left:1px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px}
.chart{background:var(--card);border:1px solid var(--line);border-radius:10px;margin:0;padding:14px 16px}
.chart svg{display:block;width:100%;height:auto}
.chart svg text{font-family:inherit!important}
.chart figcaption{font-weight:600;margin-bottom:6px}
.scroll{overflow-x:auto}
.ranks{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;margin:0 0 14px;
display:flex;gap:9px;width:max-content;min-width:100%}
.ranks figure{margin:0;width:86px;flex:1 0 86px;max-width:98px}
.ranks img{display:block;width:100%;aspect-ratio:1/2;object-fit:contain;border-radius:6px;border:3px solid var(--line);
background:var(--bg)}
.ranks .query{padding-right:12px;margin-right:3px;border-right:1px solid var(--line);width:99px;
flex-basis:99px;max-width:111px}
.ranks .query img{border-color:var(--accent)}
.ranks .match img{border-color:var(--good)}
.ranks .miss img{border-color:var(--bad);border-style:dashed}
.ranks figcaption{font-size:.74rem;line-height:1.35;color:var(--soft);margin-top:5px;overflow-wrap:anywhere}
.ranks b{display:block;color:var(--ink)}
.ranks .match b{color:var(--good)}
.ranks .miss b{color:var(--bad)}
table{border-collapse:collapse;width:100%;font-size:.88rem}
th,td{text-align:left;vertical-align:top;padding:6px 12px 6px 0;border-bottom:1px solid var(--line);
overflow-wrap:anywhere}
th{font-weight:500;color:var(--soft);width:34%}
td{font-family:ui-monospace,SFMono-Regular,Menlo,monospace}
.tables{columns:2 400px;column-gap:40px}
.tables section{break-inside:avoid;padding-top:36px}
.tables h2{margin-top:0}
@media print{.ranks{break-inside:avoid}.scroll{overflow:visible}}
"""


@dataclasses.dataclass(frozen=True)
class RankItem:
    """A gallery image in a rank list.

    Attributes:
        image: an encoded image file's bytes, or uint8 `[H, W, 3]` RGB.
        caption: e.g. "id 12, camera 3".
        match: whether it shows the query's person.
    """

    image: bytes | np.ndarray
    caption: str
    match: bool


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
    target = pathlib.Path(path)
    sections = [_heading(title, subtitle), _scores(results)]
    charts = [*_cmc_chart(cmc), *curves]
    if charts:
        sections.append(_charts(charts))
    if rank_lists:
        sections.append(_rank_lists(rank_lists))
    sections.append(_tables(results, config, library_versions() if versions is None else versions))
    page = _page(title, "\n".join(sections))
    with atomic_write(target) as part:
        part.write_text(page, encoding="utf-8")
    return target


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _page(title: str, body: str) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _heading(title: str, subtitle: str) -> str:
    return f"<h1>{_text(title)}</h1>" + (f'\n<p class="sub">{_text(subtitle)}</p>' if subtitle else "")


def _scores(results: Mapping[str, Any]) -> str:
    cards = "".join(
        f'<div class="score"><dt>{label}</dt><dd>{_percent(results[key])}</dd></div>'
        for key, label in _SCORES
        if key in results
    )
    counts = " · ".join(f"{int(results[key]):,} {label}" for key, label in _COUNTS if key in results)
    return f'<dl class="scores">{cards}</dl>\n<p class="sub">{counts}</p>'


def _percent(fraction: Any) -> str:
    # No query may have a match, and then there is no score.
    if fraction is None or not math.isfinite(fraction):
        return "n/a"
    return f"{100 * float(fraction):.2f}<small>%</small>"


def _cmc_chart(cmc: Sequence[float] | np.ndarray) -> list[Chart]:
    rates = [100 * float(rate) for rate in cmc[:_CMC_RANKS]]
    if len(rates) < 2:
        return []
    line = Line("matching rate", list(range(1, len(rates) + 1)), rates)
    return [Chart("Cumulative matching characteristic", "rank", "queries matched (%)", [line])]


def _charts(charts: Sequence[Chart]) -> str:
    figures = []
    for index, chart in enumerate(charts):
        svg = draw_svg(chart, f"chart{index}").replace(
            "<svg ", f'<svg role="img" aria-label="{_text(describe(chart))}" ', 1
        )
        figures.append(f'<figure class="chart"><figcaption>{_text(chart.title)}</figcaption>{svg}</figure>')
    return f'<h2>Curves</h2>\n<div class="charts">{"".join(figures)}</div>'


def _rank_lists(rank_lists: Sequence[RankList]) -> str:
    rows = []
    for entry in rank_lists:
        cells = [_image("query", "Query", f"Query: {entry.query_caption}", entry.query, entry.query_caption)]
        for rank, item in enumerate(entry.items, start=1):
            style, sign, meaning = ("match", "✓", "same person") if item.match else ("miss", "✗", "another person")
            alternative = f"Rank {rank}, {meaning}: {item.caption}"
            cells.append(_image(style, f"{sign} {rank}", alternative, item.image, item.caption))
        rows.append(f'<div class="scroll" tabindex="0"><div class="ranks">{"".join(cells)}</div></div>')
    note = "Best gallery images, best first. Solid frame and ✓: the query's person; dashed frame and ✗: another person."
    return f'<h2>Rank lists</h2>\n<p class="note">{note}</p>\n' + "\n".join(rows)


def _image(style: str, label: str, alternative: str, image: bytes | np.ndarray, caption: str) -> str:
    source = base64.b64encode(_thumbnail(image, alternative)).decode("ascii")
    return (
        f'<figure class="{style}"><img alt="{_text(alternative)}" src="data:image/jpeg;base64,{source}">'
        f"<figcaption><b>{label}</b>{_text(caption)}</figcaption></figure>"
    )


def _thumbnail(image: bytes | np.ndarray, name: str) -> bytes:
    """A small JPEG; originals may be megabytes, and of formats that browsers do not show."""
    try:
        # As the network saw it.
        picture = Image.fromarray(transforms.decode(image) if isinstance(image, bytes) else image).convert("RGB")
    except (DataError, ValueError, TypeError) as error:
        raise DataError(f"report: {name}: the image cannot be decoded ({error}); convert the dataset again") from error
    picture.thumbnail(_THUMBNAIL, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _tables(results: Mapping[str, Any], config: Mapping[str, Any] | None, versions: Mapping[str, str]) -> str:
    known = {key for key, _ in (*_SCORES, *_COUNTS)} | {"cmc"}
    others = {key: value for key, value in results.items() if key not in known}
    tables = [("Further results", others), ("Configuration", config or {}), ("Versions", versions)]
    parts = [f"<section><h2>{name}</h2>{_table(rows)}</section>" for name, rows in tables if rows]
    return f'<div class="tables">{"".join(parts)}</div>'


def _table(rows: Mapping[str, Any]) -> str:
    lines = (f'<tr><th scope="row">{_text(key)}</th><td>{_text(value)}</td></tr>' for key, value in _flat(rows))
    return f"<table><tbody>{''.join(lines)}</tbody></table>"


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names, as on the command line."""
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
