"""The fast forms against plain convolutions: values and gradients, in both ways of summing the weights' gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dmosnet_jax.models import convolution
from dmosnet_jax.models.convolution import depthwise3x3, pointwise
from dmosnet_jax.models.draws import Draws
from dmosnet_jax.models.layers import Conv, average_pool, max_pool3x3

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def _plain(x, kernel, *, groups=1, stride=1):
    pad = (kernel.shape[0] - 1) // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=DIMENSIONS, feature_group_count=groups
    )


def _draw(rng, *shapes):
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def _value_and_gradients(function, x, kernel, weights):
    y, pull = jax.vjp(function, x, kernel)
    return y, *pull(weights)


def _compiled(function, *arrays):
    return jax.jit(functools.partial(_value_and_gradients, function))(*arrays)


@pytest.fixture(params=["scan", "reduction"])
def path(request, monkeypatch):
    """Forces one of the two ways in which the gradient of the weights is summed."""
    monkeypatch.setattr(convolution, "_scan_pays", lambda x: request.param == "scan")
    return request.param


@pytest.mark.parametrize("shape", [(8, 6, 5, 7), (16, 3, 3, 4), (3, 8, 4, 5), (1, 1, 1, 2)])
def test_pointwise_is_a_1x1_convolution(rng, path, shape):
    x, kernel, weights = _draw(rng, shape, (shape[-1], 9), (*shape[:-1], 9))
    got = _compiled(pointwise, x, kernel, weights)
    wanted = _compiled(lambda x, k: _plain(x, k[None, None]), x, kernel, weights)
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 6, 5, 7), (2, 3, 8, 4), (3, 1, 1, 5), (1, 2, 1, 3)])
def test_depthwise_is_a_grouped_convolution(rng, path, shape):
    channels = shape[-1]
    x, kernel, weights = _draw(rng, shape, (3, 3, 1, channels), shape)
    got = _compiled(depthwise3x3, x, kernel, weights)
    wanted = _compiled(lambda x, k: _plain(x, k, groups=channels), x, kernel, weights)
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_bfloat16_sums_the_gradient_of_the_weights_in_float32(rng, path):
    # 4,096 ones added in bfloat16 stop at 256.
    x, kernel = jnp.ones((8, 32, 16, 2), jnp.bfloat16), jnp.ones((3, 3, 1, 2), jnp.bfloat16)
    _, _, taps = _value_and_gradients(depthwise3x3, x, kernel, x)
    assert taps.dtype == jnp.bfloat16
    assert float(taps[1, 1, 0, 0]) == 8 * 32 * 16
    _, _, product = _value_and_gradients(pointwise, x, jnp.eye(2, dtype=jnp.bfloat16), x)
    np.testing.assert_array_equal(product.astype(jnp.float32), np.full((2, 2), 8 * 32 * 16, np.float32))


def test_bfloat16_depthwise_is_a_float32_sum_rounded_once(rng):
    x, kernel = (value.astype(jnp.bfloat16) for value in _draw(rng, (4, 16, 8, 64), (3, 3, 1, 64)))
    exact = _plain(x.astype(jnp.float32), kernel.astype(jnp.float32), groups=64)
    got, pull = jax.vjp(jax.jit(depthwise3x3), x, kernel)
    assert got.dtype == jnp.bfloat16
    # Two float32 sums in another order may fall on the two sides of a rounding boundary, rarely.
    assert np.mean(np.asarray(got) == np.asarray(exact.astype(jnp.bfloat16))) > 0.999
    dx, _ = pull(got)
    exact = _plain(got.astype(jnp.float32), kernel.astype(jnp.float32)[::-1, ::-1], groups=64)
    assert np.mean(np.asarray(dx) == np.asarray(exact.astype(jnp.bfloat16))) > 0.999


def test_the_scan_is_chosen_on_one_cpu_and_a_large_array_only(monkeypatch):
    def pays(elements, devices, backend="cpu"):
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        return convolution._scan_pays(jax.ShapeDtypeStruct((elements,), jnp.float32))

    assert pays(1 << 19, 1)
    assert not pays(1 << 18, 1)
    assert not pays(1 << 19, 8)
    assert not pays(1 << 19, 1, "gpu")


@pytest.mark.parametrize(
    ("size", "stride", "depthwise", "bias"),
    [(1, 1, False, True), (1, 2, False, False), (3, 1, True, True), (3, 2, False, False), (7, 2, False, False)],
)
def test_conv_layer_pads_and_strides_as_in_the_reference(rng, size, stride, depthwise, bias):
    inputs, outputs = 6, 6 if depthwise else 10
    layer = Conv(inputs, outputs, size, stride=stride, depthwise=depthwise, bias=bias, rngs=Draws())
    x, kernel, offset = _draw(rng, (2, 9, 8, inputs), layer.kernel[...].shape, (outputs,))
    layer.kernel[...] = kernel
    wanted = _plain(x, kernel, stride=stride, groups=inputs if depthwise else 1)
    if bias:
        layer.bias[...] = offset
        wanted = wanted + offset[None, None, None, :]
    np.testing.assert_allclose(layer(x), wanted, rtol=1e-4, atol=1e-4)


def test_depthwise_layer_refuses_other_sizes():
    with pytest.raises(ValueError, match="depthwise needs 3x3, stride 1"):
        Conv(4, 4, 5, depthwise=True, rngs=Draws())


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (1, 2, 2, 1), (2, 4, 10, 2)])
def test_max_pool_and_its_gradient(rng, shape, padded):
    border = (1, 0) if padded else (0, 1)

    def plain(x):
        padding = [(0, 0), border, border, (0, 0)]
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)

    (x,) = _draw(rng, shape)
    (weights,) = _draw(rng, jax.eval_shape(plain, x).shape)
    ours, pull = jax.vjp(lambda x: max_pool3x3(x, padded=padded), x)
    theirs, pull_plain = jax.vjp(plain, x)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(pull(weights)[0], pull_plain(weights)[0], rtol=1e-6)


@pytest.mark.parametrize(("shape", "size"), [((2, 8, 6, 3), 2), ((1, 16, 8, 2), 8), ((1, 5, 7, 2), 2)])
def test_average_pool_drops_the_rest(rng, shape, size):
    (x,) = _draw(rng, shape)
    window = (1, size, size, 1)
    wanted = lax.reduce_window(x, 0.0, lax.add, window, window, "VALID") / size**2
    np.testing.assert_allclose(average_pool(x, size), wanted, rtol=1e-5, atol=1e-6)
