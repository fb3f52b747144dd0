"""What the report shows: worst and typical queries, pairs of cameras, the embeddings' map, clusters in pictures."""

import dataclasses
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, Integer

from dmosnet_jax.data.splits import Rows
from dmosnet_jax.evaluation import distances, ranking
from dmosnet_jax.evaluation.principal import project, some_identities
from dmosnet_jax.evaluation.report import Clusters, ClusterSheet, EmbeddingMap, MapPoint, RankItem, RankList

TOP = 10
# Every point has a picture in the page; a table of more cameras than these says nothing.
MAP_POINTS, MOST_CAMERAS = 240, 30
# Lists of each kind that have activation maps: a network has to see their images once more.
MAPPED = 4

# From encoded images to their activation maps, float32 [n, h, w].
Maps = Callable[[Sequence[Any]], np.ndarray]


def worst_and_typical(
    average_precision: Float[np.ndarray, " q"], count: int
) -> tuple[Int64[np.ndarray, " worst"], Int64[np.ndarray, " typical"]]:
    """Queries of the lowest average precision, and such from the middle half, spread evenly over it.

    Args:
        average_precision: NaN for queries without a match, which are not chosen.
        count: how many of each; fewer where there are not so many.

    Returns:
        Rows by rising average precision, equal ones by row; none is in both.
    """
    order = np.argsort(average_precision, kind="stable")[: np.isfinite(average_precision).sum()]
    worst = order[:count]
    middle = np.unique(np.linspace(0.25 * (order.size - 1), 0.75 * (order.size - 1), count).round().astype(np.int64))
    return worst, order[middle[middle >= worst.size]] if order.size else order


def rank_lists(
    query: Rows,
    gallery: Rows,
    query_features: Float[np.ndarray, "q d"],
    gallery_features: Float[np.ndarray, "g d"],
    found: ranking.Ranking,
    *,
    count: int,
    maps: Maps | None = None,
) -> dict[str, list[RankList]]:
    """Rank-10 lists of the worst queries and of typical ones, each followed by its first match where that is not in it.

    Args:
        query: the query images.
        gallery: the gallery images.
        query_features: as they were ranked, by cosine.
        gallery_features: likewise.
        found: the ranking.
        count: how many of each kind.
        maps: gives the first lists of each kind activation maps.

    Raises:
        DataError: a record can't be read.
    """
    headings = "Worst queries, by average precision", "Typical queries, of the middle half by average precision"
    labels = query.pids, gallery.pids, query.camids, gallery.camids
    lists: dict[str, list[RankList]] = {}
    for heading, queries in zip(headings, worst_and_typical(found.average_precision, count), strict=True):
        firsts = found.first_match[queries].tolist()
        top = max(TOP, *firsts, 0)
        ranked = ranking.ranking_lists(query_features, gallery_features, *labels, queries=queries, top=top)
        lists[heading] = []
        for place, (row, first) in enumerate(zip(queries.tolist(), firsts, strict=True)):
            ranks = [*range(1, TOP + 1), *([first] if first > TOP else [])]
            note = f"Average precision {100 * found.average_precision[row]:.2f} %, first true match at rank {first:,}"
            items = _items(gallery, ranked, place, ranks)
            lists[heading].append(RankList(query.record(row).image, _caption(query, row), items, note))
    return lists if maps is None else _mapped(lists, maps)


def _mapped(lists: dict[str, list[RankList]], maps: Maps) -> dict[str, list[RankList]]:
    """The lists, the first of each kind with activation maps."""
    chosen = [entry for entries in lists.values() for entry in entries[:MAPPED]]
    images = [image for entry in chosen for image in (entry.query, *(item.image for item in entry.items))]
    left: Iterator[np.ndarray] = iter(maps(images) if images else ())

    def filled(entry: RankList) -> RankList:
        query = next(left)
        items = [dataclasses.replace(item, activation=next(left)) for item in entry.items]
        return dataclasses.replace(entry, query_activation=query, items=items)

    return {heading: [*map(filled, entries[:MAPPED]), *entries[MAPPED:]] for heading, entries in lists.items()}


def _items(gallery: Rows, ranked: ranking.RankingLists, place: int, ranks: Sequence[int]) -> list[RankItem]:
    """Those ranks (from 1) of a list, as far as there are images."""
    items = []
    for rank in ranks:
        row = int(ranked.indices[place, rank - 1])
        if row >= 0:
            caption = f"{1 - ranked.distances[place, rank - 1]:.3f}, {_caption(gallery, row)}"
            items.append(RankItem(gallery.record(row).image, caption, bool(ranked.match[place, rank - 1]), rank))
    return items


def _caption(split: Rows, row: int, more: Sequence[str] = ()) -> str:
    name = posixpath.basename(split.record(row).filename)
    known = [f"id {split.pids[row]}"] if split.pids[row] >= 0 else []
    return ", ".join([*known, f"camera {split.camids[row]}", *more, name])


# Of the kinds of clusters in `memory.cluster_summary.summary`.
_KINDS = {
    "largest": "Largest clusters",
    "tightest": "Tightest clusters, by the mean cosine of their pairs, of the larger half",
    "mixed": "Most mixed clusters, by images of others than their most frequent identity",
    "loosest": "Loosest clusters, by the mean cosine of their pairs, of the larger half",
}


def cluster_part(images: Rows, summary: Mapping[str, Any], epoch: int) -> Clusters:
    """Sizes of the clusters and sheets of some of them; only the images that are shown are read.

    Args:
        images: those that were clustered.
        summary: see `memory.cluster_summary.summary`.
        epoch: that they were trained on in, from 1.

    Raises:
        DataError: a record can't be read.
    """
    count = sum(number for _, number in summary["sizes"])
    outside, images_in_all = summary["unclustered"], summary["images"]
    note = f"Clusters of epoch {epoch}: {count:,}; un-clustered images: {outside:,} of {images_in_all:,}."
    if summary["pure"] is not None:
        note += f" {100 * summary['pure']:.1f} % of the clusters have images of one identity alone."
        note += " ✓: the identity of most of a cluster's images; ✗: another."
    note += " Images from the nearest to a cluster's centroid to the farthest."
    sizes = [(f"{low:,} to {2 * low - 1:,}", number) for low, number in summary["sizes"]]
    sheets = {
        _KINDS[kind]: [_sheet(images, example) for example in examples]
        for kind, examples in summary["examples"].items()
    }
    return Clusters(note, sizes, sheets)


def _sheet(images: Rows, example: Mapping[str, Any]) -> ClusterSheet:
    note = f"images: {example['size']:,}, mean cosine: {example['similarity']:.3f}"
    if example["identities"]:
        note += (
            f", identities: {example['identities']:,}, images not of the most frequent one: {example['strangers']:,}"
        )
    items = []
    for row in example["rows"]:
        pid = int(images.pids[row])
        match = None if pid < 0 or not example["identities"] else pid == example["identity"]
        items.append(RankItem(images.record(row).image, _caption(images, row), match))
    return ClusterSheet(note, items)


def camera_table(
    query_features: Float[np.ndarray, "q d"],
    gallery_features: Float[np.ndarray, "g d"],
    query_ids: Integer[np.ndarray, " q"],
    gallery_ids: Integer[np.ndarray, " g"],
    query_cams: Integer[np.ndarray, " q"],
    gallery_cams: Integer[np.ndarray, " g"],
) -> ranking.CameraPairs | None:
    """`ranking.camera_pairs`, or None where there are more cameras than a table shows."""
    if max(np.unique(cameras).size for cameras in (query_cams, gallery_cams)) > MOST_CAMERAS:
        return None
    return ranking.camera_pairs(query_features, gallery_features, query_ids, gallery_ids, query_cams, gallery_cams)


def embedding_map(
    query: Rows,
    gallery: Rows,
    query_features: Float[np.ndarray, "q d"],
    gallery_features: Float[np.ndarray, "g d"],
    *,
    most: int = MAP_POINTS,
) -> EmbeddingMap | None:
    """Images of some identities, on the principal axes of all images.

    Args:
        query: the query images.
        gallery: the gallery images.
        query_features: L2-normalised here.
        gallery_features: likewise.
        most: points.

    Returns:
        The map, or None where no identity has two images.

    Raises:
        DataError: a record can't be read.
    """
    features = np.concatenate(distances.prepare_pair(query_features, gallery_features, "cosine"))
    ids = np.concatenate([query.pids, gallery.pids])
    rows = some_identities(ids, most)
    if not rows.size:
        return None
    projected = project(features)
    points = []
    for row in rows.tolist():
        split, own = (query, row) if row < len(query) else (gallery, row - len(query))
        points.append(
            MapPoint(
                split.record(own).image,
                _caption(split, own, [split.split]),
                (float(projected.points[row, 0]), float(projected.points[row, 1])),
                int(split.camids[own]),
                int(split.pids[own]),
            )
        )
    chosen = f"{np.unique(ids[rows]).size:,} identities"
    note = f"{rows.size:,} of the {ids.size:,} images: of {chosen} that are spread over the data set."
    return EmbeddingMap(points, (float(projected.shares[0]), float(projected.shares[1])), note)
