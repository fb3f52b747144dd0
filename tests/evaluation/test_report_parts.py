"""Worst and typical queries, their lists and the map, against direct computations."""

import io

import numpy as np
import pytest
from PIL import Image

from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.data.records import Record
from dmosnet_jax.data.splits import Rows
from dmosnet_jax.evaluation import ranking, report_parts
from dmosnet_jax.memory import cluster_summary


class _Rows(Rows):
    def record(self, index, /):
        out = io.BytesIO()
        Image.new("RGB", (8, 16), (index % 256, 0, 0)).save(out, "png")
        name = f"{self.split}/{self.pids[index]:04d}_{index}.png"
        return Record(out.getvalue(), int(self.pids[index]), int(self.camids[index]), name)


@pytest.fixture
def case(rng):
    """Splits and features of a data set with distractors and queries without a match."""
    splits, features = [], []
    centres = rng.normal(size=(9, 6))
    for name, size in (("query", 30), ("gallery", 80)):
        ids = rng.integers(1, 8, size).astype(np.int32)
        ids[:3] = 8 if name == "query" else 0
        splits.append(_Rows("case", name, ids, rng.integers(1, 4, size).astype(np.int32)))
        features.append((centres[ids] + 1.5 * rng.normal(size=(size, 6))).astype(np.float32))
    query, gallery = splits
    found = ranking.evaluate(*features, query.pids, gallery.pids, query.camids, gallery.camids)
    return query, gallery, *features, found


def by_sorting(case):
    """Of each query: average precision, rank of the first match and gallery rows in order, by sorting all."""
    query, gallery, first, second, _ = case
    similarity = unit_rows_np(first) @ unit_rows_np(second).T
    for row in range(len(query)):
        same = gallery.pids == query.pids[row]
        order = np.argsort(-similarity[row], kind="stable")
        order = order[~(same & (gallery.camids == query.camids[row]))[order]]
        ranks = np.flatnonzero(same[order]) + 1
        precision = np.mean(np.arange(1, ranks.size + 1) / ranks) if ranks.size else np.nan
        yield precision, ranks[0] if ranks.size else 0, order, similarity[row]


def test_worst_and_typical_lists(case):
    query, gallery, *_ = case
    direct = list(by_sorting(case))
    precision = np.array([found for found, *_ in direct])
    valid = np.flatnonzero(~np.isnan(precision))
    lists = report_parts.rank_lists(*case, count=4)
    worst, typical = lists.values()
    assert [heading.split()[0] for heading in lists] == ["Worst", "Typical"]
    expected = valid[np.argsort(precision[valid], kind="stable")]
    rows = [int(entry.query_caption.rpartition("_")[2].removesuffix(".png")) for entry in worst]
    assert rows == expected[:4].tolist()
    for row, entry in zip(rows, worst, strict=True):
        _, first, order, similarity = direct[row]
        assert entry.note == f"Average precision {100 * precision[row]:.2f} %, first true match at rank {first}"
        ranks = [*range(1, 11), *([first] if first > 10 else [])]
        assert [item.rank for item in entry.items] == ranks
        for item in entry.items:
            image = order[item.rank - 1]
            person = f"id {gallery.pids[image]}, camera {gallery.camids[image]}"
            assert item.caption == f"{similarity[image]:.3f}, {person}, {gallery.pids[image]:04d}_{image}.png"
            assert item.match == (gallery.pids[image] == query.pids[row])
            assert item.image == gallery.record(int(image)).image
    # Of the middle half, from its one end to the other.
    places = [
        expected.tolist().index(int(entry.query_caption.rpartition("_")[2].removesuffix(".png"))) for entry in typical
    ]
    assert places == sorted(set(places))
    last = len(expected) - 1
    assert places[0] == max(round(last / 4), 4)
    assert places[-1] == round(3 * last / 4)


def test_the_first_lists_have_the_maps_of_their_images(case):
    seen = []

    def maps(images):
        seen.extend(images)
        return np.arange(len(images), dtype=np.float32)[:, None, None]

    lists = report_parts.rank_lists(*case, count=report_parts.MAPPED + 2, maps=maps)
    plain = report_parts.rank_lists(*case, count=report_parts.MAPPED + 2)
    found = 0
    for heading, entries in lists.items():
        for place, (entry, without) in enumerate(zip(entries, plain[heading], strict=True)):
            given = [entry.query_activation, *(item.activation for item in entry.items)]
            images = [entry.query, *(item.image for item in entry.items)]
            assert [without.query, *(item.image for item in without.items)] == images
            if place >= report_parts.MAPPED:
                assert all(one is None for one in given)
                continue
            found += len(given)
            assert [seen[int(one[0, 0])] for one in given] == images
    assert found == len(seen) > 2 * report_parts.MAPPED * 11 - 1
    assert report_parts.rank_lists(*case, count=0, maps=maps) == {heading: [] for heading in lists}


@pytest.mark.parametrize(("valid", "count"), [(1, 10), (3, 2), (7, 10), (0, 3), (5, 0)])
def test_few_queries_are_in_one_list_only(valid, count):
    worst, typical = report_parts.worst_and_typical(np.array([np.nan, *np.linspace(0.9, 0.1, valid)]), count)
    assert worst.tolist() == list(range(valid, 0, -1))[:count]
    assert not set(worst) & {*typical, 0}


def test_the_map_shows_where_the_features_lie(case):
    query, gallery, first, second, _ = case
    found = report_parts.embedding_map(query, gallery, first, second, most=40)
    assert len(found.points) <= 40
    features = unit_rows_np(np.concatenate([first, second])).astype(np.float64)
    values, axes = np.linalg.eigh(np.cov(features.T))
    np.testing.assert_allclose(found.shares, values[::-1][:2] / values.sum(), rtol=1e-4)
    centred = features - features.mean(axis=0)
    ids = np.concatenate([query.pids, gallery.pids])
    for point in found.points:
        row = int(point.caption.rpartition("_")[2].removesuffix(".png"))
        split, offset = (query, 0) if ", query, " in point.caption else (gallery, len(query))
        assert (point.identity, point.camera) == (ids[offset + row], split.camids[row])
        assert point.image == split.record(row).image
        place = np.abs(centred[offset + row] @ axes[:, ::-1][:, :2])
        np.testing.assert_allclose(np.abs(point.place), place, atol=1e-5)


def test_sheets_of_clusters(rng):
    ids = np.array([4, 4, 4, 7, -1, 7], np.int32)
    images = _Rows("case", "train", ids, np.arange(6, dtype=np.int32))
    read = []
    images.record = lambda row: read.append(row) or _Rows.record(images, row)
    labels, features = np.array([0, 0, 0, 0, 0, 1]), unit_rows_np(rng.normal(size=(6, 4)).astype(np.float32))
    found = cluster_summary.find(features, labels, ids)
    part = report_parts.cluster_part(images, cluster_summary.summary(found, features, shown=4), 3)
    assert part.note.startswith("Clusters of epoch 3: 1; un-clustered images: 1 of 6. 0.0 % of the clusters have")
    assert part.sizes == [("4 to 7", 1)]
    assert [heading.split()[0] for heading in part.sheets] == ["Largest", "Tightest", "Most"]
    for (sheet,) in part.sheets.values():
        assert sheet.note.startswith("images: 5, mean cosine: ")
        assert sheet.note.endswith(", identities: 2, images not of the most frequent one: 1")
        assert len(sheet.items) == 4
        for item in sheet.items:
            row = int(item.caption.rpartition("_")[2].removesuffix(".png"))
            assert item.match is (None if ids[row] < 0 else bool(ids[row] == 4))
            assert item.caption.startswith(f"camera {row}" if ids[row] < 0 else f"id {ids[row]}, camera {row}")
    # Nothing but what is shown.
    assert 5 not in read
    unknown = cluster_summary.find(features, labels, np.full(6, -1))
    part = report_parts.cluster_part(images, cluster_summary.summary(unknown, features), 1)
    assert "✓" not in part.note
    assert "Loosest" in [heading.split()[0] for heading in part.sheets]
    assert {item.match for sheets in part.sheets.values() for sheet in sheets for item in sheet.items} == {None}


def test_too_many_cameras_for_a_table(case, monkeypatch):
    query, gallery, first, second, _ = case
    labels = query.pids, gallery.pids, query.camids, gallery.camids
    assert report_parts.camera_table(first, second, *labels) is not None
    monkeypatch.setattr(report_parts, "MOST_CAMERAS", 2)
    assert report_parts.camera_table(first, second, *labels) is None
