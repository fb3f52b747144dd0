"""Distances between query and gallery features, by blocks of queries."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Float32

from dmosnet_jax.core import arguments
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.unit import unit_rows_np

METRICS = ("cosine", "euclidean")
# (start, stop) -> float [stop - start, G], the distances of those queries.
DistanceSource = Callable[[int, int], np.ndarray]
Distance = Float[np.ndarray, "q g"] | DistanceSource


def prepare(features: np.ndarray, metric: str, name: str) -> Float32[np.ndarray, "n d"]:
    """Checked features, L2-normalised for the cosine metric.

    Raises:
        ConfigError: unknown metric.
        DataError: not a matrix, empty, or values that are not finite; gives `name`.
    """
    if metric not in METRICS:
        raise ConfigError(f"evaluation: metric={metric!r} is unknown; use one of {', '.join(METRICS)}")
    features = arguments.matrix(f"evaluation: {name} features", features)
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if bad.size:
        raise DataError(
            f"evaluation: {bad.size} {name} features are not finite, the first is row {bad[0]}; "
            "the network has diverged or the checkpoint is damaged: evaluate an earlier checkpoint"
        )
    return unit_rows_np(features) if metric == "cosine" else features


def prepare_pair(
    query_features: np.ndarray, gallery_features: np.ndarray, metric: str
) -> tuple[Float32[np.ndarray, "q d"], Float32[np.ndarray, "g d"]]:
    """`prepare` for both sets, which must have features of one length (DataError)."""
    queries, gallery = prepare(query_features, metric, "query"), prepare(gallery_features, metric, "gallery")
    if queries.shape[1] != gallery.shape[1]:
        raise DataError(
            f"evaluation: query features have {queries.shape[1]} values, gallery features {gallery.shape[1]}; "
            "extract both with the same model"
        )
    return queries, gallery


def distance_block(
    queries: Float32[np.ndarray, "q d"], gallery: Float32[np.ndarray, "g d"], metric: str
) -> Float32[np.ndarray, "q g"]:
    """Distances of prepared features: 1 - cosine, or the squared Euclidean distance."""
    product = queries @ gallery.T
    if metric == "cosine":
        return np.subtract(np.float32(1), product, out=product)
    product *= np.float32(-2)
    product += np.einsum("qd,qd->q", queries, queries)[:, None]
    product += np.einsum("gd,gd->g", gallery, gallery)[None, :]
    return product


def source(
    query_features: np.ndarray | None, gallery_features: np.ndarray | None, metric: str, distance: Distance | None
) -> DistanceSource:
    """The function (start, stop) -> distances of those queries, from whatever the caller has."""
    if callable(distance):
        return distance
    if distance is not None:
        given = arguments.numbers("evaluation: distances", distance, shape="queries, gallery")
        return lambda start, stop: given[start:stop]
    if query_features is None or gallery_features is None:
        raise ConfigError("evaluation: give query and gallery features, or a distance")
    return between(*prepare_pair(query_features, gallery_features, metric), metric)


def between(queries: Float32[np.ndarray, "q d"], gallery: Float32[np.ndarray, "g d"], metric: str) -> DistanceSource:
    """The function (start, stop) -> distances of those queries, from prepared features."""
    return lambda start, stop: distance_block(queries[start:stop], gallery, metric)


def blocks(source: DistanceSource, shape: tuple[int, int], block: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first query, checked distances [b, G]) for one block of queries after the other."""
    for start in range(0, shape[0], arguments.count("evaluation: block", block)):
        yield start, some(source, shape, start, min(start + block, shape[0]))


def some(source: DistanceSource, shape: tuple[int, int], start: int, stop: int) -> Float[np.ndarray, "b g"]:
    """Checked distances of the queries from `start` to `stop`.

    Raises:
        DataError: they are of another shape, or not finite.
    """
    what = f"evaluation: distances of queries {start} to {stop - 1}"
    part = arguments.numbers(what, source(start, stop))
    if part.shape != (stop - start, shape[1]):
        raise DataError(f"{what} have shape {part.shape}; there are {shape[0]} query and {shape[1]} gallery labels")
    if not np.isfinite(part.min(initial=0) + part.max(initial=0)):
        raise DataError(f"{what} are not finite; check the features")
    return part
