"""Scores of a network on the query and gallery of one or several data sets, and the files that show them."""

import contextlib
import dataclasses
import functools
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dmosnet_jax.core.config import dataset_names, joined
from dmosnet_jax.data.loading import ImageCache
from dmosnet_jax.data.records import GALLERY, QUERY
from dmosnet_jax.data.splits import Rows, Split, load_split
from dmosnet_jax.evaluation import distances, projector, ranking, report, report_parts, thresholds
from dmosnet_jax.evaluation.activation import maps_of
from dmosnet_jax.evaluation.extract import Extractor
from dmosnet_jax.evaluation.report_charts import charts_from_metrics, cluster_charts
from dmosnet_jax.evaluation.rerank import rerank
from dmosnet_jax.export import onnx_runtime
from dmosnet_jax.models import Model, counting
from dmosnet_jax.recipes import query_features
from dmosnet_jax.train.metrics import METRICS_FILE, progress_bar, read_rows, write_json

RESULTS, REPORT = "results.json", "report.html"
METRICS = ("mAP", "rank1", "rank5", "rank10", "mINP")
# Seconds after which a stage that seldom takes long shows its progress.
_DELAY = 5.0
_TITLES = {"mAP": "mAP", "rank1": "rank-1", "rank5": "rank-5", "rank10": "rank-10", "mINP": "mINP"}


@dataclasses.dataclass(frozen=True)
class Scores:
    """Features and ranking of one set of weights on one data set.

    `choices` says what the query features are, `rate` how many images a second were read and extracted.
    """

    query: Split
    gallery: Split
    query_features: np.ndarray
    gallery_features: np.ndarray
    ranking: ranking.Ranking
    choices: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rate: float | None = None

    @property
    def labels(self) -> tuple[np.ndarray, ...]:
        """Identities of query and gallery, and their cameras."""
        return self.query.pids, self.gallery.pids, self.query.camids, self.gallery.camids

    @functools.cached_property
    def thresholds(self) -> thresholds.Thresholds | None:
        """Error rates of accepting pairs, None where there are no pairs of both kinds."""
        with _counted(self.query_features, self.gallery_features, label="pairs", passes=2) as distance:
            return thresholds.evaluate(None, None, *self.labels, distance=distance)


class Scorer:
    """Extracts and ranks the query and gallery of data sets; the data are opened once, for any number of scorings."""

    def __init__(
        self,
        config: Any,
        model: Model,
        mesh: Mesh,
        names: Sequence[str],
        *,
        extractor: Extractor | None = None,
        keep_images: bool = False,
    ):
        """Opens the data sets.

        Args:
            config: the run's config.
            model: the network.
            mesh: the devices.
            names: of the data sets.
            extractor: None: one with the config's sizes; not used where mirror images are asked for.
            keep_images: keep decoded images in host memory, where they fit.

        Raises:
            ConfigError: choices at test time that do not fit a data set.
            DataError: a data set is not there, or has not the images that the choices need.
        """
        if extractor is None or config.eval.flip:
            extractor = make_extractor(config, model, mesh, flip=config.eval.flip)
        self._extract = extractor
        self._splits = {
            name: [load_split(config.data_dir, name, split) for split in (QUERY, GALLERY)] for name in names
        }
        self._queries = {name: query_features.QueryFeatures(config, *splits) for name, splits in self._splits.items()}
        for name, chosen in self._queries.items():
            self._splits[name] += chosen.more
        self._caches = {
            name: [image_cache(config, split) if keep_images else None for split in splits]
            for name, splits in self._splits.items()
        }

    def __call__(self, params: Any, stats: Any) -> dict[str, Scores]:
        """Scores of one set of weights, by data set."""
        return {name: self._score(name, params, stats) for name in self._splits}

    def _score(self, name: str, params: Any, stats: Any) -> Scores:
        query, gallery, *_ = self._splits[name]
        prefix = f"{name} " if len(self._splits) > 1 else ""
        features, rate = [], None
        for split, cache in zip(self._splits[name], self._caches[name], strict=True):
            since = time.perf_counter()
            features.append(self._extract(params, stats, split, label=prefix + split.split, cache=cache))
            # Of the last: the first may have waited for the compiler.
            rate = len(split) / (time.perf_counter() - since)
        first, second, *more = features
        first = self._queries[name](first, second, *more)
        with _counted(first, second, label=f"{prefix}ranking") as distance:
            labels = query.pids, gallery.pids, query.camids, gallery.camids
            ranked = ranking.evaluate(None, None, *labels, distance=distance)
        return Scores(query, gallery, first, second, ranked, self._queries[name].choices, rate)


@contextlib.contextmanager
def _counted(
    query_features: np.ndarray,
    gallery_features: np.ndarray,
    *,
    label: str,
    source: distances.DistanceSource | None = None,
    passes: int = 1,
) -> Iterator[distances.DistanceSource]:
    """Distances of blocks of queries, those of the source or else by cosine, with a bar over so many passes."""
    of_queries = source or distances.source(query_features, gallery_features, "cosine", None)
    with progress_bar(passes * len(query_features), label=label, unit="queries", delay=_DELAY) as bar:

        def distance(start: int, stop: int) -> np.ndarray:
            part = of_queries(start, stop)
            bar.update(stop - start)
            return part

        yield distance


def make_extractor(config: Any, model: Model, mesh: Mesh, *, flip: bool = False) -> Extractor:
    """An extractor with the config's sizes; with `flip` of mirror images too.

    Raises:
        ConfigError: `eval.runtime` is not installed, or does not fit.
    """
    options: dict[str, Any] = {
        "batch_size": config.eval.batch_size,
        "threads": config.data.threads,
        "workers": config.data.workers,
        "interpolation": config.data.interpolation,
        "flip": flip,
        "mean": config.pixel_mean,
        "std": config.pixel_std,
    }
    onnx_runtime.check(config.eval.runtime, config.model.dtype, field="eval.runtime")
    if config.eval.runtime == onnx_runtime.JAX:
        return Extractor(model, mesh, **options)
    return onnx_runtime.Extractor(model, **options)


def image_cache(config: Any, split: Rows) -> ImageCache | None:
    """A cache of decoded images where the config's budget holds the whole split."""
    if config.data.workers or not config.data.cache_mib:
        return None
    return ImageCache.within(split, tuple(config.image_size), config.data.cache_mib * 2**20)


def metrics(scores: Mapping[str, Scores]) -> dict[str, float]:
    """The values that a log keeps: `mAP`, `rank1`, ...; of several data sets their means, and `<name>/mAP`, ... too."""
    each = {name: {metric: float(found.ranking[metric]) for metric in METRICS} for name, found in scores.items()}
    values = {metric: float(np.mean([found[metric] for found in each.values()])) for metric in METRICS}
    if len(each) > 1:
        values |= {f"{name}/{metric}": value for name, found in each.items() for metric, value in found.items()}
    return values


def summary(scores: Mapping[str, Scores]) -> str:
    """One line with mAP and rank-1, and those of each data set where there are several."""
    found = metrics(scores)
    text = f"mAP {100 * found['mAP']:.2f}  rank-1 {100 * found['rank1']:.2f}"
    choices = next(iter(scores.values())).choices
    text += f"  [{query_features.describe(choices)}]" if choices else ""
    if len(scores) == 1:
        return text
    each = (f"{name} {100 * found[f'{name}/mAP']:.2f} / {100 * found[f'{name}/rank1']:.2f}" for name in scores)
    return f"{text}  ({', '.join(each)})"


def describe(results: Mapping[str, Any]) -> str:
    """One line with the usual figures of a data set in percent, and the numbers of images."""
    parts = [f"{title} {100 * results[metric]:.2f}" for metric, title in _TITLES.items()]
    counts = f"{results['num_valid_query']} of {results['num_query']} queries, {results['num_gallery']} gallery images"
    chosen = query_features.describe(results.get("test_time", {}))
    return f"{'  '.join(parts)}  ({counts})" + (f"  [{chosen}]" if chosen else "")


def describe_thresholds(found: Mapping[str, Any]) -> str:
    """One line with the error rates of accepting pairs."""
    rates = (
        f"{100 * row['tar']:.2f} at {100 * row['far']:g} % false ones (similarity {row['threshold']:.3f})"
        for row in found["tar_at_far"]
    )
    return f"equal error rate {100 * found['eer']:.2f}; true accepts {', '.join(rates)}"


def publish(
    scores: Mapping[str, Scores],
    workdir: pathlib.Path,
    config: Any,
    *,
    model: Model,
    weights: tuple[Any, Any],
    extra: dict[str, Any],
    clusters: Callable[[], report.Clusters | None] = lambda: None,
) -> dict[str, Any]:
    """Prints the scores and writes `results.json`, `report.html` and, where asked for, the projector's files.

    Of several data sets each gets them in a folder of its name, and the workdir a `results.json` with `datasets` (the
    contents of each one's) and `mean`; then a table is printed. The clusters of a run that scores several are in a
    report in the workdir.

    Args:
        scores: by data set.
        workdir: where to write; the reports draw its metrics, or those of the run that `extra["checkpoint"]` is of.
        config: the run's config.
        model: the network.
        weights: its parameters and batch statistics.
        extra: further values for `results.json`.
        clusters: what the report says of clusters, called on process 0.

    Returns:
        The contents of the workdir's `results.json`.
    """
    several, first_process = len(scores) > 1, jax.process_index() == 0
    each: dict[str, dict[str, Any]] = {}
    page = functools.partial(_write_report, config=config, run=workdir, model=model)
    for name, found in scores.items():
        results = _results(found, config) | extra | {"model": model.name, "dataset": name}
        each[name] = results
        if first_process:
            folder = workdir / name if several else workdir
            folder.mkdir(parents=True, exist_ok=True)
            print(f"{name}: " if several else "", end="")
            own = {} if several else {"clusters": clusters}
            _write(found, results, folder, config, functools.partial(page, scores=found, weights=weights, **own))
    if config.eval.projector and first_process:
        embeddings = {
            name: projector.Embeddings(found.query, found.gallery, found.query_features, found.gallery_features)
            for name, found in scores.items()
        }
        print(f"written: {projector.write(workdir, embeddings)}, for tensorboard --logdir={shlex.quote(str(workdir))}")
    if not several:
        return each[next(iter(scores))]
    mean = {
        metric: float(np.mean([found[metric] for found in each.values()]))
        for metric in (*METRICS, *(f"reranked_{metric}" for metric in METRICS))
        if all(metric in found for found in each.values())
    }
    results = {"datasets": each, "mean": mean, **extra, "model": model.name, "dataset": joined(list(scores))}
    if first_process:
        write_json(workdir / RESULTS, results)
        print(f"\n{table(each, mean)}\n\nwritten: {workdir / RESULTS}")
        shown = clusters() if config.eval.report else None
        if shown is not None:
            page(workdir / REPORT, {"model": model.name, "dataset": results["dataset"]}, clusters=lambda: shown)
            print(f"written: {workdir / REPORT}")
    return results


def _results(scores: Scores, config: Any) -> dict[str, Any]:
    results = {**scores.ranking.results(), "interpolation": config.data.interpolation}
    results["cmc"] = scores.ranking.cmc.tolist()
    results["thresholds"] = scores.thresholds.results() if scores.thresholds else None
    if config.eval.rerank:
        features = scores.query_features, scores.gallery_features
        count = sum(map(len, features))
        with progress_bar(count, label="re-ranking: neighbours", delay=_DELAY) as bar:
            reranked = rerank(*features, progress=lambda fraction: bar.update(int(fraction * count) - bar.n))
        with _counted(*features, label="re-ranking: distances", source=reranked) as distance:
            again = ranking.evaluate(None, None, *scores.labels, distance=distance)
        results |= {f"reranked_{name}": float(again[name]) for name in METRICS}
    results["test_time"] = dict(scores.choices)
    return results


def _write(
    scores: Scores, results: dict[str, Any], folder: pathlib.Path, config: Any, write_report: Callable[..., None]
) -> None:
    """Prints the results of one data set and writes its files."""
    write_json(folder / RESULTS, results)
    print(describe(results))
    if results["thresholds"] is not None:
        print(describe_thresholds(results["thresholds"]))
    if config.eval.rerank:
        print(f"re-ranked: mAP {100 * results['reranked_mAP']:.2f}  rank-1 {100 * results['reranked_rank1']:.2f}")
    if config.eval.report:
        write_report(folder / REPORT, results)
    print(f"written: {folder / RESULTS}" + (f", {folder / REPORT}" if config.eval.report else ""))


def publish_run(
    workdir: pathlib.Path, config: Any, *, model: Model, clusters: Callable[[], report.Clusters | None]
) -> None:
    """Writes the `report.html` of a run that is not scored, on process 0.

    Args:
        workdir: of the run.
        config: of the run.
        model: the network.
        clusters: what it says of clusters, called on process 0.
    """
    if config.eval.report and jax.process_index() == 0:
        results = {"model": model.name, "dataset": joined(dataset_names(config.dataset))}
        _write_report(workdir / REPORT, results, config=config, run=workdir, model=model, clusters=clusters)
        print(f"written: {workdir / REPORT}")


def _write_report(
    path: pathlib.Path,
    results: dict[str, Any],
    *,
    config: Any,
    run: pathlib.Path,
    model: Model,
    clusters: Callable[[], report.Clusters | None] = lambda: None,
    scores: Scores | None = None,
    weights: tuple[Any, Any] = (None, None),
) -> None:
    """A report with the curves of `run`, and where there are scores with all that is shown of them."""
    found, rows = scores.thresholds if scores else None, _training_rows(run, results.get("checkpoint"))
    operations = counting.operations(model)
    report.write_report(
        path,
        title=f"{results['model']} on {results['dataset']}",
        results=results,
        curves=[
            *([report.similarity_chart(found), report.roc_chart(found)] if found else []),
            *charts_from_metrics(rows),
            *cluster_charts(rows),
        ],
        clusters=clusters(),
        **(_of_ranking(scores, config, model, weights) if scores else {}),
        network={
            "parameters, without classifier and BNNeck": f"{counting.parameters(model):,}",
            "multiply-adds of convolutions and linear maps": f"{operations.weighted:,}",
            "multiply-adds of attention products": f"{operations.attention:,}",
            "image, height and width": f"{model.image_size[0]} x {model.image_size[1]}",
            **({} if scores is None or scores.rate is None else {"features, with reading": _rate(scores.rate)}),
        },
        command=command(),
        config=config.to_dict(),
    )


def _rate(images: float) -> str:
    """The rate, the time of an image, and on what."""
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return f"{images:,.0f} images a second, {1000 / images:.2g} ms an image, on {devices}"


def _of_ranking(scores: Scores, config: Any, model: Model, weights: tuple[Any, Any]) -> dict[str, Any]:
    features = scores.query_features, scores.gallery_features
    inputs = {"interpolation": config.data.interpolation, "mean": config.pixel_mean, "std": config.pixel_std}
    maps = functools.partial(maps_of, model, weights, **inputs)
    return {
        "cmc": scores.ranking.cmc,
        "rank_lists": report_parts.rank_lists(
            scores.query, scores.gallery, *features, scores.ranking, count=config.eval.rank_lists, maps=maps
        ),
        "pairs": report_parts.camera_table(*features, *scores.labels),
        "embedding": report_parts.embedding_map(scores.query, scores.gallery, *features),
    }


def _training_rows(run: pathlib.Path, checkpoint: str | None) -> list[dict[str, Any]]:
    """The metrics of the run itself, or else of the run that the checkpoint is of; empty where there are none."""
    of_checkpoint = pathlib.Path(checkpoint) if checkpoint else run
    # A workdir, its folder of checkpoints, or one of these.
    folders = (run, of_checkpoint, *of_checkpoint.absolute().parents[:2])
    return next(filter(None, (read_rows(folder / METRICS_FILE) for folder in folders)), [])


def command() -> str:
    """The command line of this process, "" where it is not this package's."""
    program = pathlib.Path(sys.argv[0])
    if program.name == "dmosnet" or program.parts[-2:] == ("dmosnet_jax", "main.py"):
        return shlex.join(["python", "-m", "dmosnet_jax.main", *sys.argv[1:]])
    return ""


def table(each: Mapping[str, Mapping[str, Any]], mean: Mapping[str, float]) -> str:
    """Lines of a table in percent: a row for each data set, and their mean."""
    columns = [(title, metric) for metric, title in _TITLES.items()]
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
