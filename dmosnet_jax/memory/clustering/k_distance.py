"""What to tell a user whose radius finds too few clusters: the k-distance curve, and the radius that it suggests."""

import numpy as np
from jaxtyping import Int

from dmosnet_jax.core.errors import UserError
from dmosnet_jax.memory.clustering import jaccard

_PROBES = 512
_PROBE_CELLS = 2**26  # distances of probes at once


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


def check_clusters(
    clusters: Int[np.ndarray, " n"], weights: jaccard.SparseRows, eps: float, min_samples: int, min_clustered: float
) -> None:
    """Raises TooFewClusteredError unless a share of the images is in clusters of more than one.

    Args:
        clusters: DBSCAN's labels.
        weights: from `jaccard.reciprocal_weights`.
        eps: the radius.
        min_samples: images that make a core point.
        min_clustered: the share; one cluster there must be in any case.
    """
    # A cluster may be one image: with min_samples=1, or when earlier clusters took all its border points.
    sizes = np.bincount(clusters + 1)[1:]
    images, inside = clusters.shape[0], int(sizes[sizes > 1].sum())
    if inside and inside >= min_clustered * images:
        return
    found, wanted = f"not one cluster among {images} images", ""
    if inside:
        found = f"only {inside} of {images} images ({inside / images:.2%}) are in clusters"
        wanted = f", fewer than min_clustered={min_clustered:g}"
    reaches = _reaches(weights, min_samples)
    advice = _advice(reaches, images, eps, min_samples)
    message = f"clustering: {found} at eps={eps:g}, min_samples={min_samples}{wanted}; {advice}"
    raise TooFewClusteredError(message, reaches, eps, min_samples)


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
    """What radius would cluster half of the images."""
    if not reaches.size:
        return f"there are only {images} images and min_samples is {min_samples}: lower min_samples or add images"
    reach = float(np.median(reaches))
    if reach <= eps or reach > 0.95:
        return (
            "the images share almost no neighbours: check the features (a trained or pre-trained network?), "
            "or raise k1 or lower min_samples"
        )
    return f"half of the images have {min_samples} images (themselves included) within {reach:.2f}: set eps near that"
