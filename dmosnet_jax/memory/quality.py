"""How well pseudo-labels agree with identities, where those are known. For the log: training never sees any of it.

All figures come from the sparse table of (cluster, identity) counts: O(N log N) time, O(N) memory.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dmosnet_jax.core import arguments
from dmosnet_jax.memory.clustering.criterion import number_noise


class Quality(NamedTuple):
    """Agreement of two partitions of the images whose identity is known.

    Attributes:
        nmi: normalised mutual information, over the mean of the two entropies.
        adjusted_rand: Rand index adjusted for chance (Hubert and Arabie 1985).
        pair_precision: share of the pairs with one pseudo-label that have one identity; 1 where there are no pairs.
        pair_recall: share of the pairs with one identity that have one pseudo-label; 1 where there are no pairs.
        images: how many images have a known identity.
    """

    nmi: float
    adjusted_rand: float
    pair_precision: float
    pair_recall: float
    images: int


def agreement(labels: Int[np.ndarray, " n"], identities: Int[np.ndarray, " n"]) -> Quality | None:
    """Compares pseudo-labels with identities.

    Args:
        labels: images with a negative label count as a class of their own each.
        identities: images with a negative identity are left out.

    Returns:
        `Quality`, or None where no identity is known.

    Raises:
        DataError: no vectors of whole numbers, or of different lengths.
    """
    labels, identities = _pair("labels", labels, "identities", identities)
    known = identities >= 0
    if not known.any():
        return None
    _, rows = np.unique(number_noise(labels[known]), return_inverse=True)
    _, columns = np.unique(identities[known], return_inverse=True)
    pairs = rows.astype(np.int64) * (int(columns.max()) + 1) + columns
    shared = np.unique(pairs, return_counts=True)[1]
    by_label, by_identity = np.bincount(rows), np.bincount(columns)
    images = len(rows)
    both, first, second = (_pairs(counts) for counts in (shared, by_label, by_identity))
    chance = first * second / max(_pairs(np.array([images])), 1.0)
    most = (first + second) / 2
    entropies = [_entropy(counts, images) for counts in (by_label, by_identity, shared)]
    information = max(entropies[0] + entropies[1] - entropies[2], 0.0)
    return Quality(
        nmi=_ratio(information, (entropies[0] + entropies[1]) / 2),
        adjusted_rand=_ratio(both - chance, most - chance),
        pair_precision=_ratio(both, first),
        pair_recall=_ratio(both, second),
        images=images,
    )


def spanning_cameras(labels: Int[np.ndarray, " n"], camids: Int[np.ndarray, " n"]) -> float | None:
    """Share of the clusters of two images and more that have images of several cameras.

    Args:
        labels: negative outside of clusters.
        camids: camera of each image.

    Returns:
        A fraction; None where all images are of one camera, or there is no such cluster.

    Raises:
        DataError: no vectors of whole numbers, or of different lengths.
    """
    labels, camids = _pair("labels", labels, "cameras", camids)
    inside = labels >= 0
    if len(np.unique(camids)) < 2 or not inside.any():
        return None
    pairs = np.unique(np.stack([labels[inside], camids[inside]]), axis=1)
    images, cameras = np.bincount(labels[inside]), np.bincount(pairs[0])
    clusters = images > 1
    return float((cameras[clusters] > 1).mean()) if clusters.any() else None


def _pair(first: str, values: np.ndarray, second: str, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    checked = arguments.integers(f"quality: {first}", values)
    return checked, arguments.integers(f"quality: {second}", others, length=len(checked))


def _pairs(counts: np.ndarray) -> float:
    # In float64: two million images have 2e12 pairs, far below where its integers end.
    counts = counts.astype(np.float64)
    return float((counts * (counts - 1) / 2).sum())


def _entropy(counts: np.ndarray, images: int) -> float:
    shares = counts / images
    return float(-(shares * np.log(shares)).sum())


def _ratio(part: float, whole: float) -> float:
    # Nothing to disagree about: one cluster and one identity, or no pairs.
    return part / whole if whole else 1.0
