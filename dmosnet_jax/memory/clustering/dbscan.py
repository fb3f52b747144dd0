"""DBSCAN on a sparse neighbourhood graph, with the labels of scikit-learn's `DBSCAN(metric="precomputed")`."""

import numpy as np
from jaxtyping import Int32

from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.kernels import jit
from dmosnet_jax.memory.clustering.jaccard import SparseRows


@jit()
def _label(indptr, indices, distances, radius, min_samples):
    """Clusters grow one after the other from the core point of lowest index; see `dbscan`."""
    rows = indptr.shape[0] - 1
    core = np.zeros(rows, np.bool_)
    for i in range(rows):
        near = 0
        for p in range(indptr[i], indptr[i + 1]):
            near += distances[p] <= radius
        core[i] = near >= min_samples
    labels = np.full(rows, -1, np.int32)
    stack = np.empty(rows, np.int32)
    clusters = 0
    for seed in range(rows):
        if not core[seed] or labels[seed] >= 0:
            continue
        labels[seed] = clusters
        stack[0] = seed
        depth = 1
        while depth > 0:
            depth -= 1
            i = stack[depth]
            for p in range(indptr[i], indptr[i + 1]):
                j = indices[p]
                if distances[p] <= radius and labels[j] < 0:
                    labels[j] = clusters
                    # A border point takes the label and stops there: only core points pass it on.
                    if core[j]:
                        stack[depth] = j
                        depth += 1
        clusters += 1
    return labels


def dbscan(graph: SparseRows, radius: float, min_samples: int) -> Int32[np.ndarray, " n"]:
    """Density clusters: connected core points, and the border points the first of them reaches.

    Linear in the number of edges. Numbers are scikit-learn's: clusters by their core point of lowest index, a border
    point to the first cluster that reaches it.

    Args:
        graph: symmetric, every pair within `radius` at least, an image's entry for itself included.
        radius: largest distance of a neighbour, compared in float32 as scikit-learn compares a float32 matrix.
        min_samples: neighbours, the image itself among them, that make a core point.

    Returns:
        Clusters from 0, noise -1.

    Raises:
        ConfigError: `min_samples` below 1.
    """
    if min_samples < 1:
        raise ConfigError(f"dbscan: min_samples={min_samples} must be at least 1")
    return _label(*graph, np.float32(radius), min_samples)
