"""SpCL's self-paced criterion (Ge et al. 2020, section 3.3; `examples/spcl_train_usl.py`) from contingency counts.

A cluster is reliable when it hardly changes at a slightly smaller radius (compact) and at a slightly larger one
(independent). The reference compares N x N membership matrices; the overlaps it needs are sizes of clusters and
of their pairwise intersections, which sorting gives in O(N log N).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64


class Reliability(NamedTuple):
    """What the criterion found.

    Attributes:
        labels: classes 0..C-1: clusters of more than one image and the un-clustered images, each a class.
        r_comp: 1 - IoU of the image's cluster with its cluster at the smaller radius; 0 is compact.
        r_indep: the same with the larger radius; 0 is independent.
        threshold: largest `r_indep` of an accepted cluster.
    """

    labels: Int32[np.ndarray, " n"]
    r_comp: Float32[np.ndarray, " n"]
    r_indep: Float32[np.ndarray, " n"]
    threshold: float


def number_noise(clusters: Int[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Gives every noise image (-1) a number of its own, after the clusters' numbers."""
    labels = clusters.astype(np.int64)
    noise = np.flatnonzero(labels < 0)
    labels[noise] = labels.max(initial=-1) + 1 + np.arange(noise.shape[0])
    return labels


def change(labels: Int[np.ndarray, " n"], other: Int[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """1 - IoU of each image's class under two partitions, both with classes numbered from 0."""
    pair = labels.astype(np.int64) * (int(other.max()) + 1) + other
    _, which, shared = np.unique(pair, return_inverse=True, return_counts=True)
    shared = shared[which]
    union = np.bincount(labels)[labels] + np.bincount(other)[other] - shared
    # In float32, as the reference: the threshold of the first epoch is one of these values and is compared with others.
    return np.float32(1) - shared.astype(np.float32) / union.astype(np.float32)


def select(
    clusters: Int[np.ndarray, " n"],
    tight: Int[np.ndarray, " n"],
    loose: Int[np.ndarray, " n"],
    *,
    threshold: float | None = None,
) -> Reliability:
    """Keeps the images that their cluster is reliable for; every other becomes a class of its own.

    A cluster scores the lowest `r_indep` and `r_comp` of its images. An image stays when its cluster's independence
    score is within the threshold and its own `r_comp` is not above its cluster's score.

    Args:
        clusters: DBSCAN labels at the radius, noise -1; one cluster of two images at least.
        tight: the same at the smaller radius.
        loose: the same at the larger radius.
        threshold: independence threshold of the first epoch. None: the 90th-percentile entry of the clusters' scores.

    Returns:
        `Reliability`; its labels are contiguous, in the order of the clusters, un-clustered images last.
    """
    labels = number_noise(clusters)
    r_comp = change(labels, number_noise(tight))
    r_indep = change(labels, number_noise(loose))
    classes = int(labels.max()) + 1
    comp_score, indep_score = np.full(classes, np.inf, np.float32), np.full(classes, np.inf, np.float32)
    np.minimum.at(comp_score, labels, r_comp)
    np.minimum.at(indep_score, labels, r_indep)
    if threshold is None:
        scores = np.sort(indep_score[np.bincount(labels) > 1])
        threshold = float(scores[min(scores.shape[0] - 1, int(np.round(scores.shape[0] * 0.9)))])
    stays = (indep_score[labels].astype(np.float64) <= threshold) & (r_comp <= comp_score[labels])
    outside = np.flatnonzero(~stays)
    labels[outside] = classes + np.arange(outside.shape[0])
    # Clusters that lost every image leave gaps in the reference's numbers; without gaps tables need no mask for them.
    order = np.where(np.bincount(labels)[labels] > 1, labels, labels + labels.max() + 1)
    _, contiguous = np.unique(order, return_inverse=True)
    return Reliability(contiguous.astype(np.int32), r_comp, r_indep, float(threshold))
