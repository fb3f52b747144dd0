"""Sparse, exact k-reciprocal Jaccard distance (Zhong et al. 2017, as in SpCL's `spcl/utils/faiss_rerank.py`).

An image is described by weights over its expanded k-reciprocal neighbours, about a hundred of them, averaged over its
k2 nearest images. With m the sum of the element-wise minima of two such rows, their distance is 1 - m / (2 - m). Images
that share no neighbour are at distance 1 and are never looked at: an inverted index leads from a row to those it shares
a neighbour with. Memory and time are linear in the number of images where the dense reference needs N x N.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64

from dmosnet_jax.core.kernels import map_rows
from dmosnet_jax.memory.clustering import jaccard_kernels as kernels

Progress = Callable[[float], None] | None

# How far `visiting_order` looks.
_HOPS, _HOP_NEIGHBOURS = 3, 10


class SparseRows(NamedTuple):
    """Compressed sparse rows of a square matrix.

    Attributes:
        indptr: where each row starts.
        indices: columns; rising within a row for weights, unordered for graphs.
        values: of the entries.
    """

    indptr: Int64[np.ndarray, " offsets"]
    indices: Int32[np.ndarray, " e"]
    values: Float32[np.ndarray, " e"]


def half_k(k1: int) -> int:
    """Columns of the candidates' neighbour lists: round(k1 / 2) neighbours and the image itself (halves to even)."""
    return round(k1 / 2) + 1


def _offsets(counts: np.ndarray) -> np.ndarray:
    indptr = np.zeros(counts.shape[0] + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    return indptr


def visiting_order(neighbours: Int[np.ndarray, "n k"], *, threads: int | None = None) -> Int32[np.ndarray, " n"]:
    """An order of the rows in which neighbours come near each other.

    Rows that reach the same lowest row within a few hops are adjacent. Any order gives the same results; this one
    keeps what neighbours share in the caches.

    Args:
        neighbours: best first.
        threads: worker threads, default all cores.
    """
    near = np.ascontiguousarray(neighbours[:, :_HOP_NEIGHBOURS], np.int32)
    labels = np.arange(near.shape[0], dtype=np.int32)
    for _ in range(_HOPS):
        lower = np.empty_like(labels)
        map_rows(functools.partial(_lower_labels, near, labels, lower), near.shape[0], threads=threads)
        labels = lower
    return np.argsort(labels, kind="stable").astype(np.int32)


def _lower_labels(neighbours: np.ndarray, labels: np.ndarray, out: np.ndarray, start: int, stop: int) -> None:
    kernels.least_labels(neighbours, labels, start, stop, out)


def _any_order(order: np.ndarray | None, rows: int) -> np.ndarray:
    return np.arange(rows, dtype=np.int32) if order is None else order


def reciprocal_sets(
    neighbours: Int[np.ndarray, "n k"],
    full: int,
    half: int,
    *,
    order: Int32[np.ndarray, " n"] | None = None,
    threads: int | None = None,
    progress: Progress = None,
) -> tuple[Int64[np.ndarray, " offsets"], Int32[np.ndarray, " e"]]:
    """Expanded k-reciprocal sets.

    j belongs to the set of i when each is among the first `full` neighbours of the other. The `half`-reciprocal set of
    a member joins when more than two thirds of it is in the set already.

    Args:
        neighbours: best first, the image itself included.
        full: columns of a neighbour list that count; at most k are used.
        half: the same for the members' smaller sets.
        order: see `visiting_order`; default as they come.
        threads: worker threads, default all cores.
        progress: called with the finished fraction.

    Returns:
        `indptr`, and `indices`, rising within a row, of the sets as sparse rows.
    """
    neighbours = np.ascontiguousarray(neighbours, np.int32)
    rows, columns = neighbours.shape
    full, half = min(full, columns), min(half, columns)
    order = _any_order(order, rows)
    marks = np.zeros((rows, full), np.uint8)
    map_rows(lambda a, b: kernels.mark_mutual(neighbours, full, half, order, a, b, marks), rows, threads=threads)
    counts, none = np.zeros(rows, np.int64), np.empty(0, np.int32)

    def expand(indptr: np.ndarray, indices: np.ndarray, report: Progress) -> None:
        def task(start: int, stop: int) -> None:
            kernels.expand_sets(neighbours, marks, full, half, order, start, stop, counts, indptr, indices)

        map_rows(task, rows, threads=threads, progress=report)

    expand(counts, none, None)
    indptr = _offsets(counts)
    indices = np.empty(indptr[-1], np.int32)
    if indices.size:
        expand(indptr, indices, progress)
    return indptr, indices


def pair_products(
    features: Float32[np.ndarray, "n d"],
    indptr: Int64[np.ndarray, " offsets"],
    indices: Int32[np.ndarray, " e"],
    *,
    order: Int32[np.ndarray, " n"] | None = None,
    threads: int | None = None,
) -> Float32[np.ndarray, " e"]:
    """Inner products of each row with the members of its set."""
    features = np.ascontiguousarray(features, np.float32)
    order = _any_order(order, features.shape[0])
    values = np.empty(indices.shape[0], np.float32)
    map_rows(
        lambda a, b: kernels.pair_products(features, indptr, indices, order, a, b, values),
        features.shape[0],
        threads=threads,
    )
    return values


def softmax_rows(
    indptr: Int64[np.ndarray, " offsets"],
    indices: Int32[np.ndarray, " e"],
    exponents: Float32[np.ndarray, " e"],
    *,
    threads: int | None = None,
) -> SparseRows:
    """Weights from exponents, which are overwritten: a softmax over each row's entries."""
    map_rows(lambda a, b: kernels.softmax_rows(indptr, a, b, exponents), indptr.shape[0] - 1, threads=threads)
    return SparseRows(indptr, indices, exponents)


def expand_queries(
    weights: SparseRows,
    neighbours: Int[np.ndarray, "n k"],
    k2: int,
    *,
    order: Int32[np.ndarray, " n"] | None = None,
    threads: int | None = None,
    progress: Progress = None,
) -> SparseRows:
    """Query expansion: each row becomes the mean of the rows of its k2 nearest neighbours, itself included.

    Args:
        weights: rows to average.
        neighbours: best first, the image itself included.
        k2: neighbours to average; 1 leaves the rows as they are, at most k are used.
        order: see `visiting_order`; default as they come.
        threads: worker threads, default all cores.
        progress: called with the finished fraction.

    Returns:
        New rows, columns rising.
    """
    if k2 == 1:
        return weights
    neighbours = np.ascontiguousarray(neighbours, np.int32)
    rows, k2 = neighbours.shape[0], min(k2, neighbours.shape[1])
    counts, order = np.zeros(rows, np.int64), _any_order(order, rows)

    def average(indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, report: Progress) -> None:
        def task(start: int, stop: int) -> None:
            kernels.average_rows(neighbours, k2, tuple(weights), indptr, indices, values, order, start, stop, counts)

        map_rows(task, rows, threads=threads, progress=report)

    average(counts, np.empty(0, np.int32), np.empty(0, np.float32), None)
    indptr = _offsets(counts)
    indices, values = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
    if indices.size:
        average(indptr, indices, values, progress)
    return SparseRows(indptr, indices, values)


def reciprocal_weights(
    features: Float32[np.ndarray, "n d"],
    neighbours: Int[np.ndarray, "n k"],
    *,
    k1: int,
    k2: int,
    order: Int32[np.ndarray, " n"] | None = None,
    threads: int | None = None,
    progress: Progress = None,
) -> SparseRows:
    """SpCL's description of every image: softmax(-(2 - 2 cos)) over its expanded set, averaged over k2 neighbours.

    Args:
        features: L2-normalised.
        neighbours: min(k1, n) at least, the image itself included.
        k1: neighbours that count, the image itself among them (SpCL searches for k1 entries, not k1 + 1).
        k2: neighbours averaged in query expansion.
        order: see `visiting_order`; default as they come.
        threads: worker threads, default all cores.
        progress: called with the finished fraction of the whole.

    Returns:
        Weights whose rows sum to 1.
    """

    def part(low: float, high: float) -> Progress:
        return None if progress is None else lambda fraction: progress(low + (high - low) * fraction)

    nearest = neighbours[:, :k1]
    how: dict[str, Any] = {"order": order, "threads": threads}
    indptr, indices = reciprocal_sets(nearest, k1, half_k(k1), progress=part(0.0, 0.4), **how)
    exponents = pair_products(features, indptr, indices, **how)
    exponents *= np.float32(2)
    exponents -= np.float32(2)
    weights = softmax_rows(indptr, indices, exponents, threads=threads)
    return expand_queries(weights, nearest, k2, progress=part(0.6, 1.0), **how)


def invert(weights: SparseRows) -> SparseRows:
    """The inverted index: for each column the rows that have it, rising, and their weights."""
    return SparseRows(*kernels.transpose(*weights))


def distance_rows(
    weights: SparseRows,
    rows: Int[np.ndarray, " m"],
    *,
    inverted: SparseRows | None = None,
    threads: int | None = None,
) -> Float32[np.ndarray, "m n"]:
    """Full rows of the distance matrix.

    Args:
        weights: from `reciprocal_weights`.
        rows: which rows.
        inverted: `invert(weights)`, when it is at hand.
        threads: worker threads, default all cores.

    Returns:
        Jaccard distances in [0, 1].
    """
    inverted = invert(weights) if inverted is None else inverted
    which = np.asarray(rows, np.int64)
    out = np.empty((which.shape[0], weights.indptr.shape[0] - 1), np.float32)
    map_rows(
        lambda a, b: kernels.dense_rows(tuple(weights), tuple(inverted), which, a, b, out),
        which.shape[0],
        threads=threads,
        task_rows=64,
    )
    return out


def distance_graph(
    weights: SparseRows,
    limit: float,
    *,
    order: Int32[np.ndarray, " n"] | None = None,
    threads: int | None = None,
    progress: Progress = None,
) -> SparseRows:
    """All pairs within a distance, in both directions, the image itself included.

    Args:
        weights: from `reciprocal_weights`.
        limit: largest distance kept; must be below 1, the distance of images that share no neighbour.
        order: see `visiting_order`; default as they come.
        threads: worker threads, default all cores.
        progress: called with the finished fraction.

    Returns:
        The graph, float32 distances; compared with `limit` in float32, as the dense reference is.
    """
    inverted = tuple(invert(weights))
    rows = weights.indptr.shape[0] - 1
    order = _any_order(order, rows)
    counts, own = np.zeros(rows, np.int64), np.zeros(rows, np.float32)
    bound = np.float32(limit)
    pieces = map_rows(
        lambda a, b: kernels.near_pairs(tuple(weights), inverted, bound, order, a, b, counts, own),
        rows,
        threads=threads,
        progress=progress,
    )
    found = np.concatenate([piece[0] for piece in pieces])
    distances = np.concatenate([piece[1] for piece in pieces])
    return SparseRows(*kernels.symmetrise(counts, found, distances, own, bound, order))
