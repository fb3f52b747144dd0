"""What the clusters of an epoch are, for a person: their sizes, and some of them with images to look at.

O(N log N) time and, beside the features, O(N) memory. Identities only serve to say how mixed clusters are.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int, Int64

from dmosnet_jax.core import arguments

# Rows of features that are gathered at once.
_BLOCK = 16_384


class Clusters(NamedTuple):
    """The clusters of two images and more, in the order of their labels.

    Attributes:
        rows: the images in them, cluster by cluster.
        starts: where each cluster's images begin.
        sizes: images of each cluster.
        similarity: mean cosine of a cluster's pairs of images.
        identity: that of most of a cluster's images whose identity is known; -1 where none is.
        strangers: images of another identity that is known.
        identities: how many identities are known in it.
    """

    rows: Int64[np.ndarray, " m"]
    starts: Int64[np.ndarray, " c"]
    sizes: Int64[np.ndarray, " c"]
    similarity: Float64[np.ndarray, " c"]
    identity: Int64[np.ndarray, " c"]
    strangers: Int64[np.ndarray, " c"]
    identities: Int64[np.ndarray, " c"]


def find(
    features: Float32[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], identities: Int[np.ndarray, " n"]
) -> Clusters:
    """Finds the clusters and how tight and how mixed each is.

    Args:
        features: of unit length.
        labels: negative outside of clusters; a class of one image is no cluster.
        identities: negative where not known.

    Raises:
        DataError: no vectors of whole numbers, or of different lengths.
    """
    labels = arguments.integers("clusters: labels", labels, length=len(features))
    identities = arguments.integers("clusters: identities", identities, length=len(features))
    inside = np.flatnonzero(labels >= 0)
    _, which, sizes = np.unique(labels[inside], return_inverse=True, return_counts=True)
    kept = sizes > 1
    inside, which = inside[kept[which]], (np.cumsum(kept) - 1)[which[kept[which]]]
    order = np.argsort(which, kind="stable")
    rows, which, sizes = inside[order], which[order], sizes[kept].astype(np.int64)
    # Of unit vectors: the pairs' cosines are what the square of their sum has beyond their own squares.
    similarity = (_squared_sums(features, rows, which, len(sizes)) - sizes) / (sizes * (sizes - 1))
    known = identities[rows] >= 0
    pairs, counts = np.unique(np.stack([which, identities[rows]])[:, known], axis=1, return_counts=True)
    # Within a cluster by rising count: the last one written is the most frequent.
    rising = np.argsort(counts, kind="stable")
    identity, most = np.full(len(sizes), -1, np.int64), np.zeros(len(sizes), np.int64)
    identity[pairs[0, rising]], most[pairs[0, rising]] = pairs[1, rising], counts[rising]
    return Clusters(
        rows=rows,
        starts=np.cumsum(sizes) - sizes,
        sizes=sizes,
        similarity=similarity,
        identity=identity,
        strangers=np.bincount(which[known], minlength=len(sizes)) - most,
        identities=np.bincount(pairs[0], minlength=len(sizes)),
    )


def summary(found: Clusters, features: Float32[np.ndarray, "n d"], *, each: int = 4, shown: int = 8) -> dict[str, Any]:
    """What a report shows, as JSON values.

    Args:
        found: the clusters.
        features: those that they were found in.
        each: clusters of each kind.
        shown: images of a cluster, from the one nearest to its centroid to the farthest.

    Returns:
        `images`; `unclustered`, how many of them are in no cluster; `sizes`, pairs of the smallest size of a bin (2,
        4, 8, ...) and the clusters in it; `pure`, the share of clusters with one known identity alone, None where none
        is known; `examples`, by kind (`largest`; `tightest`, of those that are no smaller than half of all; `mixed`,
        with most strangers, or where no identity is known `loosest`), lists of `size`, `similarity`, `identity`,
        `strangers`, `identities` and `rows`.
    """
    bins, counts = np.unique(2 ** np.floor(np.log2(found.sizes)).astype(np.int64), return_counts=True)
    known = found.identities > 0
    usual = np.flatnonzero(found.sizes >= np.median(found.sizes)) if found.sizes.size else np.zeros(0, np.int64)
    by_tightness = usual[np.argsort(-found.similarity[usual], kind="stable")]
    by_strangers = np.argsort(-found.strangers, kind="stable")
    kinds = {"largest": np.argsort(-found.sizes, kind="stable"), "tightest": by_tightness}
    if known.any():
        kinds["mixed"] = by_strangers[found.strangers[by_strangers] > 0]
    else:
        kinds["loosest"] = by_tightness[::-1]
    return {
        "images": len(features),
        "unclustered": len(features) - len(found.rows),
        "sizes": np.stack([bins, counts], axis=1).tolist(),
        "pure": float((found.identities[known] == 1).mean()) if known.any() else None,
        "examples": {
            kind: [_example(found, features, int(number), shown) for number in numbers[:each]]
            for kind, numbers in kinds.items()
        },
    }


def _example(found: Clusters, features: np.ndarray, number: int, shown: int) -> dict[str, Any]:
    start, size = int(found.starts[number]), int(found.sizes[number])
    rows = found.rows[start : start + size]
    centroid = np.sum([part.sum(axis=0) for part in _blocks(features, rows)], axis=0)
    nearest = rows[np.argsort(-np.concatenate([part @ centroid for part in _blocks(features, rows)]), kind="stable")]
    places = np.linspace(0, size - 1, min(shown, size)).round().astype(np.int64)
    return {
        "size": size,
        "similarity": float(found.similarity[number]),
        "identity": int(found.identity[number]),
        "strangers": int(found.strangers[number]),
        "identities": int(found.identities[number]),
        "rows": nearest[places].tolist(),
    }


def _blocks(features: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    return (features[rows[start : start + _BLOCK]] for start in range(0, len(rows), _BLOCK))


def _squared_sums(features: np.ndarray, rows: np.ndarray, which: np.ndarray, clusters: int) -> np.ndarray:
    """The square of the length of the sum of each cluster's features, float64; `which` is the cluster of each row."""
    squares = np.zeros(clusters)
    last, carried = -1, np.zeros(features.shape[1], np.float32)
    for start, part in zip(range(0, len(rows), _BLOCK), _blocks(features, rows), strict=True):
        own = which[start : start + _BLOCK]
        starts = np.flatnonzero(np.diff(own, prepend=-1))
        sums = np.add.reduceat(part, starts, axis=0)
        if own[0] == last:
            sums[0] += carried
        # A cluster that goes on in the next block is written again there.
        squares[own[starts]] = np.einsum("cd,cd->c", sums, sums)
        last, carried = int(own[-1]), sums[-1]
    return squares
