"""Blocks and whole networks: training, statistics, compute dtype, devices, and the attention against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dmosnet_jax.core.trees import named_leaves
from dmosnet_jax.models import build, layers, norms
from dmosnet_jax.models.attention import DoubleLayerAttention, attend, from_windows, to_windows
from dmosnet_jax.models.functional import Functional
from dmosnet_jax.models.osnet import OSBlock
from tests.models.drawn import draw_tree

# The smallest on which the attention has more than one window.
SIZE = (64, 32)
# Compiled in two thirds of the time; used where speed and the last bit do not matter.
QUICKLY = {"xla_backend_optimization_level": 0}


def _images(rng, count, size=SIZE):
    return jnp.asarray(rng.normal(size=(count, *size, 3)), jnp.float32)


def _copied(tree):
    return jax.tree.map(np.array, tree)


def _unmoved(before, after):
    """Names of statistics that a step left as they were."""
    was = dict(named_leaves(before))
    return [name for name, leaf in named_leaves(after) if np.array_equal(leaf, was[name])]


def _block(attention, group_size=None, width=32):
    return Functional(
        lambda rngs: OSBlock(width, 2 * width, ibn=True, attention=attention, group_size=group_size, rngs=rngs)
    )


@pytest.fixture(scope="module")
def small():
    """A network, and one pass in training mode on eight images: its outputs, statistics and gradients."""
    model = build("dmosnet_ibn_x0_25", num_classes=5, image_size=SIZE)
    rng = np.random.default_rng(0)
    params, stats = (jax.tree.map(jnp.asarray, draw_tree(tree, rng)) for tree in model.shapes())
    images = _images(rng, 8)
    before = _copied((params, stats))

    def loss(params, stats, images):
        outputs, moved = model.apply(params, stats, images, train=True)
        by_class = jax.nn.log_softmax(outputs["logits"])[:, 0].mean()
        return jnp.mean(jnp.square(outputs["embedding"])) - by_class, (outputs, moved)

    compiled = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICKLY)
    gradients, (outputs, moved) = compiled(params, stats, images)
    evaluate = jax.jit(lambda p, s, x: model.apply(p, s, x, train=False))
    return model, evaluate, params, stats, images, before, outputs, moved, gradients


def test_every_statistic_moves_in_a_training_pass(small):
    _, _, _, stats, *_, moved, _ = small
    assert _unmoved(stats, moved) == []
    # The check itself: a step that returns what it was given is caught with all its names.
    assert len(_unmoved(stats, stats)) == len(jax.tree.leaves(stats)) > 100


def test_apply_leaves_its_inputs_alone(small):
    _, _, params, stats, _, before, _, moved, _ = small
    jax.tree.map(np.testing.assert_array_equal, (params, stats), before)
    assert jax.tree.structure(moved) == jax.tree.structure(stats)


def test_init_depends_on_the_key_only():
    block = _block(attention=False)
    first, again, other = (block.init(jax.random.key(seed))[0]["conv3"]["conv"]["kernel"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_outputs_are_finite_float32(small):
    *_, outputs, _, _ = small
    for name, width in (("pooled", 128), ("embedding", 128), ("feature", 128), ("logits", 5)):
        assert outputs[name].shape == (8, width)
        assert outputs[name].dtype == jnp.float32
        assert np.isfinite(outputs[name]).all()
    np.testing.assert_allclose(outputs["pooled"], outputs["embedding"])


def test_evaluation_is_per_image_and_keeps_statistics(small):
    _, run, params, stats, images, *_ = small
    outputs, kept = run(params, stats, images)
    jax.tree.map(np.testing.assert_array_equal, kept, stats)
    order = np.array([3, 1, 0, 2, 7, 6, 5, 4])
    swapped, _ = run(params, stats, images[order])
    np.testing.assert_allclose(swapped["feature"], outputs["feature"][order], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_bfloat16_stays_near_float32(small):
    model, run, params, stats, images, *_ = small
    half = build(model.name, num_classes=5, image_size=SIZE, dtype="bfloat16")
    assert half.shapes() == model.shapes()
    outputs, kept = jax.jit(lambda p, s, x: half.apply(p, s, x, train=False))(params, stats, images)
    wanted, _ = run(params, stats, images)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((outputs, kept))} == {"float32"}
    cosine = np.sum(outputs["feature"] * wanted["feature"], 1)
    cosine /= np.linalg.norm(outputs["feature"], axis=1) * np.linalg.norm(wanted["feature"], axis=1)
    assert cosine.min() > 0.99
    assert np.abs(np.asarray(outputs["feature"]) - wanted["feature"]).max() > 0


@pytest.mark.slow
def test_gradients_reach_every_parameter(small):
    *_, gradients = small
    for name, leaf in named_leaves(gradients):
        assert np.isfinite(leaf).all(), name
        # A bias in front of a norm cancels, and the gate's few hidden units may be off; other kernels count.
        if name.endswith("kernel") and ".gate." not in name:
            assert np.abs(leaf).max() > 1e-6, name


def _loss_of(block, params, stats, x, weights):
    def loss(params, x):
        y, moved = block.apply(params, stats, x, train=True)
        return jnp.sum(y.astype(weights.dtype) * weights), (y, moved)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def _block_inputs(block, rng, batch=4, dtype=np.float32):
    params, stats = block.init(jax.random.key(1))
    x, weights = (rng.normal(size=(batch, 8, 8, width)).astype(dtype) for width in (32, 64))
    return params, stats, x, weights


def _assert_near(got, wanted, tolerance):
    """Every leaf within `tolerance` of its largest value; what cancels to nearly zero, of the tree's largest."""
    top = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    for (path, theirs), ours in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(got), strict=True):
        scale = max(np.abs(theirs).max(), 1e-2 * top)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale, err_msg=str(path))


@pytest.mark.parametrize("attention", [False, True])
def test_block_gradients_are_those_of_plain_layers(rng, monkeypatch, attention):
    """The fast convolutions and norms, composed, against lax convolutions and the formula under autodiff."""
    block = _block(attention)
    inputs = _block_inputs(block, rng, dtype=np.float64)
    with jax.enable_x64(True):
        ours = jax.jit(lambda *a: _loss_of(block, *a), compiler_options=QUICKLY)(*inputs)

    def plain_conv(x, kernel, groups=1):
        pad = (kernel.shape[0] - 1) // 2
        dimensions = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (1, 1), [(pad, pad)] * 2, dimension_numbers=dimensions, feature_group_count=groups
        )

    def plain_norm(x, scale, bias, relu=False):
        axes = tuple(range(1, x.ndim - 1))
        mean, var = jnp.mean(x, axes, keepdims=True), jnp.var(x, axes, keepdims=True)
        wide = (1,) * (x.ndim - 1) + (-1,)
        y = (x - mean) / jnp.sqrt(var + norms.NORM_EPSILON) * scale.reshape(wide) + bias.reshape(wide)
        y = jnp.where(y > 0, y, 0) if relu else y
        return y, mean.reshape(x.shape[0], -1), var.reshape(x.shape[0], -1)

    monkeypatch.setattr(layers, "pointwise", lambda x, kernel: plain_conv(x, kernel[None, None]))
    monkeypatch.setattr(layers, "depthwise3x3", lambda x, kernel: plain_conv(x, kernel, groups=x.shape[-1]))
    monkeypatch.setattr(norms, "normalise_groups", plain_norm)
    with jax.enable_x64(True):
        plain = jax.jit(lambda *a: _loss_of(block, *a), compiler_options=QUICKLY)(*inputs)
    _assert_near(ours, plain, 1e-6)


def test_block_in_bfloat16_keeps_float32_gradients(rng):
    block = _block(attention=True)
    params, stats, x, weights = _block_inputs(block, rng)
    run = jax.jit(lambda *a: _loss_of(block, *a), compiler_options=QUICKLY)
    (_, (y, moved)), (gradients, _) = run(params, stats, jnp.asarray(x, jnp.bfloat16), weights)
    (_, (wanted, wanted_stats)), (wanted_gradients, _) = run(params, stats, x, weights)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves((moved, gradients))} == {"float32"}
    _assert_near(moved, wanted_stats, 0.03)
    assert np.abs(np.asarray(y, np.float32) - wanted).mean() < 0.05 * np.abs(np.asarray(wanted)).mean()
    flat, wanted_flat = (
        jnp.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (gradients, wanted_gradients)
    )
    assert jnp.vdot(flat, wanted_flat) > 0.98 * jnp.linalg.norm(flat) * jnp.linalg.norm(wanted_flat)


def test_block_over_eight_devices_equals_one(rng):
    block = _block(attention=True, group_size=4)
    inputs = _block_inputs(block, rng, batch=16, dtype=np.float64)
    rows = NamedSharding(Mesh(np.asarray(jax.devices()), ("data",)), PartitionSpec("data"))
    everywhere = NamedSharding(rows.mesh, PartitionSpec())

    def run(*arguments):
        return _loss_of(block, *arguments)

    with jax.enable_x64(True):
        sharded = jax.jit(run, in_shardings=(everywhere, everywhere, rows, rows), compiler_options=QUICKLY)(*inputs)
        _assert_near(sharded, jax.jit(run, compiler_options=QUICKLY)(*inputs), 1e-6)


def _naive_attention(q, k, v):
    """One head at a time, one query at a time, in float64."""
    out = np.zeros(q.shape)
    for head in range(q.shape[1]):
        for row in range(q.shape[0]):
            scores = k[:, head] @ q[row, head] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[row, head] = weights / weights.sum() @ v[:, head]
    return out


def test_attend_is_softmax_attention(rng):
    q, k, v = (rng.normal(size=(2, rows, 3, 4)) for rows in (5, 7, 7))
    got = attend(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)))
    for part in range(2):
        np.testing.assert_allclose(got[part], _naive_attention(q[part], k[part], v[part]), rtol=1e-4, atol=1e-5)


def test_windows_are_tiles_of_the_map(rng):
    x = rng.normal(size=(2, 16, 24, 3))
    windows = to_windows(jnp.asarray(x), 8)
    assert windows.shape == (2, 6, 64, 3)
    np.testing.assert_array_equal(windows[1, 4], x[1, 8:16, 8:16].reshape(64, 3).astype(np.float32))
    np.testing.assert_array_equal(from_windows(windows, 16, 24, 8), x.astype(np.float32))


def test_first_layer_sees_its_window_and_second_the_whole_map(rng):
    """With the second layer's values at zero nothing crosses a window's border; with them everything does."""
    attention = Functional(lambda rngs: DoubleLayerAttention(32, group_size=None, rngs=rngs))
    params, stats = attention.init(jax.random.key(0))
    x = jnp.asarray(rng.normal(size=(1, 16, 16, 32)), jnp.float32)
    touched = x.at[0, 2, 3].add(5.0)
    alone = {**params, "kv": {"kernel": params["kv"]["kernel"] * 0, "bias": params["kv"]["bias"]}}
    run = jax.jit(lambda p, x: attention.apply(p, stats, x, train=False)[0])
    for weights, crosses in ((alone, False), (params, True)):
        change = np.abs(np.asarray(run(weights, touched) - run(weights, x))).max(-1)[0]
        assert (change[:8, :8] > 0).all()
        assert (change[8:].max() > 1e-6) == crosses
        assert (change[:8, 8:].max() > 1e-6) == crosses
