import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dmosnet_jax.losses import triplet


def direct(embeddings, pids, margin):
    """Anchor by anchor, from the definition, in float64."""
    x = embeddings.astype(np.float64)
    losses = []
    for i in range(len(x)):
        positive = max(np.linalg.norm(x[i] - x[j]) for j in range(len(x)) if pids[j] == pids[i])
        negatives = [np.linalg.norm(x[i] - x[j]) for j in range(len(x)) if pids[j] != pids[i]]
        if not negatives:
            losses.append(0.0)
            continue
        difference = positive - min(negatives)
        losses.append(np.log1p(np.exp(difference)) if margin is None else max(0.0, difference + margin))
    return np.mean(losses)


def numeric_gradient(function, x, step=1e-5):
    gradient = np.zeros_like(x)
    for position in np.ndindex(x.shape):
        shifted = x.copy()
        shifted[position] += step
        up = function(shifted)
        shifted[position] -= 2 * step
        gradient[position] = (up - function(shifted)) / (2 * step)
    return gradient


# Loss and gradient in one program: one by one, every operation would be compiled by itself.
both = jax.jit(jax.value_and_grad(triplet.batch_hard), static_argnames="margin")


@pytest.fixture
def batch(rng):
    return rng.normal(0, 1, (16, 6)).astype(np.float32), np.repeat(np.arange(4), 4).astype(np.int32)


@pytest.mark.parametrize("margin", [0.3, 2.0, None])
def test_loss_and_gradient_equal_the_definition(batch, margin):
    embeddings, pids = batch
    loss, gradient = both(jnp.asarray(embeddings), jnp.asarray(pids), margin=margin)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, direct(embeddings, pids, margin), rtol=1e-5)
    expected = numeric_gradient(lambda x: direct(x, pids, margin), embeddings.astype(np.float64))
    np.testing.assert_allclose(gradient, expected, atol=2e-6)


def test_uneven_identities_and_a_single_image(rng):
    embeddings = rng.normal(0, 1, (9, 5)).astype(np.float32)
    pids = np.array([0, 0, 0, 0, 1, 1, 2, 1, 7], np.int32)
    for margin in (0.3, None):
        got = triplet.batch_hard(jnp.asarray(embeddings), jnp.asarray(pids), margin=margin)
        np.testing.assert_allclose(got, direct(embeddings, pids, margin), rtol=1e-5)


def test_distance_to_self_is_zero_however_long_the_embedding(rng):
    # All identities alone: each positive distance is the anchor's own, which rounding must not lift above the clip.
    embeddings = rng.normal(0, 100, (8, 512)).astype(np.float32)
    distances = triplet.pairwise_distances(jnp.asarray(embeddings))
    np.testing.assert_allclose(np.diag(distances), 1e-6, rtol=1e-5)
    expected = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=2)
    np.testing.assert_allclose(distances, np.maximum(expected, 1e-6), rtol=1e-5)


@pytest.mark.parametrize("margin", [0.3, None])
def test_coincident_embeddings_have_finite_gradients(margin):
    pids = jnp.asarray([0, 0, 1, 1])
    for embeddings in (jnp.zeros((4, 3)), jnp.ones((4, 3)), jnp.asarray([[1.0, 2, 3]] * 2 + [[3.0, 2, 1]] * 2)):
        _, gradient = both(embeddings, pids, margin=margin)
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("margin", [0.3, None])
def test_batch_without_negatives_adds_nothing(rng, margin):
    embeddings = jnp.asarray(rng.normal(0, 1, (6, 3)), jnp.float32)
    loss, gradient = both(embeddings, jnp.zeros(6, jnp.int32), margin=margin)
    assert loss == 0
    assert np.all(gradient == 0)


def test_satisfied_margin_costs_nothing_and_soft_margin_still_pulls():
    embeddings = jnp.asarray([[0.0, 0], [0.1, 0], [9, 0], [9.1, 0]], jnp.float32)
    pids = jnp.asarray([5, 5, 2, 2])
    assert triplet.batch_hard(embeddings, pids, margin=0.3) == 0
    assert triplet.batch_hard(embeddings, pids, margin=None) > 0


def test_order_of_the_batch_does_not_matter(batch, rng):
    embeddings, pids = batch
    order = rng.permutation(16)
    loss = jax.value_and_grad(triplet.batch_hard)
    value, gradient = loss(jnp.asarray(embeddings), jnp.asarray(pids))
    permuted_value, permuted_gradient = loss(jnp.asarray(embeddings[order]), jnp.asarray(pids[order]))
    np.testing.assert_allclose(permuted_value, value, rtol=1e-6)
    np.testing.assert_allclose(permuted_gradient, gradient[order], atol=1e-6)


def test_sharded_equals_unsharded(batch):
    embeddings, pids = batch
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))  # noqa: E731
    step = jax.jit(jax.value_and_grad(triplet.batch_hard))
    loss, gradient = step(jnp.asarray(embeddings), jnp.asarray(pids))
    sharded_loss, sharded_gradient = step(put(embeddings), put(pids))
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(sharded_gradient, gradient, atol=1e-7)


@pytest.mark.usefixtures("no_array_checks")
@pytest.mark.parametrize(
    ("embeddings", "pids", "margin", "message"),
    [
        (np.zeros((4, 3, 1), np.float32), np.zeros(4, np.int32), 0.3, "embeddings must be"),
        (np.zeros((4, 3), np.float32), np.zeros(3, np.int32), 0.3, "pids must be"),
        (np.zeros((4, 3), np.float32), np.zeros(4, np.float32), 0.3, "pids must be"),
        (np.zeros((4, 3), np.float32), np.zeros(4, np.int32), 0.0, "margin=0.0"),
        (np.zeros((4, 3), np.float32), np.zeros(4, np.int32), -0.1, "margin=-0.1"),
    ],
)
def test_misfits_raise_while_tracing(embeddings, pids, margin, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x, y: triplet.batch_hard(x, y, margin=margin), embeddings, pids)
