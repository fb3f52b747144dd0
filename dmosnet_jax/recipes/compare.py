"""Several checkpoints beside each other in one table: scores on data sets, parameters, operations and latency."""

import functools
import os
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dmosnet_jax.core import tables
from dmosnet_jax.core.config import checkpoint_paths, dataset_names
from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.files import make_folder
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.core.progress import announced
from dmosnet_jax.data import augment
from dmosnet_jax.evaluation import report
from dmosnet_jax.export import onnx_runtime
from dmosnet_jax.models import counting
from dmosnet_jax.recipes import paper, scoring
from dmosnet_jax.recipes.network import Network, open_network

TABLE, PAGE = "compare.csv", "compare.html"
_METRICS = {"mAP": "mAP", "rank1": "rank-1", "mINP": "mINP"}


def run(config: Any, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Runs the recipe; returns the rows of the table.

    Raises:
        ConfigError: no checkpoints given, or one twice, or the workdir is where they are.
        DataError: data or a checkpoint missing, damaged, or of another model.
    """
    paths, names = checkpoint_paths(config.checkpoints), dataset_names(config.dataset)
    # All of them first: what is wrong with the last must not wait for the scores of the others.
    networks = dict(zip(short_names(paths), [open_network(config, path) for path in paths], strict=True))
    scorers = {
        label: scoring.Scorer(network.config, network.model, make_mesh(), names) for label, network in networks.items()
    }
    _check_places(workdir, dict(zip(networks, paths, strict=True)))
    make_folder(workdir)
    rows: list[dict[str, Any]] = []
    curves: dict[str, dict[str, Sequence[float]]] = {name: {} for name in names}
    for label, network in networks.items():
        print(f"\n{label}: {network.model.name}")
        scores = scorers[label](network.params, network.stats)
        scoring.publish(
            scores,
            workdir / label,
            network.config,
            model=network.model,
            weights=(network.params, network.stats),
            extra=network.origin,
        )
        rows += _rows(label, network, scores, config.latency)
        for name, found in scores.items():
            curves[name][label] = found.ranking.cmc.tolist()
    rows = _without_empty(rows)
    if jax.process_index() == 0:
        _write(workdir, rows, curves, config)
    return rows


def _check_places(workdir: pathlib.Path, paths: dict[str, str]) -> None:
    """Raises ConfigError where a checkpoint's results would be written into one of the checkpoints."""
    for label in paths:
        place = (workdir / label).resolve()
        for path in paths.values():
            if place == pathlib.Path(path).resolve() or pathlib.Path(path).resolve() in place.parents:
                raise ConfigError(
                    f"--workdir={workdir}: the results of {label} would be written into the checkpoint {path}: give a "
                    "folder of its own"
                )


def short_names(paths: Sequence[str]) -> list[str]:
    """The paths without the folders that all of them share; of a single one, its last part."""
    whole = [os.path.abspath(path) for path in paths]
    # Of their folders: a path that all others are in would have no name left.
    shared = os.path.commonpath([os.path.dirname(path) for path in whole])
    return [os.path.relpath(path, shared) for path in whole]


def _rows(label: str, network: Network, scores: dict[str, scoring.Scores], latency: Any) -> list[dict[str, Any]]:
    """Of each data set, and their mean where there are several."""
    found = scoring.metrics(scores)
    each = {name: {metric: float(own.ranking[metric]) for metric in _METRICS} for name, own in scores.items()}
    if len(each) > 1:
        each["mean"] = {metric: found[metric] for metric in _METRICS}
    height, width = network.model.image_size
    costs = {
        "size": f"{height}x{width}",
        "parameters": counting.parameters(network.model),
        "multiply-adds": counting.operations(network.model).total,
        "ms an image": milliseconds(network, batch_size=latency.batch_size, repeats=latency.repeats),
    }
    return [
        {
            "checkpoint": label,
            "network": network.model.name,
            "data set": name,
            **{title: 100 * values[metric] for metric, title in _METRICS.items()},
            **paper.columns(network.model, name),
            **costs,
        }
        for name, values in each.items()
    ]


def milliseconds(network: Network, *, batch_size: int, repeats: int) -> float:
    """The median time of a batch on the first device, from its pixels there to the features, per image."""
    model, config = network.model, network.config

    @jax.jit
    def forward(params, stats, images):
        pixels = augment.normalise(images, config.pixel_mean, config.pixel_std)
        return model.apply(params, stats, pixels, train=False)[0]["feature"]

    images = np.zeros((batch_size, *model.image_size, 3), np.uint8)
    if config.eval.runtime == onnx_runtime.JAX:
        arguments = jax.device_put((network.params, network.stats, images), jax.local_devices()[0])
        features = functools.partial(announced(forward, "the forward pass of one device"), *arguments)
    else:
        inputs: Any = {"mean": config.pixel_mean, "std": config.pixel_std}
        compiled = onnx_runtime.compile_features(model, network.params, network.stats, **inputs)
        features = functools.partial(compiled, images)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(features())
        seconds.append(time.perf_counter() - start)
    # The first call compiles.
    return 1000 * statistics.median(seconds[1:]) / batch_size


def _without_empty(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without those of the paper's columns in which it has nothing for any of them."""
    empty = {name for name in paper.NAMES if all(row[name] is None for row in rows)}
    return [{name: value for name, value in row.items() if name not in empty} for row in rows]


def _write(
    workdir: pathlib.Path, rows: list[dict[str, Any]], curves: dict[str, dict[str, Sequence[float]]], config: Any
) -> None:
    device = jax.local_devices()[0].device_kind
    latency = f"latency: median of {config.latency.repeats} batches of {config.latency.batch_size} on {device}"
    latency += "" if config.eval.runtime == onnx_runtime.JAX else f" by {config.eval.runtime}"
    notes = [latency]
    if any(name in rows[0] for name in paper.NAMES):
        notes.append(f"{paper.NAMES[0]}, ...: {paper.CONDITIONS}")
    print("", tables.as_text(rows), *notes, sep="\n")
    tables.write_csv(workdir / TABLE, rows)
    report.write_report(
        workdir / PAGE,
        title="Comparison",
        subtitle="; ".join(["scores in percent", *notes]),
        results={},
        table=[{name: tables.cell(value) for name, value in row.items()} for row in rows],
        curves=[report.cmc_chart(lines, of=name) for name, lines in curves.items()],
        command=scoring.command(),
        config=config.to_dict(),
    )
    print(f"written: {workdir / TABLE}, {workdir / PAGE}")
