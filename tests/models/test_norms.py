"""Batch and instance norms against their formulas: groups, running statistics, gradients, many devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dmosnet_jax.models.functional import Functional
from dmosnet_jax.models.norms import NORM_EPSILON, BatchNorm, InstanceNorm, group_of, normalise_groups

CHANNELS = 5


def _draw(rng, *shape, scale=1.0, shift=0.0):
    return jnp.asarray(rng.normal(shift, scale, shape), jnp.float32)


def _plain(x, scale, bias):
    """Normalises `[groups, size, ..., C]` by the textbook formula, for autodiff."""
    axes = tuple(range(1, x.ndim - 1))
    mean, var = jnp.mean(x, axes, keepdims=True), jnp.var(x, axes, keepdims=True)
    wide = (1,) * (x.ndim - 1) + (-1,)
    return (x - mean) / jnp.sqrt(var + NORM_EPSILON) * scale.reshape(wide) + bias.reshape(wide)


def _with_gradients(function, weights, *arguments):
    """Value and gradients in one program: one by one, every operation would be compiled by itself."""

    @jax.jit
    def both(weights, *arguments):
        y, pull = jax.vjp(function, *arguments)
        return y, pull(weights)

    return both(weights, *arguments)


def _batch_norm(group_size=None):
    return Functional(lambda rngs: BatchNorm(CHANNELS, group_size=group_size))


def _drawn_norm(rng, group_size=None):
    module = _batch_norm(group_size)
    params = {"scale": _draw(rng, CHANNELS, shift=1.0), "bias": _draw(rng, CHANNELS)}
    stats = {"mean": _draw(rng, CHANNELS), "var": jnp.square(_draw(rng, CHANNELS)) + 0.5}
    return module, params, stats


@pytest.mark.parametrize("shape", [(1, 8, 4, 3, 5), (3, 4, 2, 2, 5), (2, 6, 5)])
def test_gradients_are_those_of_the_formula(rng, shape):
    x, weights = _draw(rng, *shape, scale=2.0, shift=0.7), _draw(rng, *shape)
    scale, bias = _draw(rng, CHANNELS, shift=1.0), _draw(rng, CHANNELS)
    (ours, got), (theirs, wanted) = (
        _with_gradients(function, weights, x, scale, bias) for function in (lambda *a: normalise_groups(*a)[0], _plain)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_constant_channel_has_finite_output_and_gradient():
    x = jnp.full((1, 8, 2, 2, CHANNELS), 1234.5, jnp.float32)
    y, pull = jax.vjp(lambda x: normalise_groups(x, jnp.ones(CHANNELS), jnp.zeros(CHANNELS))[0], x)
    assert np.isfinite(y).all()
    assert np.isfinite(pull(jnp.ones_like(y))[0]).all()


def test_evaluation_uses_the_running_statistics_and_keeps_them(rng):
    module, params, stats = _drawn_norm(rng)
    x = _draw(rng, 4, 3, 2, CHANNELS)
    y, kept = module.apply(params, stats, x, train=False)
    mean, var, scale, bias = map(np.asarray, (stats["mean"], stats["var"], params["scale"], params["bias"]))
    wanted = (np.asarray(x) - mean) / np.sqrt(var + NORM_EPSILON) * scale + bias
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, kept, stats)


def test_running_statistics_move_as_in_pytorch(rng):
    """Momentum 0.1 towards the batch's mean and its variance with the n - 1 denominator."""
    module, params, stats = _drawn_norm(rng)
    x = _draw(rng, 4, 3, 2, CHANNELS, scale=3.0, shift=1.0)
    _, moved = module.apply(params, stats, x, train=True)
    rows = np.asarray(x).reshape(-1, CHANNELS)
    np.testing.assert_allclose(moved["mean"], 0.9 * stats["mean"] + 0.1 * rows.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moved["var"], 0.9 * stats["var"] + 0.1 * rows.var(0, ddof=1), rtol=1e-5, atol=1e-6)


def test_groups_equal_separate_batches(rng):
    module, params, stats = _drawn_norm(rng, group_size=4)
    whole, *_ = _drawn_norm(rng)
    x = _draw(rng, 12, 3, 2, CHANNELS) * jnp.arange(1, 13, dtype=jnp.float32)[:, None, None, None]
    y, moved = module.apply(params, stats, x, train=True)
    parts = [whole.apply(params, stats, x[start : start + 4], train=True) for start in (0, 4, 8)]
    np.testing.assert_allclose(y, np.concatenate([part for part, _ in parts]), rtol=1e-4, atol=1e-5)
    for leaf in ("mean", "var"):
        np.testing.assert_allclose(moved[leaf], np.mean([each[leaf] for _, each in parts], axis=0), rtol=1e-5)
    together, _ = whole.apply(params, stats, x, train=True)
    assert np.abs(np.asarray(together) - np.asarray(y)).max() > 0.1


@pytest.mark.parametrize(("batch", "size", "wanted"), [(64, 16, 16), (8, 16, 8), (8, None, 8), (16, 16, 16)])
def test_group_of(batch, size, wanted):
    assert group_of(batch, size) == wanted


def test_a_batch_of_broken_groups_is_refused():
    with pytest.raises(ValueError, match="batch of 10 images is not a multiple of bn_group_size=4"):
        group_of(10, 4)


@pytest.mark.parametrize("group_size", [None, 4, 16])
def test_eight_devices_give_what_one_gives(rng, group_size):
    """Groups smaller than, equal to and larger than a device's share of the batch."""
    module, params, stats = _drawn_norm(rng, group_size)
    x, weights = _draw(rng, 32, 4, 2, CHANNELS, shift=0.5), _draw(rng, 32, 4, 2, CHANNELS)

    def run(params, stats, x):
        def loss(params, x):
            y, moved = module.apply(params, stats, x, train=True)
            return jnp.sum(y * weights), (y, moved)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    rows = NamedSharding(Mesh(np.asarray(jax.devices()), ("data",)), PartitionSpec("data"))
    everywhere = NamedSharding(rows.mesh, PartitionSpec())
    sharded = jax.jit(run, in_shardings=(everywhere, everywhere, rows))(params, stats, x)
    plain = jax.jit(run)(params, stats, x)
    assert len(sharded[0][1][0].sharding.device_set) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), sharded, plain)


def test_bfloat16_is_normalised_in_float32(rng):
    module, params, stats = _drawn_norm(rng)
    # A mean that is large against the spread: in bfloat16 the difference of the two moments would be noise.
    x = _draw(rng, 16, 8, 4, CHANNELS, scale=1.0, shift=8.0).astype(jnp.bfloat16)
    for train in (False, True):
        y, moved = module.apply(params, stats, x, train=train)
        wanted, wanted_stats = module.apply(params, stats, x.astype(jnp.float32), train=train)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(y.astype(jnp.float32), wanted, rtol=1e-2, atol=1e-2)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moved, wanted_stats)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(moved)} == {"float32"}


def test_instance_norm_is_per_image_and_channel(rng):
    module = Functional(lambda rngs: InstanceNorm(CHANNELS))
    params = {"scale": _draw(rng, CHANNELS, shift=1.0), "bias": _draw(rng, CHANNELS)}
    x, weights = _draw(rng, 3, 6, 4, CHANNELS, scale=2.0, shift=0.3), _draw(rng, 3, 6, 4, CHANNELS)

    def ours(params, x):
        return module.apply(params, {}, x, train=True)[0]

    def plain(params, x):
        # An image is a group of rows.
        return _plain(x, params["scale"], params["bias"])

    (y, got), (wanted, plainly) = (_with_gradients(function, weights, params, x) for function in (ours, plain))
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, plainly)
    alone = ours(params, x[1:2])
    np.testing.assert_allclose(alone, y[1:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mean", "std"), [(10, 0.05), (30, 0.03), (100, 0.1), (100, 0.03), (-1000, 1.0)])
def test_statistics_of_a_mean_far_from_zero(rng, mean, std):
    """In one pass, squares from zero lose the variance: at mean 100 and spread 0.03 they are off by its double."""
    x = jnp.asarray(mean + std * rng.normal(size=(2, 16, 8, 4, CHANNELS)), jnp.float32)
    exact = np.asarray(x, np.float64)
    scale, bias = _draw(rng, CHANNELS, shift=1.0), _draw(rng, CHANNELS)
    (y, means, variances), pull = jax.vjp(normalise_groups, x, scale, bias)
    np.testing.assert_allclose(variances, exact.var((1, 2, 3)), rtol=2e-3)
    np.testing.assert_allclose(means, exact.mean((1, 2, 3)), rtol=1e-6)
    unit = exact - exact.mean((1, 2, 3), keepdims=True)
    unit /= np.sqrt(exact.var((1, 2, 3), keepdims=True) + NORM_EPSILON)
    np.testing.assert_allclose(y, unit * np.asarray(scale) + np.asarray(bias), atol=0.02)
    weights = _draw(rng, *x.shape)
    dx, dscale, _ = pull((weights, jnp.zeros_like(means), jnp.zeros_like(variances)))
    np.testing.assert_allclose(dscale, (np.asarray(weights, np.float64) * unit).sum((0, 1, 2, 3)), rtol=0.01, atol=0.3)
    inner = np.asarray(weights, np.float64) * np.asarray(scale)
    centred = inner - inner.mean((1, 2, 3), keepdims=True) - unit * (inner * unit).mean((1, 2, 3), keepdims=True)
    wanted = centred / np.sqrt(exact.var((1, 2, 3), keepdims=True) + NORM_EPSILON)
    np.testing.assert_allclose(dx, wanted, rtol=0.01, atol=0.01 * np.abs(wanted).max())

    module = Functional(lambda rngs: InstanceNorm(CHANNELS))
    images = x.reshape(32, 8, 4, CHANNELS)
    y, _ = module.apply({"scale": jnp.ones(CHANNELS), "bias": jnp.zeros(CHANNELS)}, {}, images, train=True)
    exact = exact.reshape(32, 8, 4, CHANNELS)
    unit = (exact - exact.mean((1, 2), keepdims=True)) / np.sqrt(exact.var((1, 2), keepdims=True) + NORM_EPSILON)
    np.testing.assert_allclose(y, unit, atol=0.02)
