import numpy as np
import pytest

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.evaluation import ranking
from dmosnet_jax.evaluation.rerank import rerank


def dense(features, queries, k1, k2, share):
    """Re-ranking of squared Euclidean distances with whole matrices and Python sets."""
    images = len(features)
    features = features.astype(np.float64)
    squared = ((features[:, None] - features[None]) ** 2).sum(axis=2) ** 2
    original = squared / squared.max(axis=1, keepdims=True)
    rank = np.argsort(squared, axis=1, kind="stable")

    def mutual(i, columns):
        return {j for j in rank[i, :columns] if i in rank[j, :columns]}

    half = int(np.around(k1 / 2)) + 1
    weights = np.zeros((images, images))
    for i in range(images):
        members = mutual(i, k1 + 1)
        expanded = set(members)
        for j in members:
            other = mutual(j, half)
            if len(other & members) > 2 / 3 * len(other):
                expanded |= other
        columns = sorted(expanded)
        weights[i, columns] = np.exp(-original[i, columns])
        weights[i] /= weights[i].sum()
    weights = np.stack([weights[rank[i, :k2]].mean(axis=0) for i in range(images)])
    shared = np.minimum(weights[:queries, None], weights[None]).sum(axis=2)
    final = (1 - shared / (2 - shared)) * (1 - share) + original[:queries] * share
    return final[:, queries:]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_golden(shared, metric):
    golden = np.load(shared("goldens/evaluation.npz"))
    settings = {name: int(golden[name]) for name in ("k1", "k2")} | {"lambda_value": float(golden["lambda_value"])}
    found = rerank(golden["query_features"], golden["gallery_features"], metric=metric, **settings)
    np.testing.assert_allclose(found.dense(), golden["reranked"], atol=1e-4)
    labels = (golden[name] for name in ("query_ids", "gallery_ids", "query_cams", "gallery_cams"))
    result = ranking.evaluate(None, None, *labels, distance=found, block=64)
    assert result.mAP == pytest.approx(golden["reranked_mAP"], abs=1e-6)
    np.testing.assert_allclose(result.cmc, golden["reranked_cmc"], atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_equals_dense_matrices_on_features_of_any_length(seed):
    rng = np.random.default_rng(seed)
    queries, gallery, dim = int(rng.integers(1, 20)), int(rng.integers(2, 60)), int(rng.integers(3, 12))
    centres = rng.normal(size=(6, dim))
    features = centres[rng.integers(0, 6, queries + gallery)] + 0.6 * rng.normal(size=(queries + gallery, dim))
    features = features.astype(np.float32)
    k1, k2, share = int(rng.integers(1, 80)), int(rng.integers(1, 9)), float(rng.uniform(0, 1))
    k2 = min(k2, queries + gallery)
    found = rerank(
        features[:queries], features[queries:], k1=k1, k2=k2, lambda_value=share, metric="euclidean", threads=seed + 1
    )
    np.testing.assert_allclose(found.dense(), dense(features, queries, k1, k2, share), atol=1e-4)
    # Not bit for bit: a product of fewer rows may round otherwise, as the processor's BLAS chooses.
    np.testing.assert_allclose(found(0, queries), found.dense(), atol=1e-6)
    np.testing.assert_allclose(found(queries // 2, queries), found.dense()[queries // 2 :], atol=1e-6)


@pytest.mark.usefixtures("no_array_checks")
def test_errors(rng):
    query, gallery = rng.normal(size=(4, 8)), rng.normal(size=(9, 8))
    with pytest.raises(ConfigError, match="k1=0"):
        rerank(query, gallery, k1=0)
    with pytest.raises(ConfigError, match=r"lambda_value=1\.5"):
        rerank(query, gallery, lambda_value=1.5)
    with pytest.raises(ConfigError, match="'dot'"):
        rerank(query, gallery, metric="dot")
    query[2, 2] = np.nan
    with pytest.raises(DataError, match="query features are not finite, the first is row 2"):
        rerank(query, gallery)
    with pytest.raises(DataError, match="same model"):
        rerank(np.ones((4, 3)), gallery)
