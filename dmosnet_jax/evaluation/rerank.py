"""k-reciprocal re-ranking (Zhong et al. 2017) on sparse rows, equal to the dense `torchreid/utils/rerank.py`.

Queries and gallery together are described by weights over expanded k-reciprocal neighbours, as in the clustering, with
three differences: neighbour lists have k1 + 1 columns, the image itself besides k1 others; weights are a softmax of the
negative squared distance over the row's largest one; and the Jaccard distance of a query is mixed with that normalised
distance. The reference squares the distance it is given, which for "euclidean" is a squared one already. Cosine and
Euclidean distances of unit features give the same result: they differ by a factor, which the normalisation removes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from dmosnet_jax.core import arguments
from dmosnet_jax.evaluation.distances import distance_block, prepare_pair
from dmosnet_jax.memory.clustering import jaccard, neighbours


@dataclass(frozen=True)
class Reranked:
    """Re-ranked distances, computed a block of queries at a time; `ranking.evaluate` takes it as its `distance`.

    Attributes:
        features: queries first.
        weights: their descriptions.
        inverted: inverted index of the weights.
        largest: largest squared distance of each row.
        num_query: Q.
        lambda_value: share of the original distance.
        metric: metric of the original distance.
        threads: worker threads.
    """

    features: Float32[np.ndarray, "n d"]
    weights: jaccard.SparseRows
    inverted: jaccard.SparseRows
    largest: Float32[np.ndarray, " n"]
    num_query: int
    lambda_value: float
    metric: str
    threads: int | None = None

    def __call__(self, start: int, stop: int) -> Float32[np.ndarray, "q g"]:
        """Distances of the queries `start..stop`."""
        rows = np.arange(start, min(stop, self.num_query))
        original = distance_block(self.features[rows], self.features[self.num_query :], self.metric) ** 2
        original /= self.largest[rows, None]
        shared = jaccard.distance_rows(self.weights, rows, inverted=self.inverted, threads=self.threads)
        final = shared[:, self.num_query :] * np.float32(1 - self.lambda_value)
        final += original * np.float32(self.lambda_value)
        return final

    def dense(self) -> Float32[np.ndarray, "q g"]:
        """All distances."""
        return self(0, self.num_query)


def rerank(
    query_features: Float[np.ndarray, "q d"],
    gallery_features: Float[np.ndarray, "g d"],
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    metric: str = "cosine",
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Reranked:
    """Prepares re-ranked distances between queries and gallery.

    Args:
        query_features: of the queries.
        gallery_features: of the gallery.
        k1: neighbours of the k-reciprocal sets, besides the image itself.
        k2: neighbours of query expansion, the image itself included.
        lambda_value: share of the original distance in the result, 0 to 1.
        metric: "cosine" (features are L2-normalised here) or "euclidean".
        threads: worker threads, default all cores.
        progress: called with the finished fraction of the neighbour search, which takes most of the time.

    Returns:
        `Reranked`, to give to `ranking.evaluate(..., distance=...)`.

    Raises:
        ConfigError: a setting out of range.
        DataError: features that are not finite, empty, or of different lengths.
    """
    k1, k2 = (arguments.count(f"re-ranking: {name}", value) for name, value in (("k1", k1), ("k2", k2)))
    lambda_value = arguments.number("re-ranking: lambda_value", lambda_value, low=0, high=1)
    queries, gallery = prepare_pair(query_features, gallery_features, metric)
    features = np.concatenate([queries, gallery])
    half_norms = None if metric == "cosine" else np.einsum("nd,nd->n", features, features) / np.float32(2)
    found = neighbours.search_host(
        features, max(k1 + 1, k2), half_norms=half_norms, farthest=True, threads=threads, progress=progress
    )
    assert found.farthest is not None
    largest = np.maximum(_distance(found.farthest, metric) ** 2, np.finfo(np.float32).tiny)
    indptr, indices = jaccard.reciprocal_sets(found.indices, k1 + 1, jaccard.half_k(k1), threads=threads)
    scores = jaccard.pair_products(features, indptr, indices, threads=threads)
    row = np.repeat(np.arange(features.shape[0]), np.diff(indptr))
    if half_norms is not None:
        scores -= half_norms[row] + half_norms[indices]
    exponents = -(_distance(scores, metric) ** 2) / largest[row]
    weights = jaccard.softmax_rows(indptr, indices, exponents, threads=threads)
    weights = jaccard.expand_queries(weights, found.indices, k2, threads=threads)
    return Reranked(
        features, weights, jaccard.invert(weights), largest, queries.shape[0], lambda_value, metric, threads
    )


def _distance(scores: np.ndarray, metric: str) -> np.ndarray:
    """Distances of the search's scores: cosine similarities, or minus half the squared Euclidean distance."""
    return np.float32(1) - scores if metric == "cosine" else np.float32(-2) * scores
