"""Clustering by several processes: the neighbour search over all devices, the graph once, one result for all."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from dmosnet_jax.core.errors import UserError
from dmosnet_jax.memory import neighbours
from dmosnet_jax.memory.clustering import Clustering, check_memory, cluster

_Result = TypeVar("_Result")
_TABLES = ("labels", "dbscan", "dbscan_tight", "dbscan_loose", "r_comp", "r_indep")
_NUMBERS = ("num_clusters", "num_unclustered", "largest_cluster")


def cluster_together(
    features: np.ndarray,
    *,
    k1: int,
    mesh: Mesh | None = None,
    candidates: int = 0,
    threads: int | None = None,
    progress: Callable[[str, float], None] | None = None,
    **settings: Any,
) -> Clustering:
    """`clustering.cluster` called by every process of a job; the same result in each, to the last bit.

    Neighbours are searched over all processes, the graph stages run on process 0 alone, which sends its result. Hosts
    that differ in a last bit so never train on different labels.

    Args:
        features: float32 [N, D] of unit length, the same in every process.
        k1: see `cluster`.
        mesh: devices of the neighbour search, all of them by default.
        candidates: see `neighbours.search`.
        threads: host threads, default all cores.
        progress: called with (stage, finished fraction of the stage).
        **settings: the others of `cluster`.

    Returns:
        `Clustering`; `seconds` of the stages that ran here.

    Raises:
        UserError: as `cluster`; on processes other than the first without the details.
    """
    single = jax.process_count() == 1
    if single and not candidates:
        return cluster(features, k1=k1, mesh=mesh, threads=threads, progress=progress, **settings)
    agree(
        lambda: check_memory(
            *features.shape, k1=min(k1, len(features)), threads=threads, limit=settings.get("memory_limit")
        )
    )
    since = time.perf_counter()
    report = None if progress is None else lambda fraction: progress("neighbours", fraction)
    nearest = neighbours.search(
        features, min(k1, len(features)), mesh=mesh, candidates=candidates, threads=threads, progress=report
    ).indices
    options = settings | {"k1": k1, "threads": threads, "progress": progress, "nearest": nearest}
    seconds = time.perf_counter() - since
    found = cluster(features, **options) if single else _from_first(features, options)
    found.seconds["neighbours"] = seconds
    return dataclasses.replace(found, recall=neighbours.recall(features, nearest) if candidates else None)


def _from_first(features: np.ndarray, options: dict[str, Any]) -> Clustering:
    """Clusters on process 0, and gives everybody the result or the failure."""
    found = agree(lambda: cluster(features, **options))
    images = len(features)
    kinds = {"r_comp": np.float32, "r_indep": np.float32}
    tables = [getattr(found, name, np.zeros(images, kinds.get(name, np.int32))) for name in _TABLES]
    # As bits: a float64 would arrive as a float32.
    bits = np.array([found.indep_threshold if found else 0.0]).view(np.uint32)
    numbers = np.array([getattr(found, name, 0) for name in _NUMBERS], np.int32)
    *sent, bits, numbers = _broadcast((*tables, bits, numbers))
    fields: dict[str, Any] = {name: np.asarray(table) for name, table in zip(_TABLES, sent, strict=True)}
    fields |= {name: int(value) for name, value in zip(_NUMBERS, np.asarray(numbers), strict=True)}
    threshold = float(np.asarray(bits).view(np.float64)[0])
    return Clustering(**fields, indep_threshold=threshold, seconds=found.seconds if found else {})


def agree(work: Callable[[], _Result]) -> _Result | None:
    """Does something on process 0, the result there and None elsewhere; a failure there is one everywhere.

    Raises:
        UserError: on the other processes, whatever the failure on process 0 was.
    """
    result: _Result | None = None
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            result = work()
        except Exception as error:
            # The others wait: they must learn of it before this process ends.
            failure = error
    if jax.process_count() > 1 and not int(_broadcast(np.int32(failure is None))) and failure is None:
        raise UserError("process 0 failed, and its message says why")
    if failure is not None:
        raise failure
    return result


def _broadcast(tree: Any) -> Any:
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(tree)
