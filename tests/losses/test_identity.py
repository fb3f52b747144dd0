import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dmosnet_jax.losses import identity


def direct(logits, labels, epsilon):
    """Row by row, from the definition, in float64."""
    losses = []
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        log_probs = row - row.max() - np.log(np.exp(row - row.max()).sum())
        target = np.full(row.size, epsilon / (row.size - 1))
        target[label] = 1 - epsilon
        losses.append(-(target * log_probs).sum())
    return np.array(losses)


@pytest.fixture
def batch(rng):
    return rng.normal(0, 4, (24, 11)).astype(np.float32), rng.integers(0, 11, 24).astype(np.int32)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
def test_equals_the_definition(batch, epsilon):
    logits, labels = batch
    got = identity.cross_entropy(jnp.asarray(logits), jnp.asarray(labels), epsilon=epsilon)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, direct(logits, labels, epsilon).mean(), rtol=2e-6)


def test_smoothing_leaves_the_target_its_full_mass():
    # With the Szegedy form (epsilon / C on every class) the target would weigh 0.9 + 0.1 / 2 here.
    logits = jnp.asarray([[np.log(0.75), np.log(0.25)]], jnp.float32)
    expected = -(0.9 * np.log(0.75) + 0.1 * np.log(0.25))
    np.testing.assert_allclose(identity.cross_entropy(logits, jnp.zeros(1, jnp.int32)), expected, rtol=1e-6)


def test_gradient_is_softmax_minus_target(batch):
    logits, labels = batch
    got = jax.grad(lambda x: identity.cross_entropy(x, jnp.asarray(labels)))(jnp.asarray(logits))
    target = np.full(logits.shape, 0.1 / 10)
    target[np.arange(24), labels] = 0.9
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    np.testing.assert_allclose(got, (probs - target) / 24, atol=1e-7)


def test_mask_ignores_padding_whatever_it_holds(batch):
    logits, labels = batch
    padded_logits = np.concatenate([logits, np.full((3, 11), np.nan, np.float32)])
    padded_labels = np.concatenate([labels, [-1, 99, 0]]).astype(np.int32)
    mask = jnp.arange(27) < 24

    def loss(x):
        return identity.cross_entropy(x, jnp.asarray(padded_labels), mask=mask)

    np.testing.assert_allclose(loss(jnp.asarray(padded_logits)), direct(logits, labels, 0.1).mean(), rtol=2e-6)
    padded_logits[24:] = 7.0
    gradient = jax.grad(loss)(jnp.asarray(padded_logits))
    assert np.all(gradient[24:] == 0)
    assert np.all(np.isfinite(gradient))
    assert identity.cross_entropy(jnp.asarray(logits), jnp.asarray(labels), mask=jnp.zeros(24, bool)) == 0


@pytest.mark.parametrize("label", [-1, 11, 2**31 - 1])
def test_label_outside_the_classes_is_not_silent(batch, label):
    logits, labels = batch
    labels[5] = label
    assert np.isnan(identity.cross_entropy(jnp.asarray(logits), jnp.asarray(labels)))


def test_large_logits_stay_finite():
    logits = jnp.asarray([[1e30, -1e30, 0.0], [3e4, 3e4, -3e4]], jnp.float32)
    assert np.isfinite(identity.cross_entropy(logits, jnp.asarray([0, 1]), epsilon=0.0))


def test_half_precision_logits_are_summed_in_float32(batch):
    logits, labels = batch
    half = jnp.asarray(logits).astype(jnp.bfloat16)
    got = identity.cross_entropy(half, jnp.asarray(labels))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, direct(np.asarray(half.astype(jnp.float32)), labels, 0.1).mean(), rtol=2e-6)


def test_accuracy_counts(batch):
    logits, labels = batch
    expected = (logits.argmax(1) == labels).mean()
    np.testing.assert_allclose(identity.accuracy(jnp.asarray(logits), jnp.asarray(labels)), expected, rtol=1e-6)
    right = logits.argmax(1).astype(np.int32)
    right[:6] = (right[:6] + 1) % 11
    mask = jnp.arange(24) >= 4
    np.testing.assert_allclose(
        identity.accuracy(jnp.asarray(logits), jnp.asarray(right), mask=mask), 18 / 20, rtol=1e-6
    )


def test_sharded_equals_unsharded(batch):
    logits, labels = batch
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))  # noqa: E731
    step = jax.jit(jax.value_and_grad(identity.cross_entropy))
    loss, gradient = step(jnp.asarray(logits), jnp.asarray(labels))
    sharded_loss, sharded_gradient = step(put(logits), put(labels))
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(sharded_gradient, gradient, atol=1e-8)


@pytest.mark.usefixtures("no_array_checks")
@pytest.mark.parametrize(
    ("logits", "labels", "options", "message"),
    [
        (np.zeros((4, 3, 2), np.float32), np.zeros(4, np.int32), {}, "logits must be"),
        (np.zeros((4, 3), np.int32), np.zeros(4, np.int32), {}, "logits must be"),
        (np.zeros((4, 3), np.float32), np.zeros(5, np.int32), {}, "labels must be"),
        (np.zeros((4, 3), np.float32), np.zeros((4, 1), np.int32), {}, "labels must be"),
        (np.zeros((4, 3), np.float32), np.zeros(4, np.float32), {}, "labels must be"),
        (np.zeros((4, 3), np.float32), np.zeros(4, np.int32), {"mask": np.zeros(3, bool)}, "mask must be"),
        (np.zeros((4, 3), np.float32), np.zeros(4, np.int32), {"epsilon": 1.0}, "epsilon=1.0"),
        (np.zeros((4, 1), np.float32), np.zeros(4, np.int32), {}, "no other class"),
    ],
)
def test_misfits_raise_while_tracing(logits, labels, options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x, y: identity.cross_entropy(x, y, **options), logits, labels)


@pytest.fixture
def cosines(rng):
    return rng.uniform(-1, 1, (24, 11)).astype(np.float32), rng.integers(0, 11, 24).astype(np.int32)


def test_circle_logits_follow_the_definition(cosines):
    values, labels = cosines
    got = identity.circle_logits(jnp.asarray(values), jnp.asarray(labels), scale=32.0, margin=0.25)
    assert got.dtype == jnp.float32
    for row in range(24):
        for column in range(11):
            s = float(values[row, column])
            if column == labels[row]:
                wanted = 32 * max(1.25 - s, 0) * (s - 0.75)
            else:
                wanted = 32 * max(s + 0.25, 0) * (s - 0.25)
            assert got[row, column] == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_circle_logits_weigh_the_gradient_and_do_not_differentiate_the_weight(cosines):
    values, labels = cosines
    got = jax.grad(lambda s: jnp.sum(identity.circle_logits(s, jnp.asarray(labels))))(jnp.asarray(values))
    weights = np.maximum(values + 0.35, 0)
    rows = np.arange(24)
    weights[rows, labels] = np.maximum(1.35 - values[rows, labels], 0)
    np.testing.assert_allclose(got, 64 * weights, rtol=1e-5)


def test_circle_loss_falls_as_the_target_comes_nearer():
    near = jnp.asarray([[0.9, 0.0, -0.2]], jnp.float32)
    far = jnp.asarray([[0.3, 0.4, 0.2]], jnp.float32)
    label = jnp.zeros(1, jnp.int32)
    losses = [identity.cross_entropy(identity.circle_logits(x, label), label, epsilon=0.0) for x in (near, far)]
    assert float(losses[0]) < 1e-3 < float(losses[1])


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"margin": 0.0}, {"margin": -1.0}])
def test_circle_needs_positive_scale_and_margin(cosines, options):
    values, labels = cosines
    with pytest.raises(ValueError, match="must be positive"):
        identity.circle_logits(jnp.asarray(values), jnp.asarray(labels), **options)
