import json

import numpy as np
import pytest

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.evaluation import distances, ranking

LABELS = ("query_ids", "gallery_ids", "query_cams", "gallery_cams")


def sorted_scores(distance, query_ids, gallery_ids, query_cams, gallery_cams):
    """AP, first match and INP of every query with a match, by sorting whole rows."""
    rows = []
    for q in range(len(query_ids)):
        order = np.argsort(distance[q], kind="stable")
        order = order[(gallery_ids[order] != query_ids[q]) | (gallery_cams[order] != query_cams[q])]
        ranks = np.flatnonzero(gallery_ids[order] == query_ids[q]) + 1
        if len(ranks):
            hits = np.arange(1, len(ranks) + 1)
            rows.append(((hits / ranks).mean(), ranks[0], len(ranks) / ranks[-1]))
    return np.array(rows)


def problem(rng, queries=40, gallery=90, ids=9, cams=3, levels=None):
    labels = [rng.integers(0, n, size) for n in (ids, cams) for size in (queries, gallery)]
    labels[0][:3] = ids + 1  # no match anywhere
    labels[1][:5] = -1  # distractors
    distance = rng.random((queries, gallery)).astype(np.float32)
    if levels:
        distance = np.floor(distance * levels) / np.float32(levels)
    return distance, labels


@pytest.mark.parametrize("kind", ["cosine", "euclidean", "distance"])
def test_golden(shared, kind):
    golden = np.load(shared("goldens/evaluation.npz"))
    options = {"distance": golden["distance"]} if kind == "distance" else {"metric": kind}
    result = ranking.evaluate(
        golden["query_features"], golden["gallery_features"], *(golden[name] for name in LABELS), block=37, **options
    )
    assert result.mAP == pytest.approx(golden["mAP"], abs=1e-6)
    assert result.mINP == pytest.approx(golden["mINP"], abs=1e-6)
    np.testing.assert_allclose(result.cmc, golden["cmc"], atol=1e-6)
    assert result.num_valid_query == golden["num_valid_queries"]
    assert (result.num_query, result.num_gallery) == golden["distance"].shape
    assert (result.rank1, result.rank5, result.rank10) == tuple(result.cmc[[0, 4, 9]])


def test_golden_distances(shared):
    golden = np.load(shared("goldens/evaluation.npz"))
    found = distances.distance_block(golden["query_features"], golden["gallery_features"], "euclidean")
    np.testing.assert_allclose(found, golden["distance"], atol=1e-5)


@pytest.mark.parametrize("levels", [None, 1, 4])
@pytest.mark.parametrize("seed", range(5))
def test_equals_sorting_also_with_ties(seed, levels):
    distance, labels = problem(np.random.default_rng(seed), levels=levels)
    result = ranking.evaluate(None, None, *labels, distance=distance, block=7 * seed + 1, max_rank=30)
    expected = sorted_scores(distance, *labels)
    assert result.num_valid_query == len(expected) <= 37
    assert result.mAP == pytest.approx(expected[:, 0].mean(), abs=1e-12)
    assert result.mINP == pytest.approx(expected[:, 2].mean(), abs=1e-12)
    np.testing.assert_allclose(result.cmc, [(expected[:, 1] <= rank).mean() for rank in range(1, 31)], atol=1e-12)
    valid = result.first_match > 0
    np.testing.assert_array_equal(result.first_match[valid], expected[:, 1])
    np.testing.assert_allclose(result.average_precision[valid], expected[:, 0])
    assert np.isnan(result.average_precision[~valid]).all()


def test_distances_come_by_blocks(rng):
    distance, labels = problem(rng)
    asked = []

    def block(start, stop):
        asked.append((start, stop))
        return distance[start:stop]

    by_blocks = ranking.evaluate(None, None, *labels, distance=block, block=16)
    assert asked == [(0, 16), (16, 32), (32, 40)]
    assert by_blocks.results() == ranking.evaluate(None, None, *labels, distance=distance).results()


def test_results_are_the_fields_of_the_contract(rng):
    distance, labels = problem(rng)
    result = ranking.evaluate(None, None, *labels, distance=distance)
    fields = ["mAP", "rank1", "rank5", "rank10", "mINP", "num_query", "num_valid_query", "num_gallery"]
    assert list(json.loads(json.dumps(result.results()))) == fields
    assert result["mAP"] == result.mAP
    assert result["cmc"].shape == (50,)


def test_gallery_shorter_than_the_curve():
    labels = np.arange(2), np.arange(3), np.zeros(2, int), np.ones(3, int)
    result = ranking.evaluate(np.eye(2), np.eye(3)[:, :2], *labels, max_rank=20)
    np.testing.assert_array_equal(result.cmc, np.ones(20))


def test_cosine_ignores_length_and_euclidean_does_not(rng):
    query, gallery = rng.normal(size=(30, 8)), rng.normal(size=(60, 8))
    labels = problem(rng, 30, 60)[1]
    scale = rng.uniform(0.1, 10, (60, 1))
    plain = ranking.evaluate(query, gallery, *labels)
    assert ranking.evaluate(query, gallery * scale, *labels).mAP == pytest.approx(plain.mAP, abs=1e-9)
    euclidean = ranking.evaluate(query, gallery * scale, *labels, metric="euclidean")
    direct = ((query[:, None] - (gallery * scale)[None]) ** 2).sum(axis=2)
    assert euclidean.mAP == pytest.approx(sorted_scores(direct, *labels)[:, 0].mean(), abs=1e-6)


@pytest.mark.parametrize("keep_junk", [False, True])
@pytest.mark.parametrize("source", ["array", "function"])
def test_ranking_lists(rng, keep_junk, source):
    distance, labels = problem(rng, levels=20)
    query_ids, gallery_ids, query_cams, gallery_cams = labels
    chosen = np.array([5, 30, 5, 39])
    given = distance if source == "array" else lambda start, stop: distance[start:stop]
    lists = ranking.ranking_lists(None, None, *labels, queries=chosen, top=12, keep_junk=keep_junk, distance=given)
    for row, q in enumerate(chosen):
        same = gallery_ids == query_ids[q]
        junk = same & (gallery_cams == query_cams[q])
        order = [g for g in np.argsort(distance[q], kind="stable") if keep_junk or not junk[g]][:12]
        np.testing.assert_array_equal(lists.indices[row], order)
        np.testing.assert_array_equal(lists.distances[row], distance[q, order])
        np.testing.assert_array_equal(lists.junk[row], junk[order])
        np.testing.assert_array_equal(lists.match[row], (same & ~junk)[order])


def test_ranking_lists_agree_with_the_scores_and_mark_short_lists(rng):
    query, gallery = rng.normal(size=(20, 6)), rng.normal(size=(15, 6))
    labels = problem(rng, 20, 15, ids=4)[1]
    result = ranking.evaluate(query, gallery, *labels)
    lists = ranking.ranking_lists(query, gallery, *labels, queries=np.arange(20), top=15)
    has = lists.match.any(axis=1)
    np.testing.assert_array_equal(np.where(has, lists.match.argmax(axis=1) + 1, 0), result.first_match)
    junk = (labels[0][:, None] == labels[1]) & (labels[2][:, None] == labels[3])
    np.testing.assert_array_equal((lists.indices < 0).sum(axis=1), junk.sum(axis=1))
    np.testing.assert_array_equal(np.isnan(lists.distances), lists.indices < 0)


@pytest.mark.usefixtures("no_array_checks")
def test_errors(rng):
    distance, labels = problem(rng)
    query, gallery = rng.normal(size=(40, 8)), rng.normal(size=(90, 8))
    with pytest.raises(DataError, match="none of 40 queries"):
        ranking.evaluate(query, gallery, labels[0] + 100, *labels[1:])
    with pytest.raises(ConfigError, match="'manhattan'"):
        ranking.evaluate(query, gallery, *labels, metric="manhattan")
    with pytest.raises(ConfigError, match="features, or a distance"):
        ranking.evaluate(None, gallery, *labels)
    with pytest.raises(DataError, match="same model"):
        ranking.evaluate(query, gallery[:, :4], *labels)
    with pytest.raises(DataError, match="shape"):
        ranking.evaluate(query[:-1], gallery, *labels)
    with pytest.raises(DataError, match="shape"):
        ranking.evaluate(None, None, *labels, distance=distance[:, :-1])
    with pytest.raises(DataError, match="do not pair up"):
        ranking.evaluate(query, gallery, labels[0], labels[1], labels[2][:-1], labels[3])
    with pytest.raises(DataError, match="not empty"):
        ranking.evaluate(query, gallery[:0], labels[0], labels[1][:0], labels[2], labels[3][:0])
    gallery[7, 3] = np.nan
    with pytest.raises(DataError, match="gallery features are not finite, the first is row 7"):
        ranking.evaluate(query, gallery, *labels)
    distance[20, 4] = np.inf
    with pytest.raises(DataError, match="queries 16 to 31 are not finite"):
        ranking.evaluate(None, None, *labels, distance=distance, block=16)


def test_queries_without_identity_are_never_valid_and_match_nobody(rng):
    query_ids, gallery_ids = np.array([-1, 5, -1], np.int32), np.array([-1, 5, -1, -1], np.int32)
    query_cams, gallery_cams = np.zeros(3, np.int32), np.ones(4, np.int32)
    distance = rng.random((3, 4)).astype(np.float32)
    found = ranking.evaluate(None, None, query_ids, gallery_ids, query_cams, gallery_cams, distance=distance)
    assert found["num_valid_query"] == 1
    assert np.isnan(found.average_precision).tolist() == [True, False, True]
    alone = ranking.evaluate(
        None, None, query_ids[1:2], gallery_ids, query_cams[1:2], gallery_cams, distance=distance[1:2]
    )
    assert found["mAP"] == alone["mAP"]
    lists = ranking.ranking_lists(
        None, None, query_ids, gallery_ids, query_cams, gallery_cams, queries=np.arange(3), distance=distance
    )
    assert lists.match.sum() == 1
    with pytest.raises(DataError, match="none of 1 queries"):
        ranking.evaluate(None, None, query_ids[:1], gallery_ids, query_cams[:1], gallery_cams, distance=distance[:1])


def test_camera_pairs_are_rankings_of_one_camera_each(rng):
    _, labels = problem(rng, cams=4)
    first, second = rng.normal(size=(40, 5)).astype(np.float32), rng.normal(size=(90, 5)).astype(np.float32)
    labels[0][-2:] = -1
    labels[2][:] = np.where(labels[2] == 3, 7, labels[2])  # a camera that the gallery has not
    labels[3][labels[3] == 1] = 9  # and one that the queries have not
    found = ranking.camera_pairs(first, second, *labels, block=16)
    assert found.query_cameras.tolist() == [0, 1, 2, 7]
    assert found.gallery_cameras.tolist() == [0, 2, 3, 9]
    unit = [features / np.linalg.norm(features, axis=1, keepdims=True) for features in (first, second)]
    distance = 1 - unit[0] @ unit[1].T
    for row, own in enumerate(found.query_cameras):
        for column, other in enumerate(found.gallery_cameras):
            scores = []
            for query in np.flatnonzero(labels[2] == own):
                images = np.flatnonzero(labels[3] == other)
                order = images[np.argsort(distance[query, images], kind="stable")]
                ranks = np.flatnonzero(labels[1][order] == labels[0][query]) + 1
                if ranks.size and own != other and labels[0][query] >= 0:
                    scores.append(np.mean(np.arange(1, ranks.size + 1) / ranks))
            assert found.queries[row, column] == len(scores)
            if scores:
                assert found.mean_ap[row, column] == pytest.approx(np.mean(scores))
            else:
                assert np.isnan(found.mean_ap[row, column])
