"""Sizes, tightness and mixture of clusters, against direct computations; and which of them are shown."""

import json

import numpy as np
import pytest

from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.memory import cluster_summary


@pytest.fixture
def case(rng):
    """400 images: classes of one image, of none (-1), and clusters; some identities are not known."""
    labels = rng.permutation(np.concatenate([rng.integers(0, 60, 300), np.arange(100, 150), np.full(50, -1)]))
    identities = np.where(rng.random(400) < 0.2, -1, labels % 7 + (rng.random(400) < 0.3))
    centres = rng.normal(size=(200, 16))
    features = centres[labels] + rng.normal(size=(400, 16)) * rng.uniform(0.2, 2, 200)[labels][:, None]
    return unit_rows_np(features.astype(np.float32)), labels, identities


@pytest.mark.parametrize("block", [7, 16_384])
def test_clusters_are_what_a_look_at_each_finds(case, monkeypatch, block):
    features, labels, identities = case
    # Clusters go over the ends of blocks.
    monkeypatch.setattr(cluster_summary, "_BLOCK", block)
    found = cluster_summary.find(features, labels, identities)
    wanted = [label for label in range(labels.max() + 1) if (labels == label).sum() > 1]
    assert len(found.sizes) == len(wanted) > 40
    for number, label in enumerate(wanted):
        rows = np.flatnonzero(labels == label)
        start = found.starts[number]
        assert found.rows[start : start + found.sizes[number]].tolist() == rows.tolist()
        cosines = features[rows].astype(np.float64) @ features[rows].T
        pairs = cosines[np.triu_indices(len(rows), 1)]
        assert found.similarity[number] == pytest.approx(pairs.mean(), abs=1e-5)
        known = identities[rows][identities[rows] >= 0]
        people, counts = np.unique(known, return_counts=True)
        assert found.identities[number] == len(people)
        assert found.strangers[number] == len(known) - counts.max(initial=0)
        assert found.identity[number] in (people[counts == counts.max()] if people.size else [-1])


@pytest.mark.parametrize("known", [True, False])
def test_what_is_shown(case, known):
    features, labels, identities = case
    identities = identities if known else np.full(400, -1)
    found = cluster_summary.find(features, labels, identities)
    shown = cluster_summary.summary(found, features, each=3, shown=4)
    assert shown == json.loads(json.dumps(shown))
    sizes = found.sizes
    assert shown["images"] == 400
    assert shown["unclustered"] == 400 - sizes.sum()
    assert [low for low, _ in shown["sizes"]] == sorted({2 ** (int(size).bit_length() - 1) for size in sizes})
    for low, count in shown["sizes"]:
        assert count == ((sizes >= low) & (sizes < 2 * low)).sum()
    assert list(shown["examples"]) == ["largest", "tightest", "mixed" if known else "loosest"]
    largest, tightest, last = shown["examples"].values()
    assert [each["size"] for each in largest] == sorted(sizes, reverse=True)[:3]
    usual = found.similarity[sizes >= np.median(sizes)]
    assert [each["similarity"] for each in tightest] == sorted(usual, reverse=True)[:3]
    if known:
        pure = [len({*identities[labels == label]} - {-1}) for label in set(labels[found.rows])]
        assert shown["pure"] == pytest.approx(sum(one == 1 for one in pure) / sum(one > 0 for one in pure))
        assert [each["strangers"] for each in last] == sorted(found.strangers, reverse=True)[:3]
        assert last[0]["strangers"] > 0
    else:
        assert shown["pure"] is None
        assert [each["similarity"] for each in last] == sorted(usual)[:3]
    for each in (*largest, *tightest, *last):
        own = np.flatnonzero(labels == labels[each["rows"][0]])
        assert len(own) == each["size"]
        nearest = own[np.argsort(-(features[own] @ features[own].sum(axis=0)))]
        places = np.linspace(0, len(own) - 1, min(4, len(own))).round().astype(int)
        assert each["rows"] == nearest[places].tolist()


def test_without_clusters():
    features = np.eye(4, dtype=np.float32)
    found = cluster_summary.find(features, np.array([0, 1, -1, 2]), np.arange(4))
    shown = cluster_summary.summary(found, features)
    assert (shown["unclustered"], shown["sizes"], shown["pure"]) == (4, [], None)
    assert not any(shown["examples"].values())
