"""Thresholds: equal to counting over all pairs, whatever the blocks, ties and labels."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

import dmosnet_jax
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.evaluation import thresholds

LABELS = ("query_ids", "gallery_ids", "query_cams", "gallery_cams")
RATES = (0.3, 1e-1, 1e-2, 1e-3, 1e-4)


def by_counting(similarity, query_ids, gallery_ids, query_cams, gallery_cams, rates=RATES):
    """Every similarity that occurs is tried as a threshold."""
    person = query_ids[:, None] == gallery_ids[None, :]
    junk = person & (query_cams[:, None] == gallery_cams[None, :])
    same, different = np.sort(similarity[person & ~junk]), np.sort(similarity[~person])
    tried = np.unique(np.concatenate([same, different]))
    far = (different.size - np.searchsorted(different, tried)) / different.size
    frr = np.searchsorted(same, tried) / same.size
    best = np.argmin(np.abs(far - frr))
    rows = []
    for rate in rates:
        allowed = np.flatnonzero(far <= rate)
        threshold = tried[allowed[0]] if allowed.size else np.nextafter(tried[-1], np.float32(2))
        rows.append((rate, (same >= threshold).mean(), threshold))
    return (far[best] + frr[best]) / 2, tried[best], rows, same, different


def assert_equal(found, expected):
    eer, eer_threshold, rows, same, different = expected
    assert found.eer == pytest.approx(eer, abs=1e-12)
    assert found.eer_threshold == pytest.approx(eer_threshold, abs=1e-12)
    assert [(row["far"], row["tar"]) for row in found.tar_at_far] == [pytest.approx(row[:2]) for row in rows]
    np.testing.assert_array_equal([row["threshold"] for row in found.tar_at_far], [row[2] for row in rows])
    # Borders of bins belong to the higher one.
    inner = found.edges[1:-1]
    for counts, values in ((found.same, same), (found.different, different)):
        assert counts.sum() == values.size
        np.testing.assert_array_equal(counts[::-1].cumsum()[-2::-1], [(values >= edge).sum() for edge in inner])


def problem(rng, queries=40, gallery=90, ids=9, levels=None, spread=1.0):
    labels = [rng.integers(0, n, size) for n in (ids, 3) for size in (queries, gallery)]
    labels[0][:3] = ids + 1  # no match anywhere
    labels[1][:5] = -1  # distractors
    distance = (1 - spread + 2 * spread * rng.random((queries, gallery))).astype(np.float32)
    distance[labels[0][:, None] == labels[1][None, :]] *= 0.7
    if levels:
        distance = np.round(distance * levels) / np.float32(levels)
    return distance, labels


@pytest.mark.parametrize(("levels", "spread"), [(None, 1.0), (4, 1.0), (1, 1.0), (None, 1e-3), (None, 1e-6)])
@pytest.mark.parametrize("seed", range(6))
def test_equals_counting_also_with_ties_and_in_few_bins(seed, levels, spread):
    distance, labels = problem(np.random.default_rng(seed), levels=levels, spread=spread)
    found = thresholds.evaluate(None, None, *labels, distance=distance, rates=(1.0, *RATES), block=7 * seed + 1)
    assert_equal(found, by_counting(np.float32(1) - distance, *labels, rates=(1.0, *RATES)))


def test_golden(shared):
    golden = np.load(shared("goldens/evaluation.npz"))
    features = [golden[f"{name}_features"] for name in ("query", "gallery")]
    found = thresholds.evaluate(*features, *(golden[name] for name in LABELS), rates=RATES, block=37)
    units = [unit_rows_np(part) for part in features]
    expected = by_counting(np.float32(1) - (np.float32(1) - units[0] @ units[1].T), *(golden[name] for name in LABELS))
    # Products of other blocks differ in the last digits.
    assert found.eer == pytest.approx(expected[0], abs=1e-4)
    assert found.eer_threshold == pytest.approx(expected[1], abs=1e-5)
    for row, (rate, tar, threshold) in zip(found.tar_at_far, expected[2], strict=True):
        assert (row["far"], row["tar"]) == (rate, pytest.approx(tar, abs=1e-3))
        assert row["threshold"] == pytest.approx(threshold, abs=1e-5)


def test_one_pair_of_each_kind():
    labels = [np.array(part) for part in ([1], [1, 2], [1], [2, 2])]
    found = thresholds.evaluate(None, None, *labels, distance=np.array([[0.25, 0.75]], np.float32))
    assert (found.eer, found.eer_threshold) == (0.0, 0.75)
    assert found.results() == {
        "eer": 0.0,
        "eer_threshold": 0.75,
        "tar_at_far": [{"far": far, "tar": 1.0, "threshold": 0.75} for far in (1e-2, 1e-3, 1e-4)],
    }
    # The other way round no threshold accepts the one without the other.
    turned = thresholds.evaluate(None, None, *labels, distance=np.array([[0.75, 0.25]], np.float32))
    assert (turned.eer, turned.tar_at_far[0]["tar"]) == (1.0, 0.0)
    assert turned.tar_at_far[0]["threshold"] == np.nextafter(np.float32(0.75), np.float32(2))


@pytest.mark.parametrize("gallery_ids", [[1, 1], [2, 3]])
def test_pairs_of_one_kind_only_have_no_threshold(gallery_ids):
    labels = [np.array(part) for part in ([1], gallery_ids, [1], [2, 2])]
    assert thresholds.evaluate(None, None, *labels, distance=np.zeros((1, 2), np.float32)) is None


def test_junk_is_in_no_pair():
    labels = [np.array(part) for part in ([1], [1, 1, 2], [1], [1, 2, 1])]
    found = thresholds.evaluate(None, None, *labels, distance=np.array([[0.0, 0.5, 1.0]], np.float32))
    assert (found.same.sum(), found.different.sum()) == (1, 1)


def test_a_query_that_nobody_knows_is_in_no_pair(rng):
    distance, labels = problem(rng)
    wanted = thresholds.evaluate(None, None, *labels, distance=distance)
    empty = np.zeros(0, int)
    labels = [np.append(part, more) for part, more in zip(labels, ([-1], empty, [0], empty), strict=True)]
    distance = np.concatenate([distance, np.zeros((1, distance.shape[1]), np.float32)])
    found = thresholds.evaluate(None, None, *labels, distance=distance)
    assert found.results() == wanted.results()
    np.testing.assert_array_equal(found.different, wanted.different)


def test_broken_distances(rng, no_array_checks):
    distance, labels = problem(rng)
    with pytest.raises(DataError, match="do not pair up"):
        thresholds.evaluate(None, None, labels[0][1:], *labels[1:], distance=distance)
    distance[3, 4] = np.nan
    with pytest.raises(DataError, match="not finite"):
        thresholds.evaluate(None, None, *labels, distance=distance)


@pytest.mark.slow
def test_real_queries_against_each_other(shared):
    extractor = dmosnet_jax.load(shared("weights/osnet_x0_25_market1501.pth"))
    with zipfile.ZipFile(shared("data/Market-1501-qq.zip")) as archive:
        files = [name for name in archive.namelist() if "/query/" in name and name.endswith(".jpg")]
        features = extractor([Image.open(io.BytesIO(archive.read(name))) for name in files], normalised=True)
    names = [name.rsplit("/", 1)[1] for name in files]
    ids = np.array([int(name.split("_")[0]) for name in names], np.int32)
    cameras = np.array([int(name.split("_c")[1][0]) for name in names], np.int32)
    product = features @ features.T
    labels = (ids, ids, cameras, cameras)
    found = thresholds.evaluate(None, None, *labels, distance=np.float32(1) - product, rates=RATES)
    assert_equal(found, by_counting(np.float32(1) - (np.float32(1) - product), *labels))
    print(found.results())
    again = thresholds.evaluate(features, features, *labels, rates=RATES, block=300)
    assert again.eer == pytest.approx(found.eer, abs=1e-5)
    for row, wanted in zip(again.tar_at_far, found.tar_at_far, strict=True):
        assert row == pytest.approx(wanted, abs=1e-3)


def test_the_curve_lies_on_counts_over_all_pairs(rng):
    distance, labels = problem(rng, queries=60, gallery=200)
    far, tar = thresholds.evaluate(None, None, *labels, distance=distance).curve
    *_, same, different = by_counting(1 - distance, *labels)
    assert (far[0], tar[0], far[-1], tar[-1]) == (1, 1, 0, 0)
    assert (np.diff(far) <= 0).all()
    assert (np.diff(tar) <= 0).all()
    # Every point is that of some threshold on the grid.
    grid = np.arange(2**16 + 1) / 2**15 - 1
    exact = {((different >= at).sum(), (same >= at).sum()) for at in grid}
    counts = np.round(far * different.size).astype(int), np.round(tar * same.size).astype(int)
    assert {*zip(*counts, strict=True)} <= exact
    # And none is far from the next, but where a single pair decides.
    assert np.diff(tar).min() > -max(0.005, 2 / same.size)
    assert len(far) < 1500
