"""Pseudo-labels with N x N matrices: SpCL's method written down directly, for comparison.

What every public implementation does, with NumPy and scikit-learn: a similarity matrix, k-reciprocal weights as a dense
matrix, Jaccard distances row by row, DBSCAN at three radii over the distance matrix, and the criterion from membership
matrices. Five matrices of N x N float32 at the peak.
"""

import time

import numpy as np

# Float32 matrices of N x N alive at once.
MATRICES = 5


def labels(
    features: np.ndarray, *, k1: int = 30, k2: int = 6, eps: float = 0.6, eps_gap: float = 0.02, min_samples: int = 4
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Clusters and classes by the dense computation.

    Args:
        features: float32 [N, D], L2-normalised.
        k1: see `memory.clustering.cluster`.
        k2: likewise.
        eps: likewise.
        eps_gap: likewise.
        min_samples: likewise.

    Returns:
        DBSCAN labels int [N] at `eps`; classes int [N], equal for images of one class; seconds by stage.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.cluster import DBSCAN  # only this comparison needs it

    seconds, since = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal since
        seconds[name], since = time.perf_counter() - since, time.perf_counter()

    similarity = features @ features.T
    nearest = np.argpartition(-similarity, k1 - 1, axis=1)[:, :k1]
    order = np.argsort(-np.take_along_axis(similarity, nearest, axis=1), axis=1, kind="stable")
    nearest = np.take_along_axis(nearest, order, axis=1)
    lap("neighbours")
    weights = _weights(similarity, nearest, k1, k2)
    del similarity
    lap("weights")
    distance = _jaccard(weights)
    del weights
    lap("jaccard")
    found = [
        DBSCAN(eps=radius, min_samples=min_samples, metric="precomputed", n_jobs=-1).fit_predict(distance)
        for radius in (eps, eps - eps_gap, eps + eps_gap)
    ]
    del distance
    lap("dbscan")
    classes = _criterion(*found)
    lap("criterion")
    return found[0], classes, seconds


def _weights(similarity: np.ndarray, nearest: np.ndarray, k1: int, k2: int) -> np.ndarray:
    """Rows of softmax weights over the expanded k-reciprocal sets, averaged over the k2 nearest; [N, N]."""
    images = len(similarity)
    half = round(k1 / 2) + 1

    def mutual(i: int, columns: int) -> np.ndarray:
        forward = nearest[i, :columns]
        return forward[(nearest[forward, :columns] == i).any(axis=1)]

    halves = [mutual(i, half) for i in range(images)]
    weights = np.zeros((images, images), np.float32)
    for i in range(images):
        members = mutual(i, k1)
        parts = [members]
        parts += [halves[j] for j in members if len(np.intersect1d(halves[j], members)) > 2 / 3 * len(halves[j])]
        expanded = np.unique(np.concatenate(parts))
        closeness = np.exp(2 * similarity[i, expanded] - 2)
        weights[i, expanded] = closeness / closeness.sum()
    if k2 == 1:
        return weights
    averaged = np.empty_like(weights)
    for i in range(images):
        averaged[i] = weights[nearest[i, :k2]].mean(axis=0)
    return averaged


def _jaccard(weights: np.ndarray) -> np.ndarray:
    holders = [np.flatnonzero(column) for column in weights.T]
    distance = np.empty_like(weights)
    for i, row in enumerate(weights):
        shared = np.zeros(len(weights), np.float32)
        for column in np.flatnonzero(row):
            shared[holders[column]] += np.minimum(row[column], weights[holders[column], column])
        distance[i] = 1 - shared / (2 - shared)
    return np.maximum(distance, 0, out=distance)


def _criterion(middle: np.ndarray, tight: np.ndarray, loose: np.ndarray) -> np.ndarray:
    """Classes after the self-paced criterion, from N x N memberships."""
    images = np.arange(len(middle))

    def membership(found: np.ndarray) -> np.ndarray:
        alone = np.where(found < 0, found.max() + 1 + images, found)
        return alone[:, None] == alone[None, :]

    base = membership(middle)

    def change(found: np.ndarray) -> np.ndarray:
        other = membership(found)
        return 1 - (base & other).sum(axis=1) / (base | other).sum(axis=1)

    comp, indep = change(tight), change(loose)
    clusters = int(middle.max()) + 1
    lowest_comp, lowest_indep = np.full(clusters, np.inf), np.full(clusters, np.inf)
    inside = middle >= 0
    np.minimum.at(lowest_comp, middle[inside], comp[inside])
    np.minimum.at(lowest_indep, middle[inside], indep[inside])
    scores = np.sort(lowest_indep[np.bincount(middle[inside], minlength=clusters) > 1])
    threshold = scores[min(len(scores) - 1, int(np.round(len(scores) * 0.9)))]
    stays = inside.copy()
    stays[inside] = (lowest_indep[middle[inside]] <= threshold) & (comp[inside] <= lowest_comp[middle[inside]])
    return np.where(stays, middle, clusters + images)
