"""Pseudo-labels of one epoch: neighbours, Jaccard graph, DBSCAN at three radii, self-paced criterion (SpCL).

Everything is sparse and exact: memory is linear in the number of images. `host_memory` says how much, before.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Float32, Int, Int32

from dmosnet_jax.core import arguments, parallel
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.memory.clustering import criterion, jaccard, neighbours
from dmosnet_jax.memory.clustering.dbscan import dbscan
from dmosnet_jax.memory.clustering.host_memory import check_memory
from dmosnet_jax.memory.clustering.k_distance import check_clusters
from dmosnet_jax.memory.tables import TableRows


@dataclass(frozen=True)
class Clustering:
    """Pseudo-labels and what led to them.

    Attributes:
        labels: classes 0..C-1, every image in one; un-clustered images are classes of their own, the last.
        dbscan: DBSCAN labels at `eps`, noise -1.
        dbscan_tight: at `eps - eps_gap`.
        dbscan_loose: at `eps + eps_gap`.
        r_comp: 1 - IoU of the clusters at `eps` and `eps - eps_gap`.
        r_indep: 1 - IoU of the clusters at `eps` and `eps + eps_gap`.
        indep_threshold: pass it to the next epoch's call.
        seconds: time per stage, of those that ran in this process.
        recall: share of the true nearest images that the search found, measured where it was not exact; else None.
    """

    labels: Int32[np.ndarray, " n"]
    dbscan: Int32[np.ndarray, " n"]
    dbscan_tight: Int32[np.ndarray, " n"]
    dbscan_loose: Int32[np.ndarray, " n"]
    r_comp: Float32[np.ndarray, " n"]
    r_indep: Float32[np.ndarray, " n"]
    indep_threshold: float
    seconds: dict[str, float] = field(default_factory=dict)
    recall: float | None = None

    @property
    def num_clusters(self) -> int:
        """Classes of more than one image."""
        return int((np.bincount(self.labels) > 1).sum())

    @property
    def num_unclustered(self) -> int:
        """Classes of one image."""
        return int((np.bincount(self.labels) == 1).sum())

    @property
    def largest_cluster(self) -> int:
        """Images in the largest class."""
        return int(np.bincount(self.labels).max())


STAGES = ("neighbours", "weights", "jaccard", "dbscan", "criterion")


class _Stages:
    """Times stages and passes their progress on."""

    def __init__(self, report: Callable[[str, float], None] | None):
        self.seconds: dict[str, float] = {}
        self._report = report

    @contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[float], None] | None]:
        start, report = time.perf_counter(), self._report
        if report is not None:
            report(name, 0.0)
        yield None if report is None else lambda fraction: report(name, fraction)
        self.seconds[name] = time.perf_counter() - start
        if report is not None:
            report(name, 1.0)


def _check_settings(k1: int, k2: int, eps: float, eps_gap: float, min_samples: int) -> None:
    for name, value in (("k1", k1), ("k2", k2), ("min_samples", min_samples)):
        arguments.count(f"clustering: {name}", value)
    arguments.number("clustering: eps", eps)
    arguments.number("clustering: eps_gap", eps_gap)
    if not (eps_gap >= 0 and eps - eps_gap > 0 and eps + eps_gap < 1):
        raise ConfigError(
            f"clustering: eps={eps} with eps_gap={eps_gap} gives the radii {eps - eps_gap:g} to {eps + eps_gap:g}; "
            "Jaccard radii must lie between 0 and 1 (SpCL uses eps=0.6, eps_gap=0.02)"
        )


def _check_features(features: np.ndarray | jax.Array | None, *, normalise: bool = True) -> np.ndarray:
    """Features as float32 rows of unit length; bit-identical where all of them are so already.

    Raises:
        DataError: they have no direction, or are not of unit length and not to be `normalise`d.
    """
    rows = arguments.matrix("clustering: features", features)
    # A row's norm is finite exactly when the row is (and its squares fit float32), so one pass checks both.
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if bad.size:
        raise DataError(
            f"clustering: {bad.size} of {rows.shape[0]} feature rows are not finite or all zero, the first is row "
            f"{bad[0]}; the network has diverged or features are missing: lower the learning rate or extract again"
        )
    if (off := np.abs(norms - 1)).max() <= 1e-3:
        return rows
    if not normalise:
        raise DataError(
            f"clustering: row {off.argmax()} of the table has length {norms[off.argmax()]:g}, not 1: "
            "divide rows by their length"
        )
    return rows / norms[:, None]


def _check_nearest(nearest: Any, images: int, k1: int) -> np.ndarray:
    """A table of neighbours that kernels may follow without looking where it leads."""
    table = arguments.numbers("clustering: nearest images", nearest)
    if table.ndim != 2 or table.shape[0] != images or table.shape[1] < k1:
        raise DataError(f"clustering: nearest has shape {table.shape}; expected [{images}, at least {k1}]")
    if table.dtype.kind not in "iu" or table.min() < 0 or table.max() >= images:
        raise DataError(f"clustering: nearest must be whole numbers from 0 to {images - 1}, without gaps")
    return table


def cluster(
    features: Float[np.ndarray | jax.Array, "n d"] | TableRows,
    *,
    k1: int = 30,
    k2: int = 6,
    eps: float = 0.6,
    eps_gap: float = 0.02,
    min_samples: int = 4,
    indep_threshold: float | None = None,
    min_clustered: float = 0.0,
    nearest: Int[np.ndarray, "n k"] | None = None,
    candidates: int = 0,
    mesh: Mesh | None = None,
    threads: int | None = None,
    memory_limit: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Clustering:
    """Pseudo-labels with SpCL's Jaccard distance, DBSCAN at three radii and the self-paced criterion.

    Where there are several processes, all of them call this with the same features. They share the neighbour search;
    the other stages run on process 0, which sends its result: hosts that differ in a last bit train on the same labels.
    Of the rows of a table, which are split over the devices of all processes, process 0 alone makes a copy.

    Args:
        features: rows that are not of unit length are L2-normalised; those of a table must be so.
        k1: nearest images of the k-reciprocal sets, the image itself included; clipped to n.
        k2: nearest images of query expansion; clipped to k1.
        eps: DBSCAN radius, a Jaccard distance.
        eps_gap: how much smaller and larger the other two radii are.
        min_samples: images within the radius, itself included, that make a core point.
        indep_threshold: `Clustering.indep_threshold` of the first epoch; None in the first epoch.
        min_clustered: share of the images that clusters of more than one image must hold, or the radius is refused.
        nearest: the k >= k1 nearest images, best first, itself included, when they are known already.
        candidates: see `neighbours.search`; the recall that this leaves is measured.
        mesh: devices of the neighbour search, by default all of them, or those of the table.
        threads: host threads, default all cores.
        memory_limit: bytes; refuse to start when the estimate is above. Default: the machine's memory.
        progress: called with (stage, finished fraction of the stage), of each stage of `STAGES` with 0 and 1.

    Returns:
        `Clustering`, the same in every process to the last bit but for `seconds`.

    Raises:
        ConfigError: a setting out of range.
        DataError: features that are not finite, zero or not a matrix, or a neighbour table of another shape.
        TooFewClusteredError: not one cluster, or less than `min_clustered` in clusters; on process 0.
        UserError: not enough memory; on processes other than the first, whatever failed on process 0.
    """
    _check_settings(k1, k2, eps, eps_gap, min_samples)
    min_clustered = arguments.number("clustering: min_clustered", min_clustered, low=0, high=1)
    candidates = arguments.count("clustering: candidates", candidates, least=0)
    if indep_threshold is not None:
        indep_threshold = arguments.number("clustering: indep_threshold", indep_threshold)
    if memory_limit is not None:
        memory_limit = arguments.count("clustering: memory_limit", memory_limit, most=2**63)
    stages = _Stages(progress)
    if not isinstance(features, TableRows):
        features = _check_features(features)
    images, dim = features.shape
    k1 = min(k1, images)
    parallel.agree(lambda: check_memory(images, dim, k1=k1, threads=threads, limit=memory_limit))
    whole = features.on_first if isinstance(features, TableRows) else features
    if isinstance(features, TableRows):
        parallel.agree(lambda: _check_features(whole, normalise=False))
    if nearest is not None:
        nearest = _check_nearest(nearest, images, k1)
    with stages("neighbours") as report:
        if nearest is None:
            search: dict[str, Any] = {"mesh": mesh, "candidates": candidates, "threads": threads, "progress": report}
            nearest = neighbours.search(features, k1, **search).indices
    options: dict[str, Any] = {"k1": k1, "k2": k2, "radii": (eps, eps - eps_gap, eps + eps_gap)}
    options |= {"min_samples": min_samples, "min_clustered": min_clustered}
    options |= {"indep_threshold": indep_threshold, "threads": threads}
    tables = parallel.agree(lambda: _label(whole, nearest, stages, measure=bool(candidates), **options))
    return _from_first(tables, images, stages.seconds)


def _label(
    features: np.ndarray | None,
    nearest: np.ndarray,
    stages: _Stages,
    *,
    k1: int,
    k2: int,
    radii: tuple[float, float, float],
    min_samples: int,
    indep_threshold: float | None,
    min_clustered: float,
    threads: int | None,
    measure: bool,
) -> tuple[np.ndarray, ...]:
    """Everything after the neighbours: arrays and figures of a `Clustering` in its order, last the recall or NaN."""
    assert features is not None
    with stages("weights") as report:
        order = jaccard.visiting_order(nearest, threads=threads)
        weights = jaccard.reciprocal_weights(
            features, nearest, k1=k1, k2=k2, order=order, threads=threads, progress=report
        )
    with stages("jaccard") as report:
        graph = jaccard.distance_graph(weights, max(radii), order=order, threads=threads, progress=report)
    with stages("dbscan") as report:
        found = []
        for done, radius in enumerate(radii, 1):
            found.append(dbscan(graph, radius, min_samples))
            if report is not None:
                report(done / len(radii))
        middle, tight, loose = found
    check_clusters(middle, weights, radii[0], min_samples, min_clustered)
    with stages("criterion"):
        chosen = criterion.select(middle, tight, loose, threshold=indep_threshold)
    recall = neighbours.recall(features, nearest) if measure else np.nan
    # Between processes a float64 would become a float32.
    figures = np.array([chosen.threshold, recall]).view(np.uint32)
    return chosen.labels, middle, tight, loose, chosen.r_comp, chosen.r_indep, figures


def _from_first(tables: tuple[np.ndarray, ...] | None, images: int, seconds: dict[str, float]) -> Clustering:
    """The clustering of process 0, the only one that has `tables`, in every process."""
    if tables is None:
        numbers, scores = np.zeros(images, np.int32), np.zeros(images, np.float32)
        tables = (numbers, numbers, numbers, numbers, scores, scores, np.zeros(4, np.uint32))
    labels, middle, tight, loose, r_comp, r_indep, figures = parallel.from_first(tables)
    threshold, recall = figures.view(np.float64).tolist()
    return Clustering(
        labels=labels,
        dbscan=middle,
        dbscan_tight=tight,
        dbscan_loose=loose,
        r_comp=r_comp,
        r_indep=r_indep,
        indep_threshold=threshold,
        seconds=seconds,
        recall=None if np.isnan(recall) else recall,
    )
