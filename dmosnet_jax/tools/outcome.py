"""A table's scores over its seeds, as `table.md` and `table.csv`."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dmosnet_jax.core import tables
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.tools.experiments import Row, Table
from dmosnet_jax.tools.runs import Run

MARKDOWN, CSV = "table.md", "table.csv"
_METRICS = ("mAP", "rank1", "mINP")


def summarise(row: Row, runs: Sequence[Run]) -> dict[str, Any]:
    """The values of one row, over those of its runs that are done; None where there are none.

    Returns:
        `row`, `about`, `runs` (done) and `runs_wanted`; `mAP`, `rank1`, `mINP` in percent, means over the seeds, and
        `<metric>_sd`, standard deviations of a sample (n - 1), None of less than two; `published_mAP`,
        `published_rank1` and `published_by`; `hours` of training, mean over the seeds; `device`, `commit`;
        `queries`, `gallery`.
    """
    done = [run for run in runs if run.is_done]
    notes = [run.note() for run in done]
    scores = [found for run in done if (found := run.results()) is not None]
    values: dict[str, Any] = {"row": row.name, "about": row.about, "runs": len(done), "runs_wanted": len(runs)}
    for metric in _METRICS:
        percent = [100 * score[metric] for score in scores]
        values[metric] = statistics.fmean(percent) if percent else None
        values[f"{metric}_sd"] = statistics.stdev(percent) if len(percent) > 1 else None
    values |= {"published_mAP": row.figures[0], "published_rank1": row.figures[1], "published_by": row.whose}
    values["hours"] = statistics.fmean(note["seconds"] / 3600 for note in notes) if notes and row.config else None
    for name, key in (("device", "devices"), ("commit", "versions")):
        values[name] = " + ".join(dict.fromkeys(text for note in notes for text in note[key]))
    for name in ("query", "gallery"):
        counts = sorted({score[f"num_{name}"] for score in scores})
        values["queries" if name == "query" else name] = counts[0] if len(counts) == 1 else None
    return values


def write(table: Table, name: str, runs: Sequence[Run], workdir: pathlib.Path) -> list[pathlib.Path]:
    """Writes both files from what is done; returns their paths.

    Raises:
        DataError: they can't be written.
    """
    rows = [summarise(row, [run for run in runs if run.row.name == row.name]) for row in table.rows]
    tables.write_csv(workdir / CSV, rows)
    with atomic_write(workdir / MARKDOWN) as part:
        part.write_text(_markdown(table, name, rows, runs), encoding="utf-8")
    return [workdir / MARKDOWN, workdir / CSV]


def _markdown(table: Table, name: str, rows: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> str:
    header = ("row", "runs", "mAP", "rank-1", "mINP", "published mAP / rank-1", "hours", "device", "commit")
    lines = [f"# {table.title}", "", f"`python -m dmosnet_jax.tools.reproduce {name}`", ""]
    lines += [_line(header), _line(["---"] * len(header))]
    for values in rows:
        published = " / ".join(_number(values[f"published_{metric}"]) for metric in ("mAP", "rank1"))
        cells = [
            values["about"],
            f"{values['runs']} of {values['runs_wanted']}",
            *(_spread(values[metric], values[f"{metric}_sd"]) for metric in _METRICS),
            f"{published} ({values['published_by']})" if values["published_by"] else "",
            _number(values["hours"]),
            values["device"],
            values["commit"],
        ]
        lines.append(_line(cells))
    lines += ["", "Scores in percent, ± standard deviation over the seeds; hours of training, a run.", ""]
    lines += [f"- **{note}**" for note in _notes(table, rows, runs)]
    done = [run for run in runs if run.is_done and run.row.scored_on]
    if done:
        lines += ["", _line(("run", "mAP", "rank-1", "mINP")), _line(["---"] * 4)]
        for run in done:
            score = run.results() or {}
            lines.append(_line([run.name, *(_number(100 * score[metric]) for metric in _METRICS)]))
    return "\n".join(lines).rstrip() + "\n"


def _notes(table: Table, rows: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> list[str]:
    """What keeps the scores from being the table's."""
    notes = []
    for row, values in zip(table.rows, rows, strict=True):
        official, found = table.official.get(row.scored_on), (values["queries"], values["gallery"])
        if official and None not in found and found != official:
            notes.append(
                f"{row.name}: {found[0]:,} queries and {found[1]:,} gallery images of {row.scored_on} instead of the "
                f"official {official[0]:,} and {official[1]:,}: not to be compared with published figures"
            )
    changed: dict[str, None] = {}
    for run in runs:
        own = {f: v for f, v in run.overrides.items() if f in run.settings["overrides"] or f in run.scoring}
        if run.is_done and own:
            changed[f"{run.row.name}: with {', '.join(f'{field}={value}' for field, value in own.items())}"] = None
    return notes + list(changed)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _spread(mean: float | None, deviation: float | None) -> str:
    return _number(mean) + (f" ± {deviation:.2f}" if deviation is not None else "")
