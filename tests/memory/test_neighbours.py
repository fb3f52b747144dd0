import jax
import numpy as np
import pytest

from dmosnet_jax.core import parallel
from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.memory.clustering import neighbours, neighbours_device


def dense(features, k):
    """Reference: a stable sort of whole rows, so equal similarities come by index."""
    similarity = features @ features.T
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(similarity, order, axis=1)


def tied(rng, rows, dim=6):
    """Small integers: products are exact in any order of summation, and most rows have many equal ones."""
    return rng.integers(-2, 3, (rows, dim)).astype(np.float32)


@pytest.mark.parametrize(("rows", "k", "block"), [(1, 1, 8), (50, 60, 16), (333, 30, 64), (257, 5, 1000), (64, 64, 7)])
def test_host_is_exact_with_ties_by_index(rng, rows, k, block):
    features = tied(rng, rows)
    found = neighbours.search_host(features, k, block=block, farthest=True)
    order, similarity = dense(features, k)
    np.testing.assert_array_equal(found.indices, order)
    np.testing.assert_array_equal(found.similarities, similarity)
    np.testing.assert_array_equal(found.farthest, (features @ features.T).min(axis=1))
    assert found.indices.dtype == np.int32


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("rows", "k", "query_block", "candidate_block"),
    [(5, 3, 8, 8), (50, 60, 16, 32), (700, 7, 32, 512), (1500, 9, 64, 352)],
)
def test_device_equals_host(rng, devices, rows, k, query_block, candidate_block):
    features = tied(rng, rows)
    mesh = parallel.make_mesh(jax.devices()[:devices])
    found = neighbours_device.search_device(
        features, k, mesh=mesh, query_block=query_block, candidate_block=candidate_block
    )
    expected = neighbours.search_host(features, k)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.similarities, expected.similarities)


@pytest.mark.parametrize("devices", [1, 8])
def test_device_finds_the_few_promising_groups(rng, devices, monkeypatch):
    # Many blocks, so that late ones hold nothing new for most rows; near duplicates, so that some hold much.
    features = rng.normal(size=(2048, 16)).astype(np.float32)
    features[1500:1530] = features[:30] + np.float32(1e-3)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    mesh = parallel.make_mesh(jax.devices()[:devices])
    expected = neighbours.search_host(features, 12)
    for few in (3, 8):
        neighbours_device._compiled.cache_clear()
        monkeypatch.setattr(neighbours_device, "FEW", few)
        seen = []
        found = neighbours_device.search_device(
            features, 12, mesh=mesh, query_block=32, candidate_block=512, progress=seen.append
        )
        np.testing.assert_array_equal(found.indices, expected.indices)
        assert seen == sorted(seen)
        assert seen[-1] == 1.0
    neighbours_device._compiled.cache_clear()


def test_candidates_are_scored_exactly_and_recall_is_measured(rng):
    features = rng.normal(size=(1200, 24)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    exact = neighbours.search_host(features, 10)
    assert neighbours.recall(features, exact.indices) == 1.0
    recalls = []
    for candidates in (10, 20):
        found = neighbours.search(features, 10, backend="device", candidates=candidates)
        assert found.indices.shape == (1200, 10)
        products = np.einsum("nd,nkd->nk", features, features[found.indices])
        np.testing.assert_allclose(found.similarities, products, atol=1e-6)
        assert (np.diff(found.similarities, axis=1) <= 0).all()
        recalls.append(neighbours.recall(features, found.indices, probes=1200))
        hits = [len(set(a) & set(b)) for a, b in zip(found.indices, exact.indices, strict=True)]
        assert recalls[-1] == pytest.approx(np.mean(hits) / 10, abs=1e-3)
    assert 0.9 < recalls[0] < 1.0
    assert recalls[1] > 0.999


def test_shares_of_the_host_search_merge_to_the_whole(rng):
    features = tied(rng, 700)
    whole = neighbours.search_host(features, 9, block=64)
    parts = [neighbours.search_host(features, 9, block=64, share=(i, 3)) for i in range(3)]
    for one, other in zip(whole[:2], neighbours.merge(parts)[:2], strict=True):
        np.testing.assert_array_equal(one, other)


def test_device_equals_host_on_unit_features(rng):
    features = rng.normal(size=(900, 32)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    found = neighbours.search(features, 10, backend="device")
    expected = neighbours.search(features, 10)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.similarities, expected.similarities, atol=1e-6)
    np.testing.assert_array_equal(expected.indices[:, 0], np.arange(900))


def test_euclidean_by_half_norms(rng):
    features = rng.normal(size=(300, 8)).astype(np.float32) * rng.uniform(0.2, 3, (300, 1)).astype(np.float32)
    half = (features**2).sum(axis=1) / np.float32(2)
    found = neighbours.search_host(features, 12, half_norms=half, block=77, farthest=True)
    distance = ((features[:, None].astype(np.float64) - features[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(found.indices, np.argsort(distance, axis=1)[:, :12])
    np.testing.assert_allclose(-2 * found.similarities, np.sort(distance, axis=1)[:, :12], atol=1e-4)
    np.testing.assert_allclose(-2 * found.farthest, distance.max(axis=1), rtol=1e-5)


def test_threads_and_progress(rng):
    features = tied(rng, 500)
    seen = []
    one = neighbours.search_host(features, 9, block=100, threads=1, progress=seen.append)
    many = neighbours.search_host(features, 9, block=100, threads=5)
    np.testing.assert_array_equal(one.indices, many.indices)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_errors(rng):
    with pytest.raises(ConfigError, match="k=0"):
        neighbours.search(tied(rng, 5), 0)
    with pytest.raises(ConfigError, match="candidates=2 must be at least k=3"):
        neighbours.search(tied(rng, 5), 3, candidates=2)
    with pytest.raises(ConfigError, match="'gpu'"):
        neighbours.search(tied(rng, 5), 1, backend="gpu")
