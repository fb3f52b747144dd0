"""Features on the two axes along which they differ most, and which images a picture of them shows."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, Integer

from dmosnet_jax.core.errors import DataError

AXES = 2


class Projection(NamedTuple):
    """Result of `project`.

    Attributes:
        points: places on the first axes of a principal component analysis.
        shares: of the variance of all features, that along each axis.
    """

    points: Float32[np.ndarray, "n axes"]
    shares: Float64[np.ndarray, " axes"]


def project(features: Float[np.ndarray, "n d"]) -> Projection:
    """Principal component analysis of features as they are: `distances.prepare` makes them of unit length.

    The value of largest size in the direction of an axis is positive, so that a picture does not flip from run to run.

    Raises:
        DataError: features of one value, which have no two axes.
    """
    if features.shape[1] < AXES:
        raise DataError(f"embedding map: features have {features.shape[1]} value, which has no {AXES} axes")
    centred = features - features.mean(axis=0, dtype=np.float64).astype(np.float32)
    variances, directions = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    chosen = directions[:, ::-1][:, :AXES]
    largest = np.abs(chosen).argmax(axis=0)
    chosen = chosen * np.sign(chosen[largest, np.arange(AXES)])
    total = variances.clip(0).sum()
    shares = variances[::-1][:AXES].clip(0) / (total if total > 0 else 1.0)
    return Projection((centred @ chosen.astype(np.float32)).astype(np.float32), shares)


def some_identities(ids: Integer[np.ndarray, " n"], most: int, each: int = 12) -> Int64[np.ndarray, " m"]:
    """Rows of some identities, spread evenly over the identities, and over the images of each.

    Identities of one image, distractors (0) and unknown ones (negative) are left out.

    Args:
        ids: identities.
        most: rows at most; as many identities are taken as they hold.
        each: rows at most of an identity.

    Returns:
        Rows by identity.
    """
    found, counts = np.unique(ids, return_counts=True)
    usable, sizes = (values[(counts > 1) & (found > 0)] for values in (found, np.minimum(counts, each)))
    for number in range(min(usable.size, most // 2), 0, -1):
        chosen = _evenly(usable.size, number)
        if sizes[chosen].sum() <= most:
            rows = [np.flatnonzero(ids == identity) for identity in usable[chosen]]
            return np.concatenate([own[_evenly(own.size, min(own.size, each))] for own in rows])
    return np.zeros(0, np.int64)


def _evenly(size: int, count: int) -> np.ndarray:
    return np.linspace(0, size - 1, count).round().astype(np.int64)
