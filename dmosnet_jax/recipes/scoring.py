"""Scores of a network on a data set's query and gallery, and the files that show them."""

import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dmosnet_jax.data.loading import ImageCache
from dmosnet_jax.data.splits import Rows, Split, load_split
from dmosnet_jax.evaluation import ranking, report
from dmosnet_jax.evaluation.extract import Extractor
from dmosnet_jax.evaluation.report_charts import charts_from_metrics
from dmosnet_jax.evaluation.rerank import rerank
from dmosnet_jax.models import Model
from dmosnet_jax.train.metrics import read_rows, write_json

RESULTS = "results.json"
METRICS = ("mAP", "rank1", "rank5", "rank10", "mINP")
REPORT = "report.html"


class Scorer:
    """Extracts and ranks query and gallery; reads the data once, for any number of evaluations."""

    def __init__(
        self,
        config: Any,
        model: Model,
        mesh: Mesh,
        *,
        extractor: Extractor | None = None,
        dataset: str | None = None,
        label: str = "",
    ):
        """Opens a data set's query and gallery.

        Args:
            config: the run's config.
            model: the network.
            mesh: the devices.
            extractor: None: one with the config's sizes.
            dataset: None: the config's.
            label: what the progress bars' names begin with.

        Raises:
            DataError: the data set is not there.
        """
        self._config, self._label = config, label
        self.query = load_split(config.data_dir, dataset or config.dataset, "query")
        self.gallery = load_split(config.data_dir, dataset or config.dataset, "gallery")
        self._extract = extractor or make_extractor(config, model, mesh)
        self._caches: dict[str, ImageCache | None] = {}

    def keep_images(self) -> None:
        """Keeps decoded images in host memory, for repeated evaluations of small sets."""
        for split in (self.query, self.gallery):
            self._caches[split.split] = image_cache(self._config, split)

    def __call__(self, params: Any, stats: Any) -> "Scores":
        """Features and ranking of one set of weights."""
        features = [
            self._extract(params, stats, split, label=self._label + split.split, cache=self._caches.get(split.split))
            for split in (self.query, self.gallery)
        ]
        ranked = ranking.evaluate(*features, *self._labels())
        return Scores(self, features[0], features[1], ranked)

    def _labels(self) -> tuple[np.ndarray, ...]:
        return self.query.pids, self.gallery.pids, self.query.camids, self.gallery.camids

    def rank_again(self, scores: "Scores") -> ranking.Ranking:
        """The ranking after k-reciprocal re-ranking (Zhong et al. 2017)."""
        reranked = rerank(scores.query_features, scores.gallery_features)
        return ranking.evaluate(None, None, *self._labels(), distance=reranked)

    def rank_lists(self, scores: "Scores", count: int) -> list[report.RankList]:
        """Rank-10 lists of queries spread evenly over the valid ones."""
        valid = np.flatnonzero(scores.ranking.first_match > 0)
        if not count or not valid.size:
            return []
        chosen = valid[np.linspace(0, valid.size - 1, min(count, valid.size)).round().astype(int)]
        lists = ranking.ranking_lists(
            scores.query_features, scores.gallery_features, *self._labels(), queries=chosen, top=10
        )
        return [
            report.RankList(
                self.query.record(int(query)).image,
                _caption(self.query, int(query)),
                [
                    report.RankItem(self.gallery.record(int(row)).image, _caption(self.gallery, int(row)), bool(match))
                    for row, match in zip(rows, matches, strict=True)
                    if row >= 0
                ],
            )
            for query, rows, matches in zip(lists.queries, lists.indices, lists.match, strict=True)
        ]


class Scores:
    """Outcome of one evaluation: features, ranking, and the values that a log keeps."""

    def __init__(self, scorer: Scorer, query: np.ndarray, gallery: np.ndarray, ranked: ranking.Ranking):
        self.scorer, self.query_features, self.gallery_features, self.ranking = scorer, query, gallery, ranked

    def metrics(self) -> dict[str, float]:
        """mAP, rank1, rank5, rank10 and mINP as fractions."""
        return {name: float(self.ranking[name]) for name in METRICS}


def make_extractor(config: Any, model: Model, mesh: Mesh) -> Extractor:
    """An extractor with the config's sizes."""
    return Extractor(
        model,
        mesh,
        batch_size=config.eval.batch_size,
        threads=config.data.threads,
        workers=config.data.workers,
        interpolation=config.data.interpolation,
        mean=config.pixel_mean,
        std=config.pixel_std,
    )


def image_cache(config: Any, split: Rows) -> ImageCache | None:
    """A cache of decoded images where the config's budget holds the whole split."""
    if config.data.workers or not config.data.cache_mib:
        return None
    return ImageCache.within(split, tuple(config.image_size), config.data.cache_mib * 2**20)


def _caption(split: Split, row: int) -> str:
    return f"id {split.pids[row]}, camera {split.camids[row]}"


def summary(results: dict[str, Any]) -> str:
    """One line with the usual figures in percent."""
    parts = [f"{name} {100 * results[key]:.2f}" for name, key in _SUMMARY]
    counts = f"{results['num_valid_query']} of {results['num_query']} queries, {results['num_gallery']} gallery images"
    return f"{'  '.join(parts)}  ({counts})"


_SUMMARY = (("mAP", "mAP"), ("rank-1", "rank1"), ("rank-5", "rank5"), ("rank-10", "rank10"), ("mINP", "mINP"))


def publish(
    scores: Scores,
    workdir: pathlib.Path,
    config: Any,
    *,
    title: str,
    extra: dict[str, Any],
    run: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Prints the scores and writes `results.json` and `report.html` into the workdir.

    Args:
        scores: the evaluation.
        workdir: where to write.
        config: the run's config.
        title: of the report.
        extra: further values for `results.json`.
        run: the folder whose metrics the report shows; None: the workdir.

    Returns:
        The contents of `results.json`.
    """
    results = {**scores.ranking.results(), "interpolation": config.data.interpolation, **extra}
    if config.eval.rerank:
        again = scores.scorer.rank_again(scores)
        results |= {f"reranked_{name}": float(again[name]) for name in METRICS}
    if jax.process_index() != 0:
        return results
    write_json(workdir / RESULTS, results)
    print(summary(results))
    if config.eval.rerank:
        print(f"re-ranked: mAP {100 * results['reranked_mAP']:.2f}  rank-1 {100 * results['reranked_rank1']:.2f}")
    if config.eval.report:
        report.write_report(
            workdir / REPORT,
            title=title,
            results=results,
            cmc=scores.ranking.cmc,
            curves=charts_from_metrics(read_rows((run or workdir) / "metrics.jsonl")),
            rank_lists=scores.scorer.rank_lists(scores, config.eval.rank_lists),
            config=config.to_dict(),
        )
    print(f"written: {workdir / RESULTS}" + (f", {workdir / REPORT}" if config.eval.report else ""))
    return results
