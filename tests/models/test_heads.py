"""Pooling, necks and classifiers against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmosnet_jax.models import build
from dmosnet_jax.models.functional import Functional
from dmosnet_jax.models.heads import Head, HeadSettings, cosines
from tests.models.drawn import draw_tree

WIDTH, CLASSES = 12, 5


def _run(rng, *, train=False, **options):
    head = Functional(lambda rngs: Head(WIDTH, HeadSettings(num_classes=CLASSES, **options), rngs=rngs))
    params, stats = (draw_tree(tree, rng) for tree in head.shapes())
    x = rng.normal(size=(6, 4, 3, WIDTH)).astype(np.float32)
    outputs, moved = head.apply(params, stats, jnp.asarray(x), train=train)
    return x, params, stats, outputs, moved


def _normalised(rows, params, stats):
    return (rows - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]


@pytest.mark.parametrize("pool", ["avg", "gem"])
def test_bnneck_normalises_the_pooled_map_and_keeps_it(rng, pool):
    x, params, stats, outputs, _ = _run(rng, pool=pool)
    pooled = x.mean((1, 2)) if pool == "avg" else (np.maximum(x, 1e-6) ** 3.0).mean((1, 2)) ** (1 / 3)
    np.testing.assert_allclose(outputs["pooled"], pooled, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(outputs["embedding"], outputs["pooled"])
    feature = _normalised(pooled, params["bottleneck"], stats["bottleneck"])
    np.testing.assert_allclose(outputs["feature"], feature, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(outputs["logits"], feature @ params["classifier"]["kernel"], rtol=1e-3, atol=1e-3)
    assert set(params["classifier"]) == {"kernel"}


def test_fc_neck_is_linear_norm_and_relu(rng):
    x, params, stats, outputs, _ = _run(rng, neck="fc")
    linear = x.mean((1, 2)) @ params["fc"]["0"]["kernel"] + params["fc"]["0"]["bias"]
    feature = np.maximum(_normalised(linear, params["fc"]["1"], stats["fc"]["1"]), 0)
    np.testing.assert_allclose(outputs["feature"], feature, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(outputs["embedding"], outputs["feature"])
    logits = feature @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    np.testing.assert_allclose(outputs["logits"], logits, rtol=1e-3, atol=1e-3)


def test_no_neck_is_the_pooled_map(rng):
    x, params, stats, outputs, _ = _run(rng, neck="none")
    np.testing.assert_allclose(outputs["feature"], x.mean((1, 2)), rtol=1e-5, atol=1e-6)
    assert set(params) == {"classifier"}
    assert stats == {}


@pytest.mark.parametrize("neck", ["bnneck", "fc", "none"])
def test_circle_logits_are_cosines_without_bias(rng, neck):
    _, params, _, outputs, _ = _run(rng, neck=neck, classifier="circle")
    assert set(params["classifier"]) == {"kernel"}
    kernel, feature = np.asarray(params["classifier"]["kernel"]), np.asarray(outputs["feature"])
    for row in range(6):
        for column in range(CLASSES):
            length = np.linalg.norm(feature[row]) * np.linalg.norm(kernel[:, column])
            wanted = feature[row] @ kernel[:, column] / length
            assert outputs["logits"][row, column] == pytest.approx(wanted, abs=1e-5)


def test_cosines_of_zero_vectors_are_zero_with_finite_gradient(rng):
    features = jnp.zeros((2, 4)).at[0].set(1.0)
    value, gradient = jax.value_and_grad(lambda f: jnp.sum(cosines(f, jnp.ones((4, 3)))))(features)
    assert float(value) == pytest.approx(3.0, abs=1e-5)
    assert np.isfinite(gradient).all()


def test_gem_learns_its_exponent(rng):
    head = Functional(lambda rngs: Head(WIDTH, HeadSettings(pool="gem"), rngs=rngs))
    params, stats = (draw_tree(tree, rng) for tree in head.shapes())
    x = rng.normal(size=(6, 4, 3, WIDTH))

    def pooled(p):
        changed = {**params, "pool": {"p": p}}
        return jnp.sum(head.apply(changed, stats, x, train=False)[0]["pooled"])

    p = np.array([2.5])
    with jax.enable_x64(True):
        slope = (pooled(p + 1e-4) - pooled(p - 1e-4)) / 2e-4
        np.testing.assert_allclose(jax.grad(pooled)(p)[0], slope, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "neck", "wanted"),
    [("osnet_x0_25", "fc", 512), ("osnet_x0_25", "bnneck", 128), ("resnet50", "none", 2048), ("resnet50", "fc", 512)],
)
def test_feature_dim(name, neck, wanted):
    assert build(name, neck=neck).feature_dim == wanted
