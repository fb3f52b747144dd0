"""What a query's feature is made of beside the query image: more images of the person, and near ones of the gallery.

Both give features of unit length for the cosine, so that they take the place of the query's own before any ranking.
"""

import numpy as np
from jaxtyping import Float, Float32, Int64, Integer

from dmosnet_jax.core import arguments
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.evaluation import distances
from dmosnet_jax.evaluation.ranking import BLOCK


def same_person_and_camera(
    query_ids: Integer[np.ndarray, " q"],
    query_cams: Integer[np.ndarray, " q"],
    ids: Integer[np.ndarray, " n"],
    cams: Integer[np.ndarray, " n"],
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " q"]]:
    """Groups images by identity and camera.

    Args:
        query_ids: identities of the queries; -1 where unknown.
        query_cams: their cameras.
        ids: identities of the images.
        cams: their cameras.

    Returns:
        `(image_group, query_group)`: the group of each image and of each query, -1 for those without an identity.

    Raises:
        DataError: labels that are no whole numbers, or do not pair up.
    """
    given = {"query ids": query_ids, "ids": ids, "query cameras": query_cams, "cameras": cams}
    query_ids, ids, query_cams, cams = (arguments.integers(f"queries: {name}", some) for name, some in given.items())
    if len(query_ids) != len(query_cams) or len(ids) != len(cams):
        raise DataError(
            f"queries: ids and cameras do not pair up: {len(query_ids)} and {len(query_cams)} of queries, {len(ids)} "
            f"and {len(cams)} of images"
        )
    labels = np.stack([np.concatenate([query_ids, ids]), np.concatenate([query_cams, cams])], axis=1)
    group = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    group[labels[:, 0] < 0] = -1
    return group[len(query_ids) :], group[: len(query_ids)]


def multi_query(
    query_features: Float[np.ndarray, "q d"],
    query_ids: Integer[np.ndarray, " q"],
    query_cams: Integer[np.ndarray, " q"],
    features: Float[np.ndarray, "n d"],
    ids: Integer[np.ndarray, " n"],
    cams: Integer[np.ndarray, " n"],
) -> Float32[np.ndarray, "q d"]:
    """Features of Market-1501's multiple queries (Zheng et al. 2015) by average pooling.

    Args:
        query_features: of the query images.
        query_ids: their identities; -1 where unknown.
        query_cams: their cameras.
        features: of the images that are pooled; the query images are not among them unless they are given here too.
        ids: their identities.
        cams: their cameras.

    Returns:
        For each query the mean of the unit features of all images of its identity from its camera, scaled to unit
        length; its own unit feature where there are none.

    Raises:
        DataError: features that are not finite, empty, or of different lengths, or labels that do not fit them.
    """
    own, units = distances.prepare_pair(query_features, features, "cosine")
    image_group, query_group = same_person_and_camera(query_ids, query_cams, ids, cams)
    if (len(query_group), len(image_group)) != (len(own), len(units)):
        raise DataError(
            f"multiple queries: features of {len(own)} queries and {len(units)} images, identities of "
            f"{len(query_group)} and {len(image_group)}; each image needs one"
        )
    known = image_group >= 0
    sums = np.zeros((max(image_group.max(), query_group.max()) + 1, own.shape[1]), np.float64)
    np.add.at(sums, image_group[known], units[known])
    pooled = (query_group >= 0) & np.isin(query_group, image_group)
    result = own.copy()
    result[pooled] = unit_rows_np(sums[query_group[pooled]])
    return result


def expand(
    query_features: Float[np.ndarray, "q d"],
    gallery_features: Float[np.ndarray, "g d"],
    *,
    neighbours: int,
    alpha: float = 0.0,
    block: int = BLOCK,
) -> Float32[np.ndarray, "q d"]:
    """Query expansion: to each query its nearest gallery images are added.

    Average query expansion (Chum et al. 2007) weights all alike, alpha query expansion (Radenovic et al., "Fine-tuning
    CNN image retrieval with no human annotation", 2018) by the similarity to the power of alpha, 3 there. The query's
    own weight is 1. No label decides what is near: images of the query's own camera take part.

    Args:
        query_features: L2-normalised here.
        gallery_features: likewise.
        neighbours: gallery images that are added, equal ones by index.
        alpha: power of the similarity (of 0 where it is negative); 0 weights all alike.
        block: queries per block; no more distances are held at a time.

    Returns:
        Features of unit length.

    Raises:
        ConfigError: no neighbours, more than there are, or a negative alpha.
        DataError: features that are not finite, empty, or of different lengths.
    """
    queries, gallery = distances.prepare_pair(query_features, gallery_features, "cosine")
    # As many as the gallery has.
    neighbours = arguments.count("query expansion: neighbours", neighbours, most=len(gallery))
    alpha = arguments.number("query expansion: alpha", alpha, low=0)
    expanded = np.empty_like(queries)
    source = distances.between(queries, gallery, "cosine")
    for query0, part in distances.blocks(source, (len(queries), len(gallery)), block):
        for number, row in enumerate(part, query0):
            near = np.flatnonzero(row <= np.partition(row, neighbours - 1)[neighbours - 1])
            near = near[np.argsort(row[near], kind="stable")[:neighbours]]
            weights = np.maximum(1 - row[near], 0) ** np.float32(alpha)
            expanded[number] = queries[number] + weights @ gallery[near]
    return unit_rows_np(expanded)
