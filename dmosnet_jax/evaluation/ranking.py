"""CMC, mAP and mINP of a ranking, by blocks of queries.

The protocol of Market-1501 (Zheng et al. 2015), which the other datasets share: gallery images of the query's identity
from the query's own camera are junk and taken out of its ranking; a query without a match elsewhere is skipped and not
counted, and so is one whose identity is not known (negative). Average precision is the mean of the precision at the
matches; the inverse negative penalty (Ye et al. 2021, as in fast-reid) is the number of matches over the rank of the
last one.

A ranking is by rising distance, equal distances by gallery index (a stable sort). No row is ever sorted: the rank of a
match is one more than the number of images before it, and one pass over the row counts those for all matches together.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64, Integer

from dmosnet_jax.core import arguments
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.kernels import jit, map_rows
from dmosnet_jax.evaluation import distances

BLOCK = 1024


@dataclass(frozen=True)
class Ranking:
    """Result of `evaluate`. Scores are fractions; fields can be read as attributes or by name, `ranking["mAP"]`.

    Attributes:
        mAP: mean average precision.
        rank1: share of valid queries whose first image is a match; rank5 and rank10 likewise.
        mINP: mean inverse negative penalty.
        num_query: queries.
        num_valid_query: queries with a match, which the scores are means over.
        num_gallery: gallery images.
        cmc: cumulative matching characteristic.
        average_precision: NaN for queries without a match.
        first_match: rank from 1 of the first match, 0 for queries without one.
    """

    mAP: float  # noqa: N815 - the field of results.json
    rank1: float
    rank5: float
    rank10: float
    mINP: float  # noqa: N815 - the field of results.json
    num_query: int
    num_valid_query: int
    num_gallery: int
    cmc: Float64[np.ndarray, " max_rank"]
    average_precision: Float64[np.ndarray, " q"]
    first_match: Int64[np.ndarray, " q"]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def results(self) -> dict[str, float | int]:
        """The fields of `results.json`."""
        return {name: value for name, value in asdict(self).items() if not isinstance(value, np.ndarray)}


@dataclass(frozen=True)
class CameraPairs:
    """Result of `camera_pairs`: a row for each query camera, a column for each gallery camera.

    Attributes:
        query_cameras: rising.
        gallery_cameras: rising.
        mean_ap: fractions; NaN where no query has a match.
        queries: those with a match, which `mean_ap` is the mean over.
    """

    query_cameras: Int64[np.ndarray, " q"]
    gallery_cameras: Int64[np.ndarray, " g"]
    mean_ap: Float64[np.ndarray, "q g"]
    queries: Int64[np.ndarray, "q g"]


@dataclass(frozen=True)
class RankingLists:
    """The first gallery images of some queries, for rank-list figures.

    Attributes:
        queries: rows of the query set.
        indices: gallery rows in ranking order; -1 where fewer are left.
        distances: NaN where fewer are left.
        match: same identity from another camera.
        junk: same identity from the same camera.
    """

    queries: Int64[np.ndarray, " m"]
    indices: Int64[np.ndarray, "m top"]
    distances: Float32[np.ndarray, "m top"]
    match: Bool[np.ndarray, "m top"]
    junk: Bool[np.ndarray, "m top"]


@jit()
def _rank_matches(distance, query0, query_ids, query_cams, gallery_ids, gallery_cams, start, stop, scores, first, inp):
    """Average precision, rank of the first match (0: none) and inverse negative penalty of the block's rows."""
    gallery = gallery_ids.shape[0]
    near = np.empty(gallery, distance.dtype)
    where = np.empty(gallery, np.int64)
    for r in range(start, stop):
        query = query0 + r
        count = 0
        # Nobody knows who matches a query without an identity.
        for g in range(gallery if query_ids[query] >= 0 else 0):
            if gallery_ids[g] == query_ids[query] and gallery_cams[g] != query_cams[query]:
                near[count] = distance[r, g]
                where[count] = g
                count += 1
        first[query] = 0
        if count == 0:
            continue
        # A stable sort of matches that were found by rising index orders ties by index.
        order = np.argsort(near[:count], kind="mergesort")
        sorted_near, sorted_where = near[:count][order], where[:count][order]
        before = np.zeros(count + 1, np.int64)
        for g in range(gallery):
            value = distance[r, g]
            # Most of the gallery is further than the last match and done with here. So are images of the query's
            # identity: matches, counted below, and junk, from its own camera, which takes no place in the ranking.
            if value > sorted_near[count - 1] or gallery_ids[g] == query_ids[query]:
                continue
            low, high = 0, count
            while low < high:
                middle = (low + high) // 2
                if value < sorted_near[middle] or (value == sorted_near[middle] and g < sorted_where[middle]):
                    high = middle
                else:
                    low = middle + 1
            before[low] += 1
        ahead, total = 0, 0.0
        for m in range(count):
            ahead += before[m]
            total += (m + 1) / (ahead + m + 1)
            if m == 0:
                first[query] = ahead + 1
        scores[query] = total / count
        inp[query] = count / (ahead + count)


def checked_labels(
    query_ids: np.ndarray, gallery_ids: np.ndarray, query_cams: np.ndarray, gallery_cams: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The labels as int64, in the same order.

    Raises:
        DataError: they are no vectors of whole numbers, or ids and cameras do not pair up.
    """
    given = {"query ids": query_ids, "gallery ids": gallery_ids, "query cameras": query_cams}
    given["gallery cameras"] = gallery_cams
    arrays = tuple(arguments.integers(f"evaluation: {name}", values) for name, values in given.items())
    q_ids, g_ids, q_cams, g_cams = arrays
    if q_ids.shape != q_cams.shape or g_ids.shape != g_cams.shape:
        raise DataError(
            f"evaluation: ids and cameras do not pair up: query {q_ids.shape} and {q_cams.shape}, "
            f"gallery {g_ids.shape} and {g_cams.shape}"
        )
    return arrays


def evaluate(
    query_features: Float[np.ndarray, "q d"] | None,
    gallery_features: Float[np.ndarray, "g d"] | None,
    query_ids: Integer[np.ndarray, " q"],
    gallery_ids: Integer[np.ndarray, " g"],
    query_cams: Integer[np.ndarray, " q"],
    gallery_cams: Integer[np.ndarray, " g"],
    *,
    metric: str = "cosine",
    max_rank: int = 50,
    distance: distances.Distance | None = None,
    block: int = BLOCK,
    threads: int | None = None,
) -> Ranking:
    """CMC, mAP and mINP of every query against the gallery.

    Args:
        query_features: None when `distance` is given, as `gallery_features`.
        gallery_features: of the same length.
        query_ids: identities; -1 where unknown.
        gallery_ids: likewise.
        query_cams: cameras.
        gallery_cams: likewise.
        metric: "cosine" (features are L2-normalised here) or "euclidean" (features as they are).
        max_rank: length of the CMC curve.
        distance: distances instead of features, or a function from (start, stop) to those of the queries between.
        block: queries per block; no more distances are held at a time.
        threads: worker threads, default all cores.

    Returns:
        `Ranking`.

    Raises:
        DataError: shapes that do not fit, features or distances that are not finite, or no query with a match.
        ConfigError: unknown metric, or a setting out of range.
    """
    max_rank = arguments.count("evaluation: max_rank", max_rank)
    labels = checked_labels(query_ids, gallery_ids, query_cams, gallery_cams)
    queries, gallery = labels[0].shape[0], labels[1].shape[0]
    source = distances.source(query_features, gallery_features, metric, distance)
    precision, first, penalty = _scores(source, labels, block=block, threads=threads)
    valid = first > 0
    if not valid.any():
        raise DataError(
            f"evaluation: none of {queries} queries has an image of the same identity from another camera among "
            f"{gallery} gallery images; check that query and gallery belong together and that cameras are read"
        )
    ranks = np.bincount(np.minimum(first[valid], max_rank + 1), minlength=max_rank + 2)[1 : max_rank + 1]
    cmc = ranks.cumsum() / valid.sum()
    return Ranking(
        mAP=float(precision[valid].mean()),
        rank1=float((first[valid] <= 1).mean()),
        rank5=float((first[valid] <= 5).mean()),
        rank10=float((first[valid] <= 10).mean()),
        mINP=float(penalty[valid].mean()),
        num_query=queries,
        num_valid_query=int(valid.sum()),
        num_gallery=gallery,
        cmc=cmc,
        average_precision=precision,
        first_match=first,
    )


def _scores(
    source: distances.DistanceSource, labels: tuple[np.ndarray, ...], *, block: int, threads: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Average precision (NaN: no match), rank of the first match (0: none) and inverse negative penalty (NaN)."""
    q_ids, g_ids, q_cams, g_cams = labels
    queries = q_ids.shape[0]
    precision, penalty = np.full(queries, np.nan), np.full(queries, np.nan)
    first = np.zeros(queries, np.int64)
    for query0, part in distances.blocks(source, (queries, g_ids.shape[0]), block):

        def rank(start: int, stop: int, query0: int = query0, part: np.ndarray = part) -> None:
            _rank_matches(part, query0, q_ids, q_cams, g_ids, g_cams, start, stop, precision, first, penalty)

        map_rows(rank, len(part), threads=threads, task_rows=64)
    return precision, first, penalty


def camera_pairs(
    query_features: Float[np.ndarray, "q d"],
    gallery_features: Float[np.ndarray, "g d"],
    query_ids: Integer[np.ndarray, " q"],
    gallery_ids: Integer[np.ndarray, " g"],
    query_cams: Integer[np.ndarray, " q"],
    gallery_cams: Integer[np.ndarray, " g"],
    *,
    block: int = BLOCK,
    threads: int | None = None,
) -> CameraPairs:
    """Mean average precision of the queries of each camera in the gallery of each other camera.

    A query is ranked against the images of one gallery camera alone, by cosine, and its average precision is that of
    this ranking; the pair's mAP is the mean over the queries of the one camera that have a match in the other. As
    matches of a query's own camera are junk, no camera is paired with itself.

    Args:
        query_features: L2-normalised here.
        gallery_features: of the same length.
        query_ids: identities; -1 where unknown.
        gallery_ids: likewise.
        query_cams: cameras.
        gallery_cams: likewise.
        block: queries per block; no more distances are held at a time.
        threads: worker threads, default all cores.

    Raises:
        DataError: shapes that do not fit, or features that are not finite.
    """
    q_ids, g_ids, q_cams, g_cams = checked_labels(query_ids, gallery_ids, query_cams, gallery_cams)
    queries, gallery = distances.prepare_pair(query_features, gallery_features, "cosine")
    own, others = np.unique(q_cams), np.unique(g_cams)
    mean, counts = np.full((own.size, others.size), np.nan), np.zeros((own.size, others.size), np.int64)
    for column, camera in enumerate(others):
        images = g_cams == camera
        source = distances.between(queries, gallery[images], "cosine")
        labels = (q_ids, g_ids[images], q_cams, g_cams[images])
        precision, first, _ = _scores(source, labels, block=block, threads=threads)
        for row, query_camera in enumerate(own):
            chosen = (first > 0) & (q_cams == query_camera)
            counts[row, column] = chosen.sum()
            if chosen.any():
                mean[row, column] = precision[chosen].mean()
    return CameraPairs(own, others, mean, counts)


def ranking_lists(
    query_features: Float[np.ndarray, "q d"] | None,
    gallery_features: Float[np.ndarray, "g d"] | None,
    query_ids: Integer[np.ndarray, " q"],
    gallery_ids: Integer[np.ndarray, " g"],
    query_cams: Integer[np.ndarray, " q"],
    gallery_cams: Integer[np.ndarray, " g"],
    *,
    queries: Integer[np.ndarray, " m"],
    top: int = 10,
    keep_junk: bool = False,
    metric: str = "cosine",
    distance: distances.Distance | None = None,
) -> RankingLists:
    """The first gallery images of chosen queries.

    Features, labels, metric and distance are those of `evaluate`.

    Returns:
        Lists of `top` images in the order of `queries`, rows of the query set; junk images are taken out, or flagged
        with `keep_junk`.

    Raises:
        DataError: as `evaluate`, or a row that is not there.
        ConfigError: unknown metric, or `top` below 1.
    """
    q_ids, g_ids, q_cams, g_cams = checked_labels(query_ids, gallery_ids, query_cams, gallery_cams)
    queries = arguments.rows("evaluation: queries", queries, len(q_ids))
    shape = (queries.shape[0], arguments.count("evaluation: top", top))
    indices, values = np.full(shape, -1, np.int64), np.full(shape, np.nan, np.float32)
    match, junk = np.zeros(shape, bool), np.zeros(shape, bool)
    source = distances.source(query_features, gallery_features, metric, distance)
    for row, query in enumerate(queries):
        part = distances.some(source, (len(q_ids), len(g_ids)), query, query + 1)
        same = (g_ids == q_ids[query]) & (q_ids[query] >= 0)
        is_junk = same & (g_cams == q_cams[query])
        order = np.argsort(part[0], kind="stable")
        order = (order if keep_junk else order[~is_junk[order]])[:top]
        count = order.shape[0]
        indices[row, :count], values[row, :count] = order, part[0][order]
        match[row, :count], junk[row, :count] = (same & ~is_junk)[order], is_junk[order]
    return RankingLists(queries, indices, values, match, junk)
