"""Pseudo-labels of one epoch: neighbours, Jaccard graph, DBSCAN at three radii, self-paced criterion (SpCL).

Everything is sparse and exact: memory is linear in the number of images. `estimate_memory` says how much, before.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np

from dmosnet_jax.core.errors import ConfigError, DataError, UserError
from dmosnet_jax.memory import jaccard, neighbours, reliability
from dmosnet_jax.memory.dbscan import dbscan

# Non-zeros per row over k1, before and after query expansion, and edges per row: twice what real features showed.
_SET_PER_K1, _ROW_PER_K1, _EDGES = 2, 9, 40
_PROBES = 512
_PROBE_CELLS = 2**26  # distances of probes at once
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Clustering:
    """Pseudo-labels and what led to them. Arrays are NumPy, one entry per image.

    Attributes:
        labels: int32 [N], classes 0..C-1, every image in one; un-clustered images are classes of their own, the last.
        dbscan: int32 [N], DBSCAN labels at `eps`, noise -1.
        dbscan_tight: int32 [N], at `eps - eps_gap`.
        dbscan_loose: int32 [N], at `eps + eps_gap`.
        r_comp: float32 [N], 1 - IoU of the clusters at `eps` and `eps - eps_gap`.
        r_indep: float32 [N], 1 - IoU of the clusters at `eps` and `eps + eps_gap`.
        indep_threshold: pass it to the next epoch's call.
        num_clusters: classes of more than one image.
        num_unclustered: classes of one image.
        largest_cluster: images in the largest class.
        seconds: time per stage.
        recall: share of the true nearest images that the search found, measured where it was not exact; else None.
    """

    labels: np.ndarray
    dbscan: np.ndarray
    dbscan_tight: np.ndarray
    dbscan_loose: np.ndarray
    r_comp: np.ndarray
    r_indep: np.ndarray
    indep_threshold: float
    num_clusters: int
    num_unclustered: int
    largest_cluster: int
    seconds: dict[str, float] = field(default_factory=dict)
    recall: float | None = None


class TooFewClusteredError(UserError):
    """Not one cluster, or too few images in clusters: the message suggests a radius.

    Attributes:
        reaches: float32 [up to 512], rising: how far the `min_samples`-th nearest image is, for a sample of images.
            Where this curve bends upwards is a good radius.
        eps: the radius that was tried.
        min_samples: images that make a core point.
    """

    def __init__(self, message: str, reaches: np.ndarray, eps: float, min_samples: int):
        super().__init__(message)
        self.reaches, self.eps, self.min_samples = reaches, eps, min_samples


class _Stages:
    """Times stages and passes their progress on."""

    def __init__(self, report: Callable[[str, float], None] | None):
        self.seconds: dict[str, float] = {}
        self._report = report

    def progress(self, name: str) -> Callable[[float], None] | None:
        report = self._report
        return None if report is None else lambda fraction: report(name, fraction)

    @contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[float], None] | None]:
        start = time.perf_counter()
        yield self.progress(name)
        self.seconds[name] = time.perf_counter() - start


def estimate_memory(images: int, dim: int, *, k1: int = 30, threads: int | None = None) -> dict[str, int]:
    """Bytes of host memory that `cluster` needs, by part, and their sum as `total`.

    Feature and neighbour tables are exact; the sparse parts allow twice the non-zeros measured on real features.

    Args:
        images: N.
        dim: feature length.
        k1: neighbours.
        threads: worker threads, default all cores.
    """
    workers = neighbours.thread_count(threads)
    parts = {
        "features": 4 * images * dim,
        "neighbours": 9 * images * k1 + 4 * min(images, neighbours.BLOCK) ** 2,
        "reciprocal sets": 8 * images * k1 * _SET_PER_K1,
        "weights and inverted index": 16 * images * k1 * _ROW_PER_K1,
        "graph": 24 * images * _EDGES,
        "scratch": 12 * images * workers,
        "labels": 120 * images,
    }
    return parts | {"total": sum(parts.values())}


def _check_settings(k1: int, k2: int, eps: float, eps_gap: float, min_samples: int) -> None:
    if k1 < 1 or k2 < 1:
        raise ConfigError(f"clustering: k1={k1} and k2={k2} must be at least 1 (SpCL uses 30 and 6)")
    if not (eps_gap >= 0 and eps - eps_gap > 0 and eps + eps_gap < 1):
        raise ConfigError(
            f"clustering: eps={eps} with eps_gap={eps_gap} gives the radii {eps - eps_gap:g} to {eps + eps_gap:g}; "
            "Jaccard radii must lie between 0 and 1 (SpCL uses eps=0.6, eps_gap=0.02)"
        )
    if min_samples < 1:
        raise ConfigError(f"clustering: min_samples={min_samples} must be at least 1 (SpCL uses 4)")


def _check_features(features: np.ndarray) -> np.ndarray:
    """Unit rows as float32; rows that are unit already are left as they are, to the last bit."""
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[0] == 0:
        raise DataError(f"clustering: features have shape {features.shape}; expected [images, dimension], not empty")
    features = np.ascontiguousarray(features, np.float32)
    # A row's norm is finite exactly when the row is (and its squares fit float32), so one pass checks both.
    norms = np.sqrt(np.einsum("nd,nd->n", features, features))
    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if bad.size:
        raise DataError(
            f"clustering: {bad.size} of {features.shape[0]} feature rows are not finite or all zero, the first is row "
            f"{bad[0]}; the network has diverged or features are missing: lower the learning rate or extract again"
        )
    if np.abs(norms - 1).max() > 1e-3:
        features = features / norms[:, None]
    return features


def machine_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's where that is less.

    A system that does not tell counts as having any amount.
    """
    limits = []
    with suppress(AttributeError, ValueError, OSError):  # not a POSIX system
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _CONTAINER_LIMITS:
        try:
            with open(path, encoding="ascii") as file:
                limits.append(int(file.read()))
        except (OSError, ValueError):  # no such control group, or no limit ("max")
            continue
    return min(limits, default=sys.maxsize)


def check_memory(images: int, dim: int, *, k1: int = 30, threads: int | None = None, limit: int | None = None) -> None:
    """Raises UserError when clustering needs more memory than `limit` bytes, by default what this process may use."""
    if limit is None:
        limit = machine_memory()
    need = estimate_memory(images, dim, k1=k1, threads=threads)["total"]
    if need > limit:
        raise UserError(
            f"clustering: {images} images of {dim} values need about {need / 2**30:.1f} GiB of memory, more than the "
            f"{limit / 2**30:.1f} GiB there are; use a machine with more memory, a lower k1 ({k1}) or fewer images"
        )


def _reaches(weights: jaccard.SparseRows, min_samples: int) -> np.ndarray:
    """Distance to the `min_samples`-th nearest image, itself included, of a sample of the images; rising."""
    rows = weights.indptr.shape[0] - 1
    if rows < min_samples:
        return np.empty(0, np.float32)
    sample = np.linspace(0, rows - 1, min(rows, _PROBES)).astype(np.int64)
    inverted = jaccard.invert(weights)
    parts = [
        np.partition(jaccard.distance_rows(weights, part, inverted=inverted), min_samples - 1, axis=1)
        for part in np.array_split(sample, max(sample.size * rows // _PROBE_CELLS, 1))
    ]
    return np.sort(np.concatenate([part[:, min_samples - 1] for part in parts]))


def _advice(reaches: np.ndarray, images: int, eps: float, min_samples: int) -> str:
    """What radius would cluster half of the images, from the k-distances of a sample."""
    if not reaches.size:
        return f"there are only {images} images and min_samples is {min_samples}: lower min_samples or add images"
    reach = float(np.median(reaches))
    if reach <= eps or reach > 0.95:
        return (
            "the images share almost no neighbours: check the features (a trained or pre-trained network?), "
            "or raise k1 or lower min_samples"
        )
    return f"half of the images have {min_samples} images (themselves included) within {reach:.2f}: set eps near that"


def _check_clusters(
    clusters: np.ndarray, weights: jaccard.SparseRows, eps: float, min_samples: int, min_clustered: float
) -> None:
    # A cluster may be one image: with min_samples=1, or when earlier clusters took all its border points.
    sizes = np.bincount(clusters + 1)[1:]
    images, inside = clusters.shape[0], int(sizes[sizes > 1].sum())
    if inside and inside >= min_clustered * images:
        return
    reaches = _reaches(weights, min_samples)
    found = (
        f"only {inside} of {images} images ({inside / images:.2%}) are in clusters"
        if inside
        else f"not one cluster among {images} images"
    )
    wanted = f", fewer than min_clustered={min_clustered:g}" if inside else ""
    raise TooFewClusteredError(
        f"clustering: {found} at eps={eps:g}, min_samples={min_samples}{wanted}; "
        + _advice(reaches, images, eps, min_samples),
        reaches,
        eps,
        min_samples,
    )


def _result(
    partitions: tuple[np.ndarray, ...], chosen: reliability.Reliability, seconds: dict[str, float]
) -> Clustering:
    sizes = np.bincount(chosen.labels)
    return Clustering(
        labels=chosen.labels,
        dbscan=partitions[0],
        dbscan_tight=partitions[1],
        dbscan_loose=partitions[2],
        r_comp=chosen.r_comp,
        r_indep=chosen.r_indep,
        indep_threshold=chosen.threshold,
        num_clusters=int((sizes > 1).sum()),
        num_unclustered=int((sizes == 1).sum()),
        largest_cluster=int(sizes.max()),
        seconds=seconds,
    )


def cluster(
    features: np.ndarray,
    *,
    k1: int = 30,
    k2: int = 6,
    eps: float = 0.6,
    eps_gap: float = 0.02,
    min_samples: int = 4,
    indep_threshold: float | None = None,
    min_clustered: float = 0.0,
    nearest: np.ndarray | None = None,
    mesh=None,
    threads: int | None = None,
    memory_limit: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Clustering:
    """Pseudo-labels with SpCL's Jaccard distance, DBSCAN at three radii and the self-paced criterion.

    Args:
        features: float32 [N, D]; rows that are not of unit length are L2-normalised.
        k1: nearest images of the k-reciprocal sets, the image itself included; clipped to N.
        k2: nearest images of query expansion; clipped to k1.
        eps: DBSCAN radius, a Jaccard distance.
        eps_gap: how much smaller and larger the other two radii are.
        min_samples: images within the radius, itself included, that make a core point.
        indep_threshold: `Clustering.indep_threshold` of the first epoch; None in the first epoch.
        min_clustered: share of the images that clusters of more than one image must hold, or the radius is refused.
        nearest: int32 [N, >= k1] nearest images, best first, itself included, when they are known already.
        mesh: devices for the neighbour search, see `neighbours.search`.
        threads: host threads, default all cores.
        memory_limit: bytes; refuse to start when the estimate is above. Default: the machine's memory.
        progress: called with (stage, finished fraction of the stage).

    Returns:
        `Clustering`.

    Raises:
        ConfigError: a setting out of range.
        DataError: features that are not finite, zero or not a matrix, or a neighbour table of another shape.
        TooFewClusteredError: not one cluster, or less than `min_clustered` in clusters.
        UserError: not enough memory.
    """
    _check_settings(k1, k2, eps, eps_gap, min_samples)
    stages = _Stages(progress)
    features = _check_features(features)
    images, dim = features.shape
    k1 = min(k1, images)
    check_memory(images, dim, k1=k1, threads=threads, limit=memory_limit)
    with stages("neighbours") as report:
        if nearest is None:
            nearest = neighbours.search(features, k1, mesh=mesh, threads=threads, progress=report).indices
        elif nearest.shape[0] != images or nearest.shape[1] < k1:
            raise DataError(f"clustering: nearest has shape {nearest.shape}; expected [{images}, at least {k1}]")
    with stages("weights") as report:
        order = jaccard.visiting_order(nearest, threads=threads)
        weights = jaccard.reciprocal_weights(
            features, nearest, k1=k1, k2=k2, order=order, threads=threads, progress=report
        )
    with stages("jaccard") as report:
        graph = jaccard.distance_graph(weights, eps + eps_gap, order=order, threads=threads, progress=report)
    with stages("dbscan"):
        middle, tight, loose = (dbscan(graph, radius, min_samples) for radius in (eps, eps - eps_gap, eps + eps_gap))
    _check_clusters(middle, weights, eps, min_samples, min_clustered)
    with stages("criterion"):
        chosen = reliability.select(middle, tight, loose, threshold=indep_threshold)
    return _result((middle, tight, loose), chosen, stages.seconds)
