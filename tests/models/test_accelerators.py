"""The forms that accelerators compute, run on CPU, against those that CPUs compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmosnet_jax import models
from dmosnet_jax.models import convolution, norms
from dmosnet_jax.models.activation import relu
from dmosnet_jax.models.counting import count

NAMES = ("osnet_x0_25", "dmosnet_ibn_x0_25", "osnet_ain_x0_25", "resnet50")


def _network(name, **options):
    model = models.build(name, num_classes=5, image_size=(64, 64), **options)
    params, stats = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    # Running statistics and scales that change something.
    stats = jax.tree.map(lambda a: a + rng.uniform(0.1, 0.5, a.shape).astype(np.float32), stats)
    images = rng.standard_normal((4, 64, 64, 3), np.float32)
    return model, params, stats, images


@pytest.fixture
def accelerator(monkeypatch):
    """Chooses an accelerator's forms, whatever computes."""

    def choose():
        monkeypatch.setattr(convolution, "merges", lambda x: True)
        monkeypatch.setattr("dmosnet_jax.models.osnet.merges", lambda x: True)
        monkeypatch.setattr(norms, "folds", lambda: True)

    return choose


@pytest.mark.parametrize("name", NAMES)
def test_inference(name, accelerator):
    model, params, stats, images = _network(name)
    expected = model.apply(params, stats, images, train=False)[0]["feature"]
    accelerator()
    found = model.apply(params, stats, images, train=False)[0]["feature"]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES[:2])
def test_training(name, accelerator):
    """In float64: in float32 the maps of drawn weights magnify the last digits, in which the forms differ."""
    with jax.enable_x64(True):
        model, params, stats, images = _network(name, dtype="float64")
        params, images = jax.tree.map(np.float64, params), images.astype(np.float64)

        def loss(params):
            outputs, moved = model.apply(params, stats, images, train=True)
            return jnp.sum(jnp.sin(outputs["logits"] * 10)), moved

        expected = jax.value_and_grad(loss, has_aux=True)(params)
        accelerator()
        found = jax.value_and_grad(loss, has_aux=True)(params)
    top = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7 * top)


def test_operations_are_those_of_the_two_convolutions(accelerator):
    model, params, stats, images = _network("dmosnet_x0_25")

    def run(p, s, x):
        return model.apply(p, s, x, train=False)[0]["feature"]

    expected = count(run, params, stats, images)
    accelerator()
    assert count(run, params, stats, images) == expected


def test_exact_products_are_not_merged(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    single, half = jnp.zeros((1, 8, 8, 16)), jnp.zeros((1, 8, 8, 16), jnp.bfloat16)
    assert convolution.merges(single)
    assert convolution.merges(half)
    with jax.default_matmul_precision("highest"):
        assert not convolution.merges(single)
        assert convolution.merges(half)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert not convolution.merges(half)


def test_relu():
    x = jnp.array([-1.0, 0.0, 2.0, jnp.nan])
    np.testing.assert_array_equal(relu(x), [0, 0, 2, np.nan])
    np.testing.assert_array_equal(jax.vjp(relu, x)[1](jnp.full(4, 3.0))[0], [0, 0, 3, 0])


@pytest.mark.parametrize("groups", [1, 3])
def test_norm_with_relu(groups):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((groups, 2, 4, 4, 8), np.float32)
    scale, bias = rng.standard_normal((2, 8), np.float32)
    weights = rng.standard_normal(x.shape, np.float32)

    def apart(x, scale, bias):
        return relu(norms.normalise_groups(x, scale, bias)[0])

    def joined(x, scale, bias):
        return norms.normalise_groups(x, scale, bias, True)[0]

    (y, pull), (expected, expected_pull) = jax.vjp(joined, x, scale, bias), jax.vjp(apart, x, scale, bias)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    for a, b in zip(pull(weights), expected_pull(weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_stem_of_blocks(monkeypatch):
    rng = np.random.default_rng(2)
    x, kernel = rng.standard_normal((2, 32, 48, 3), np.float32), rng.standard_normal((7, 7, 3, 16), np.float32)
    expected, expected_pull = jax.vjp(convolution.stem7x7, x, kernel)
    monkeypatch.setattr(convolution, "merges", lambda x: True)
    found, pull = jax.vjp(convolution.stem7x7, x, kernel)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    weights = rng.standard_normal(found.shape, np.float32)
    for a, b in zip(pull(weights), expected_pull(weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
