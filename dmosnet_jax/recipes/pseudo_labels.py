"""The clustering of one epoch as a run reports it: memory needed, progress, quality, pictures, and why it failed."""

import pathlib
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dmosnet_jax.core import safe_json
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.core.parallel import agree, print_once
from dmosnet_jax.data.splits import Rows
from dmosnet_jax.evaluation import report_parts
from dmosnet_jax.evaluation.report import Clusters
from dmosnet_jax.evaluation.report_charts import Chart, Line, draw_svg
from dmosnet_jax.memory import cluster_summary, quality
from dmosnet_jax.memory.clustering import STAGES, Clustering, TooFewClusteredError, cluster, host_memory
from dmosnet_jax.memory.tables import TableRows
from dmosnet_jax.train.metrics import progress_bar, write_json

PICTURE, CLUSTERS = "k_distances.svg", "clusters.json"
# Candidates for each neighbour of the low-precision search.
_CANDIDATES = 2


def radius(settings: Any, epoch: int, epochs: int) -> float:
    """DBSCAN's radius of an epoch: `eps`, or interpolated from there to `eps_end`."""
    if settings.eps_end is None or epochs < 2:
        return settings.eps
    return settings.eps + (settings.eps_end - settings.eps) * epoch / (epochs - 1)


def check_memory(images: int, dim: int, settings: Any) -> None:
    """Prints how much memory clustering will need, before hours of extraction.

    Raises:
        UserError: there is less.
    """
    k1 = min(settings.k1, images)
    parts = host_memory.estimate_memory(images, dim, k1=k1)
    total = parts.pop("total")
    largest = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in sorted(parts.items(), key=lambda p: -p[1])[:3])
    whose = "host memory" if jax.process_count() == 1 else "process 0's host memory"
    print_once(
        f"clustering {images:,} images of {dim} values takes up to {total / 2**30:.2f} GiB of {whose} ({largest})"
    )
    agree(lambda: host_memory.check_memory(images, dim, k1=k1))


def run_clustering(
    features: TableRows, settings: Any, *, eps: float, threshold: float | None, mesh: Mesh, workdir: pathlib.Path
) -> Clustering:
    """Clusters the features with a progress bar, which begins anew with each stage: their rates have nothing in common.

    Args:
        features: rows of unit length.
        settings: `config.spcl`.
        eps: radius of this epoch.
        threshold: independence threshold of the first epoch, None in it.
        mesh: devices of the neighbour search.
        workdir: where a picture of the k-distance curve goes if there are too few clusters.

    Raises:
        TooFewClusteredError: the message names the picture.
    """
    images, candidates = features.shape[0], 0
    if settings.search == "bfloat16":
        candidates = _CANDIDATES * min(settings.k1, images)
    with progress_bar(images, label="cluster") as bar:

        def show(stage: str, fraction: float) -> None:
            if not fraction:
                place = STAGES.index(stage) + 1
                bar.set_description(f"cluster, {place} of {len(STAGES)}: {stage}", refresh=False)
                bar.set_postfix_str(f"then {[*STAGES, 'training'][place]}", refresh=False)
                bar.reset()
            bar.update(int(fraction * images) - bar.n)

        try:
            return cluster(
                features,
                k1=settings.k1,
                k2=settings.k2,
                eps=eps,
                eps_gap=settings.eps_gap,
                min_samples=settings.min_samples,
                min_clustered=settings.min_clustered,
                indep_threshold=threshold,
                mesh=mesh,
                candidates=candidates,
                progress=show,
            )
        except TooFewClusteredError as error:
            if not error.reaches.size:
                raise
            picture = workdir / PICTURE
            draw_k_distances(error, picture)
            message = f"{error} (--config.spcl.eps=...); the curve is in {picture}"
            raise TooFewClusteredError(message, error.reaches, error.eps, error.min_samples) from error


def draw_k_distances(error: TooFewClusteredError, path: pathlib.Path) -> None:
    """Writes the k-distance curve with the radius that was tried."""
    share = np.linspace(0, 100, len(error.reaches))
    reach = Line(f"distance to image {error.min_samples}", share.tolist(), error.reaches.tolist())
    tried = Line(f"eps = {error.eps:g}", [0.0, 100.0], [error.eps, error.eps])
    chart = Chart("k-distance curve", "share of the images (%)", "Jaccard distance", [reach, tried])
    svg = draw_svg(chart, "k-distances")
    with atomic_write(path) as part:
        # The report sets colour and background by its page; a file of its own has to.
        style = '<svg style="color:#333;background:white" '
        part.write_text(svg.replace("<svg ", style, 1), encoding="utf-8")


def report(
    found: Clustering,
    labels: np.ndarray,
    identities: np.ndarray,
    camids: np.ndarray,
    *,
    epoch: int,
    eps: float,
    since: float,
) -> dict[str, float]:
    """Prints a line about an epoch's clusters and returns its metrics.

    Args:
        found: the clustering.
        labels: int [N], the pseudo-labels that training will use.
        identities: int [N], -1 where not known; only for these figures.
        camids: int [N].
        epoch: from 0.
        eps: the radius.
        since: `time.perf_counter()` at the start.
    """
    stages = ", ".join(f"{name} {value:.1f}" for name, value in found.seconds.items())
    # Of the labels that are trained on: a cluster memory takes those of DBSCAN.
    sizes = np.bincount(labels[labels >= 0])
    clusters, largest = int((sizes > 1).sum()), int(sizes.max(initial=0))
    unclustered = int((sizes == 1).sum() + (labels < 0).sum())
    notes: dict[str, float] = {
        "clusters": clusters,
        "unclustered": unclustered,
        "largest_cluster": largest,
        "indep_threshold": found.indep_threshold,
        "eps": eps,
    }
    spanning = quality.spanning_cameras(labels, camids)
    across = "" if spanning is None else f" ({100 * spanning:.0f} % over several cameras)"
    if spanning is not None:
        notes["clusters_over_cameras"] = spanning
    if found.recall is not None:
        notes["neighbour_recall"] = found.recall
    agreement, quality_text = quality.agreement(labels, identities), ""
    if agreement is not None:
        notes |= {f"pseudo_{name}": getattr(agreement, name) for name in agreement._fields if name != "images"}
        quality_text = (
            f", NMI {agreement.nmi:.3f}, adjusted Rand {agreement.adjusted_rand:.3f}, pairs "
            f"{agreement.pair_precision:.3f} precise, {agreement.pair_recall:.3f} recalled"
        )
    print_once(
        f"epoch {epoch + 1}: {clusters} clusters{across}, {unclustered} un-clustered images, largest "
        f"cluster {largest}, threshold {found.indep_threshold:.4f}{quality_text}, "
        f"{time.perf_counter() - since:.1f} s ({stages})"
    )
    return notes | {f"seconds_{name}": value for name, value in found.seconds.items()}


def keep_clusters(
    workdir: pathlib.Path, features: np.ndarray | None, labels: np.ndarray, images: Rows, *, epoch: int
) -> None:
    """Writes what the report will say of an epoch's clusters to `clusters.json`; for process 0.

    A file, because a run that goes on within the epoch does not cluster again, and its features have moved.

    Args:
        workdir: of the run.
        features: float32 [N, D] of unit length, those that were clustered.
        labels: int [N], the pseudo-labels that training will use.
        images: those that were clustered.
        epoch: from 0.
    """
    assert features is not None
    found = cluster_summary.summary(cluster_summary.find(features, labels, images.pids), features)
    write_json(workdir / CLUSTERS, {"epoch": epoch + 1, **found})


def kept_clusters(workdir: pathlib.Path, images: Rows) -> Clusters | None:
    """The report's part about the clusters of the last epoch; None where the run was trained before there was one.

    Raises:
        DataError: the file or a record is damaged.
    """
    fix = "remove it, and the report does without"
    try:
        found = safe_json.read_object(workdir / CLUSTERS, fix=fix)
        return report_parts.cluster_part(images, found, found["epoch"])
    except FileNotFoundError:
        return None
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{workdir / CLUSTERS}: is damaged, or of another kind: {fix}") from error
