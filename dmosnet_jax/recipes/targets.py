"""Scores of one network on one or several data sets, side by side."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dmosnet_jax.core.config import joined
from dmosnet_jax.evaluation.extract import Extractor
from dmosnet_jax.models import Model
from dmosnet_jax.recipes import scoring
from dmosnet_jax.recipes.scoring import METRICS, RESULTS, Scorer, Scores
from dmosnet_jax.train.metrics import write_json


class Targets:
    """Data sets to be scored on; their data are read once, for any number of evaluations."""

    def __init__(
        self, config: Any, model: Model, mesh: Mesh, names: Sequence[str], *, extractor: Extractor | None = None
    ):
        """Opens query and gallery of each.

        Raises:
            DataError: a data set is not there.
        """
        extractor = extractor or scoring.make_extractor(config, model, mesh)
        self._scorers = {
            name: Scorer(
                config, model, mesh, extractor=extractor, dataset=name, label=f"{name} " if len(names) > 1 else ""
            )
            for name in names
        }

    def keep_images(self) -> None:
        """See `Scorer.keep_images`."""
        for scorer in self._scorers.values():
            scorer.keep_images()

    def __call__(self, params: Any, stats: Any) -> dict[str, Scores]:
        """Scores of one set of weights, by data set."""
        return {name: scorer(params, stats) for name, scorer in self._scorers.items()}


def metrics(scores: Mapping[str, Scores]) -> dict[str, float]:
    """The values that a log keeps: `mAP`, `rank1`, ...; of several data sets their means, and `<name>/mAP`, ... too."""
    each = {name: found.metrics() for name, found in scores.items()}
    values = {metric: float(np.mean([found[metric] for found in each.values()])) for metric in METRICS}
    if len(each) > 1:
        values |= {f"{name}/{metric}": value for name, found in each.items() for metric, value in found.items()}
    return values


def summary(scores: Mapping[str, Scores]) -> str:
    """The most telling values in one line."""
    found = metrics(scores)
    text = f"mAP {100 * found['mAP']:.2f}  rank-1 {100 * found['rank1']:.2f}"
    if len(scores) == 1:
        return text
    each = (f"{name} {100 * found[f'{name}/mAP']:.2f} / {100 * found[f'{name}/rank1']:.2f}" for name in scores)
    return f"{text}  ({', '.join(each)})"


def publish(
    scores: Mapping[str, Scores], workdir: pathlib.Path, config: Any, *, model: str, extra: dict[str, Any]
) -> dict[str, Any]:
    """Prints the scores and writes `results.json` and `report.html`.

    Of several data sets each gets them in a folder of its name, and the workdir a `results.json` with `datasets` (the
    contents of each one's) and `mean`; then a table is printed.

    Args:
        scores: by data set.
        workdir: where to write.
        config: the run's config.
        model: name of the network.
        extra: further values for `results.json`.

    Returns:
        The contents of the workdir's `results.json`.
    """
    if len(scores) == 1:
        [(name, found)] = scores.items()
        title = f"{model} on {name}"
        return scoring.publish(found, workdir, config, title=title, extra={**extra, "model": model, "dataset": name})
    each = {}
    for name, found in scores.items():
        if jax.process_index() == 0:
            (workdir / name).mkdir(parents=True, exist_ok=True)
            print(f"{name}: ", end="")
        own = {**extra, "model": model, "dataset": name}
        title = f"{model} on {name}"
        each[name] = scoring.publish(found, workdir / name, config, title=title, extra=own, run=workdir)
    mean = {key: float(np.mean([each[name][key] for name in each])) for key in _averaged(each)}
    results = {"datasets": each, "mean": mean, **extra, "model": model, "dataset": joined(list(scores))}
    if jax.process_index() == 0:
        write_json(workdir / RESULTS, results)
        print(f"\n{table(each, mean)}\n\nwritten: {workdir / RESULTS}")
    return results


def _averaged(each: Mapping[str, Mapping[str, Any]]) -> list[str]:
    keys = (*METRICS, *(f"reranked_{name}" for name in METRICS))
    return [key for key in keys if all(key in found for found in each.values())]


def table(each: Mapping[str, Mapping[str, Any]], mean: Mapping[str, float]) -> str:
    """Lines of a table in percent: a row for each data set, and their mean."""
    columns = [("mAP", "mAP"), ("rank-1", "rank1"), ("rank-5", "rank5"), ("rank-10", "rank10"), ("mINP", "mINP")]
    if "reranked_mAP" in mean:
        columns += [("mAP re-ranked", "reranked_mAP"), ("rank-1 re-ranked", "reranked_rank1")]
    width = max(len(name) for name in (*each, "mean"))
    head = "".join(f"{title:>{max(8, len(title) + 2)}}" for title, _ in columns)
    lines = [f"{'':{width}}{head}{'queries':>10}{'gallery':>10}"]
    for name, found in (*each.items(), ("mean", mean)):
        cells = "".join(f"{100 * found[key]:{max(8, len(title) + 2)}.2f}" for title, key in columns)
        counts = f"{found['num_valid_query']:>10,}{found['num_gallery']:>10,}" if "num_query" in found else ""
        lines.append(f"{name:{width}}{cells}{counts}")
    return "\n".join(lines)
