import numpy as np
import pytest
from sklearn.cluster import DBSCAN
from sklearn.metrics import adjusted_rand_score

from dmosnet_jax.core.errors import ConfigError, DataError, UserError
from dmosnet_jax.memory.clustering import (
    STAGES,
    TooFewClusteredError,
    cluster,
    criterion,
    host_memory,
    jaccard,
    neighbours,
)
from dmosnet_jax.memory.clustering.dbscan import dbscan


def unit(array):
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def dense_distance(features, k1, k2):
    """The Jaccard distance with N x N matrices and Python sets, straight from its definition."""
    images = len(features)
    rank = np.argsort(-(features @ features.T), axis=1, kind="stable")[:, :k1]

    def mutual(i, columns):
        return [j for j in rank[i, :columns] if i in rank[j, :columns]]

    half = [mutual(i, int(np.around(k1 / 2)) + 1) for i in range(images)]
    weights = np.zeros((images, images), np.float32)
    for i in range(images):
        members = mutual(i, k1)
        expanded = set(members)
        for j in members:
            if len(set(half[j]) & set(members)) > 2 / 3 * len(half[j]):
                expanded |= set(half[j])
        columns = sorted(expanded)
        closeness = np.exp(2 * (features[columns] @ features[i]).astype(np.float64) - 2)
        weights[i, columns] = closeness / closeness.sum()
    if k2 > 1:
        weights = np.stack([weights[rank[i, :k2]].mean(axis=0) for i in range(images)])
    shared = np.minimum(weights[:, None, :], weights[None, :, :]).sum(axis=2)
    return np.maximum(1 - shared / (2 - shared), 0).astype(np.float32)


def dense_labels(distance, eps, gap, min_samples):
    """DBSCAN at three radii, the criterion with N x N memberships: (three labellings, classes, threshold)."""
    found = [
        DBSCAN(eps=radius, min_samples=min_samples, metric="precomputed").fit_predict(distance)
        for radius in (eps, eps - gap, eps + gap)
    ]

    def membership(labels):
        same = labels[:, None] == labels[None, :]
        return np.where(labels[:, None] >= 0, same, np.eye(len(labels), dtype=bool))

    base, tight, loose = (membership(labels) for labels in found)

    def change(other):
        return 1 - ((base & other).sum(axis=1) / (base | other).sum(axis=1)).astype(np.float32)

    comp, indep = change(tight), change(loose)
    score_comp = np.array([comp[row].min() for row in base])
    score_indep = np.array([indep[row].min() for row in base])
    scores = np.sort([score_indep[found[0] == c][0] for c in range(found[0].max() + 1) if (found[0] == c).sum() > 1])
    if not len(scores):
        return found, None, None
    threshold = scores[min(len(scores) - 1, int(np.round(len(scores) * 0.9)))]
    stays = (score_indep <= threshold) & (comp <= score_comp)
    classes = np.where(stays & (found[0] >= 0), found[0], len(distance) + np.arange(len(distance)))
    return found, classes, threshold


def random_problem(seed):
    """Features and settings: clusters of any size, exact duplicates, isolated points, k1 beyond the clusters or N."""
    rng = np.random.default_rng(seed)
    images, dim = int(rng.integers(6, 150)), int(rng.integers(3, 24))
    centres = rng.normal(size=(int(rng.integers(1, 12)), dim))
    features = centres[rng.integers(0, len(centres), images)] + rng.uniform(0.1, 1.2) * rng.normal(size=(images, dim))
    if seed % 3 == 0:  # duplicates
        copies = rng.integers(0, images, images // 3)
        features[copies] = features[copies[0]] if seed % 2 else features[rng.integers(0, images, len(copies))]
    if seed % 4 == 1:  # isolated points
        features[: images // 6] = 5 * rng.normal(size=(images // 6, dim))
    settings = {
        "k1": int(rng.integers(2, 36)),
        "k2": int(rng.integers(1, 9)),
        "eps": float(rng.uniform(0.3, 0.75)),
        "eps_gap": float(rng.uniform(0.0, 0.1)),
        "min_samples": int(rng.integers(1, 7)),
    }
    return unit(features), settings


def test_golden_jaccard_rows(shared):
    golden = np.load(shared("goldens/spcl_clustering.npz"))
    nearest = neighbours.search_host(golden["features"], 30).indices
    weights = jaccard.reciprocal_weights(golden["features"], nearest, k1=30, k2=6)
    rows = jaccard.distance_rows(weights, golden["jaccard_rows_index"])
    np.testing.assert_allclose(rows, golden["jaccard_rows"], atol=1e-5)


def test_golden_clustering_in_both_epochs(shared):
    golden = np.load(shared("goldens/spcl_clustering.npz"))
    names = ("k1", "k2", "min_samples")
    settings = {name: int(golden[name]) for name in names} | {n: float(golden[n]) for n in ("eps", "eps_gap")}
    first = cluster(golden["features"], **settings)
    for name in ("dbscan", "dbscan_tight", "dbscan_loose"):
        np.testing.assert_array_equal(getattr(first, name), golden[name])
    np.testing.assert_allclose(first.r_comp, golden["r_comp"], atol=1e-6)
    np.testing.assert_allclose(first.r_indep, golden["r_indep"], atol=1e-6)
    assert first.indep_threshold == golden["indep_threshold"]
    assert adjusted_rand_score(golden["labels"], first.labels) == 1.0
    second = cluster(golden["features_epoch2"], indep_threshold=first.indep_threshold, **settings)
    np.testing.assert_array_equal(second.dbscan, golden["dbscan_epoch2"])
    assert adjusted_rand_score(golden["labels_epoch2"], second.labels) == 1.0
    assert second.indep_threshold == first.indep_threshold
    for result, labels in ((first, golden["labels"]), (second, golden["labels_epoch2"])):
        sizes = np.bincount(labels)
        assert result.num_clusters == (sizes > 1).sum()
        assert result.num_unclustered == (sizes == 1).sum()
        assert result.largest_cluster == sizes.max()


@pytest.mark.parametrize("seed", range(200))
def test_random_problems_equal_the_dense_computation(seed):
    features, settings = random_problem(seed)
    distance = dense_distance(features, settings["k1"], settings["k2"])
    nearest = neighbours.search_host(features, settings["k1"]).indices
    weights = jaccard.reciprocal_weights(features, nearest, k1=settings["k1"], k2=settings["k2"])
    np.testing.assert_allclose(jaccard.distance_rows(weights, np.arange(len(features))), distance, atol=1e-5)
    found, classes, threshold = dense_labels(distance, settings["eps"], settings["eps_gap"], settings["min_samples"])
    if threshold is None:  # no cluster, or clusters of one image only
        with pytest.raises(UserError, match="not one cluster"):
            cluster(features, **settings)
        return
    result = cluster(features, **settings)
    for mine, reference in zip((result.dbscan, result.dbscan_tight, result.dbscan_loose), found, strict=True):
        np.testing.assert_array_equal(mine, reference)
    assert result.indep_threshold == threshold
    np.testing.assert_array_equal(result.labels[:, None] == result.labels, classes[:, None] == classes)
    np.testing.assert_array_equal(np.unique(result.labels), np.arange(result.labels.max() + 1))
    sizes = np.bincount(result.labels)
    assert (np.diff((sizes > 1).astype(int)) <= 0).all(), "classes of one image come last"


def test_border_points_go_to_the_first_cluster(rng):
    # A chain of two dense groups joined by one border point between them, in several orders of index.
    place = np.concatenate([np.linspace(0, 1, 8), [1.9], np.linspace(2.8, 3.8, 8), [9.0]])
    for _ in range(20):
        order = rng.permutation(len(place))
        distance = np.abs(place[order][:, None] - place[order][None]).astype(np.float32)
        row, column = np.nonzero(distance <= 1.0)
        indptr = np.searchsorted(row, np.arange(len(place) + 1)).astype(np.int64)
        graph = jaccard.SparseRows(indptr, column.astype(np.int32), distance[row, column])
        for radius in (0.91, 1.0):
            expected = DBSCAN(eps=radius, min_samples=4, metric="precomputed").fit_predict(distance)
            np.testing.assert_array_equal(dbscan(graph, radius, 4), expected)
            assert expected.max() == 1


def test_graph_holds_all_pairs_within_the_limit_whatever_the_threads():
    features, _ = random_problem(7)
    nearest = neighbours.search_host(features, 20).indices
    weights = jaccard.reciprocal_weights(features, nearest, k1=20, k2=6, threads=1)
    for one, many in zip(weights, jaccard.reciprocal_weights(features, nearest, k1=20, k2=6, threads=7), strict=True):
        np.testing.assert_array_equal(one, many)
    dense = jaccard.distance_rows(weights, np.arange(len(features)))
    for threads in (1, 7):
        graph = jaccard.distance_graph(weights, 0.8, threads=threads)
        rebuilt = np.full(dense.shape, np.inf, np.float32)
        rebuilt[np.repeat(np.arange(len(features)), np.diff(graph.indptr)), graph.indices] = graph.values
        np.testing.assert_array_equal(rebuilt, np.where(dense <= np.float32(0.8), dense, np.inf))


def test_the_order_of_visits_changes_nothing(rng):
    features, _ = random_problem(4)
    nearest = neighbours.search_host(features, 20).indices
    local = jaccard.visiting_order(nearest)
    np.testing.assert_array_equal(np.sort(local), np.arange(len(features)))
    plain = jaccard.reciprocal_weights(features, nearest, k1=20, k2=6)
    clusters = dbscan(jaccard.distance_graph(plain, 0.7), 0.7, 4)
    for order in (local, rng.permutation(len(features)).astype(np.int32)):
        weights = jaccard.reciprocal_weights(features, nearest, k1=20, k2=6, order=order)
        for one, other in zip(plain, weights, strict=True):
            np.testing.assert_array_equal(one, other)
        graph = jaccard.distance_graph(weights, 0.7, order=order)
        np.testing.assert_array_equal(dbscan(graph, 0.7, 4), clusters)


def test_neighbours_are_visited_together(rng):
    blocks = rng.permutation(600).reshape(20, 30)
    nearest = np.empty((600, 10), np.int32)
    for block in blocks:
        nearest[block] = np.sort(block)[:10]
    order = jaccard.visiting_order(nearest)
    home = np.empty(600, int)
    home[blocks] = np.arange(20)[:, None]
    assert (np.diff(home[order]) != 0).sum() == 19


def test_rows_are_normalised_and_unit_rows_left_alone(rng):
    features, settings = random_problem(2)
    scaled = features * rng.uniform(0.5, 20, (len(features), 1)).astype(np.float32)
    np.testing.assert_array_equal(cluster(scaled, **settings).dbscan, cluster(features, **settings).dbscan)


@pytest.mark.usefixtures("no_array_checks")
def test_known_neighbours_are_used():
    features, settings = random_problem(2)
    nearest = neighbours.search_host(features, 40).indices
    given, own = cluster(features, nearest=nearest, **settings), cluster(features, **settings)
    np.testing.assert_array_equal(given.labels, own.labels)
    with pytest.raises(DataError, match="nearest has shape"):
        cluster(features, nearest=nearest[:-1], **settings)


def test_progress_and_seconds():
    features, settings = random_problem(2)
    seen = []
    result = cluster(features, progress=lambda stage, fraction: seen.append((stage, fraction)), **settings)
    assert list(result.seconds) == ["neighbours", "weights", "jaccard", "dbscan", "criterion"]
    assert list(dict(seen)) == list(STAGES) == list(result.seconds)
    for stage in STAGES:
        fractions = [fraction for name, fraction in seen if name == stage]
        assert fractions == sorted(fractions)
        assert (fractions[0], fractions.count(0.0), fractions[-1]) == (0.0, 1, 1.0)


def test_no_cluster_suggests_a_radius(rng):
    centres = rng.normal(size=(8, 16))
    features = unit(np.repeat(centres, 12, axis=0) + 0.3 * rng.normal(size=(96, 16)))
    settings = {"k1": 12, "k2": 3, "eps_gap": 0.0, "min_samples": 4}
    with pytest.raises(UserError, match=r"eps=0\.01.* within 0\.\d\d: set eps near that") as caught:
        cluster(features, eps=0.01, **settings)
    suggested = float(str(caught.value).rsplit("within ", 1)[1].split(":")[0])
    assert cluster(features, eps=suggested + 0.01, **settings).num_clusters > 0
    with pytest.raises(UserError, match="only 3 images and min_samples is 4"):
        cluster(features[:3], eps=0.5, **settings)


def test_too_few_clustered_images_are_refused_with_the_curve(rng):
    features = unit(rng.normal(size=(400, 24)))
    features[:12] = unit(features[0] + 0.05 * rng.normal(size=(12, 24)))
    settings = {"k1": 12, "k2": 3, "eps": 0.4}
    share = (cluster(features, **settings).dbscan >= 0).mean()
    assert 0.01 < share < 0.2
    cluster(features, min_clustered=share, **settings)
    with pytest.raises(TooFewClusteredError, match=r"only \d+ of 400 images .*min_clustered=0\.2; half") as caught:
        cluster(features, min_clustered=0.2, **settings)
    nearest = neighbours.search_host(features, 12).indices
    distance = jaccard.distance_rows(jaccard.reciprocal_weights(features, nearest, k1=12, k2=3), np.arange(400))
    np.testing.assert_array_equal(caught.value.reaches, np.sort(np.sort(distance, axis=1)[:, 3]))
    assert (caught.value.eps, caught.value.min_samples) == (0.4, 4)


@pytest.mark.usefixtures("no_array_checks")
def test_bad_features_and_settings(rng):
    features, settings = random_problem(2)
    for value in (np.nan, np.inf):
        bad = features.copy()
        bad[3, 1] = value
        with pytest.raises(DataError, match="the first is row 3"):
            cluster(bad, **settings)
    bad = features.copy()
    bad[5] = 0
    with pytest.raises(DataError, match=r"1 of .* all zero, the first is row 5"):
        cluster(bad, **settings)
    with pytest.raises(DataError, match="not empty"):
        cluster(features[:0], **settings)
    for change, text in (
        ({"k1": 0}, "k1=0"),
        ({"eps": 0.99, "eps_gap": 0.05}, "0.94 to 1.04"),
        ({"eps": 0.05, "eps_gap": 0.05}, "eps=0.05"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"min_samples": 0}, "min_samples=0"),
    ):
        with pytest.raises(ConfigError, match=text):
            cluster(features, **(settings | change))


def test_refuses_what_does_not_fit_in_memory():
    features, settings = random_problem(2)
    with pytest.raises(UserError, match="GiB"):
        cluster(features, memory_limit=1000, **settings)
    small, large = (host_memory.estimate_memory(n, 512, k1=30, threads=2)["total"] for n in (200_000, 2_000_000))
    assert small < large < 11 * small, "linear in the number of images"


def test_memory_of_a_container_counts(tmp_path, monkeypatch):
    limits = [tmp_path / name for name in ("none", "unlimited", "limit")]
    limits[1].write_text("max\n")
    monkeypatch.setattr(host_memory, "_CONTAINER_LIMITS", limits[:2])
    machine = host_memory.machine_memory()
    assert machine > 2**20
    limits[2].write_text("1048576\n")
    monkeypatch.setattr(host_memory, "_CONTAINER_LIMITS", limits)
    assert host_memory.machine_memory() == 2**20


def test_noise_numbers_and_change():
    labels = criterion.number_noise(np.array([0, -1, 1, 0, -1]))
    np.testing.assert_array_equal(labels, [0, 2, 1, 0, 3])
    change = criterion.change(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(change, [1 / 3, 1 / 3, 3 / 4, 1 / 2], atol=1e-7)
