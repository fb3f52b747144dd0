import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmosnet_jax.core import parallel
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.memory import cluster, tables

MOMENTUM, TEMPERATURE = 0.1, 0.05


def unit(array):
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def problem(rng, rows=120, dim=16, clusters=14, batch=24):
    features = unit(rng.normal(size=(rows, dim)) + 0.5)
    labels = np.where(rng.random(rows) < 0.3, -1, rng.integers(0, clusters, rows))
    indices = rng.choice(np.flatnonzero(labels >= 0), batch).astype(np.int32)
    inputs = unit(features[indices] + 0.3 * rng.normal(size=(batch, dim)))
    return features, labels, inputs, indices


def direct(features, labels, inputs, indices, hardest):
    """Centroids, loss and the update, one image after the other, in float64."""
    clusters = np.unique(labels[labels >= 0])
    centres = {c: features[labels == c].astype(np.float64).mean(axis=0) for c in clusters}
    centres = {c: v / np.linalg.norm(v) for c, v in centres.items()}
    table = np.stack([centres[c] for c in clusters])
    logits = inputs.astype(np.float64) @ table.T / TEMPERATURE
    own = logits[np.arange(len(inputs)), np.searchsorted(clusters, labels[indices])]
    loss = (np.log(np.exp(logits).sum(axis=1)) - own).mean()
    start = {c: v.copy() for c, v in centres.items()}
    if hardest:
        turns = []
        for c in np.unique(labels[indices]):
            members = np.flatnonzero(labels[indices] == c)
            turns.append((c, inputs[members[np.argmin(inputs[members] @ start[c])]]))
    else:
        turns = [(labels[i], x) for i, x in zip(indices, inputs, strict=True)]
    for c, x in turns:
        moved = MOMENTUM * centres[c] + (1 - MOMENTUM) * x
        centres[c] = moved / np.linalg.norm(moved)
    return loss, start, centres


@pytest.mark.parametrize("hardest", [False, True])
@pytest.mark.parametrize("devices", [1, 8])
def test_equals_the_direct_computation(rng, hardest, devices):
    features, labels, inputs, indices = problem(rng)
    expected_loss, start, expected = direct(features, labels, inputs, indices, hardest)
    mesh = parallel.make_mesh(jax.devices()[:devices])
    options = {"momentum": MOMENTUM, "temperature": TEMPERATURE, "hardest": hardest, "mesh": mesh}
    memory = cluster.init(features, labels, **options)
    for c, centre in start.items():
        np.testing.assert_allclose(memory.centroids[c], centre, atol=1e-6)
    np.testing.assert_array_equal(memory.present, np.isin(np.arange(memory.present.shape[0]), labels))

    def step(memory, inputs, indices):
        loss = cluster.loss(memory, inputs, indices)
        return cluster.update(memory, inputs, indices, loss=loss), loss

    places = tables.shardings(memory, mesh)
    after, loss = jax.jit(step, donate_argnums=0, out_shardings=(places, None))(
        memory, jnp.asarray(inputs), jnp.asarray(indices)
    )
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-4)
    for c, centre in expected.items():
        np.testing.assert_allclose(after.centroids[c], centre, atol=1e-6)
    assert not np.asarray(after.centroids)[~np.asarray(after.present)].any()


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("temperature", [0.05, 0.004])
def test_the_least_likely_cluster_pulls_as_any_other(rng, devices, temperature):
    """Cross-entropy, whose gradient does not vanish where the probability does: SpCL's 1e-6 would take it away."""
    features, labels, _, _ = problem(rng)
    features = unit(rng.normal(size=features.shape))
    mesh = parallel.make_mesh(jax.devices()[:devices])
    memory = cluster.init(features, labels, momentum=MOMENTUM, temperature=temperature, mesh=mesh)
    clusters = np.unique(labels[labels >= 0])
    table = np.asarray(memory.centroids)[clusters].astype(np.float64)
    # Next to one centroid, or away from all of them; and of the cluster that is furthest.
    inputs = np.concatenate([table[:5], -unit(table.sum(axis=0, keepdims=True)).repeat(3, axis=0)]).astype(np.float32)
    furthest = clusters[np.argmin(inputs @ table.T, axis=1)]
    indices = np.array([np.flatnonzero(labels == c)[0] for c in furthest], np.int32)
    logits = inputs.astype(np.float64) @ table.T / temperature
    logits -= logits.max(axis=1, keepdims=True)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    target = clusters[None, :] == furthest[:, None]
    assert shares[target].min() < 1e-6
    expected = (np.log(np.exp(logits).sum(axis=1)) - logits[target]).mean()
    pull = (shares - target) @ table / temperature / len(inputs)
    loss, gradient = jax.value_and_grad(lambda x: cluster.loss(memory, x, indices))(jnp.asarray(inputs))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(gradient, pull, rtol=1e-3, atol=1e-3 * np.abs(pull).max())


def test_a_new_epoch_has_new_centroids_in_the_same_places(rng):
    features, labels, inputs, indices = problem(rng)
    mesh = parallel.make_mesh()
    options = {"momentum": MOMENTUM, "temperature": TEMPERATURE, "mesh": mesh}
    memory = cluster.init(features, labels, **options)
    moved = jax.jit(cluster.update)(memory, jnp.asarray(inputs), jnp.asarray(indices))
    other = unit(rng.normal(size=features.shape))
    relabelled = cluster.set_labels(moved, np.maximum(labels - 3, -1), features=other)
    expected = cluster.init(other, np.maximum(labels - 3, -1), **options)
    jax.tree.map(np.testing.assert_array_equal, relabelled, expected)
    for table, place in zip(
        jax.tree.leaves(relabelled), jax.tree.leaves(tables.shardings(relabelled, mesh)), strict=True
    ):
        assert table.sharding == place
    assert cluster.set_labels(moved, labels, features=other, capacity=1500).present.shape == (2048,)


def test_loss_that_is_not_finite_leaves_the_centroids(rng):
    features, labels, inputs, indices = problem(rng)
    memory = cluster.init(features, labels, momentum=MOMENTUM, temperature=TEMPERATURE)
    after = cluster.update(memory, jnp.asarray(inputs), jnp.asarray(indices), loss=jnp.float32(np.nan))
    jax.tree.map(np.testing.assert_array_equal, after, memory)


def test_images_outside_of_clusters_move_nothing(rng):
    features, labels, inputs, _ = problem(rng)
    memory = cluster.init(features, labels, momentum=MOMENTUM, temperature=TEMPERATURE, mesh=parallel.make_mesh())
    outside = rng.choice(np.flatnonzero(labels < 0), len(inputs)).astype(np.int32)
    after = jax.jit(cluster.update)(memory, jnp.asarray(inputs), jnp.asarray(outside))
    jax.tree.map(np.testing.assert_array_equal, after, memory)


@pytest.mark.usefixtures("no_array_checks")
def test_bad_labels(rng):
    features, labels, _, _ = problem(rng)
    memory = cluster.init(features, labels, momentum=MOMENTUM, temperature=TEMPERATURE, capacity=14)
    with pytest.raises(DataError, match="120 images"):
        cluster.set_labels(memory, labels[1:], features=features)
    with pytest.raises(DataError, match="features of 119 images; the memory holds 120"):
        cluster.set_labels(memory, labels, features=features[1:])
    with pytest.raises(DataError, match="label -2 at row"):
        cluster.set_labels(memory, np.where(labels == 3, -2, labels), features=features)
    with pytest.raises(ConfigError, match="label 5000 does not fit the capacity of 1024 classes"):
        cluster.set_labels(memory, np.where(labels == 3, 5000, labels), features=features)
