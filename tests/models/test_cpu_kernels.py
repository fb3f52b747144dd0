"""The kernels of training on one CPU: the same mathematics as XLA's programs."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmosnet_jax import models
from dmosnet_jax.core import simd
from dmosnet_jax.models import convolution, cpu_kernels, cpu_products, fused
from dmosnet_jax.models.convolution import pointwise, stem7x7

SHAPES = {
    "one vector a position": (6, 5, 8, 16, 3),
    "three vectors in two positions": (8, 8, 4, 24, 2),
    "wide": (4, 6, 4, 96, 1),
    "more than a vector over": (4, 3, 8, 72, 4),
    "one row": (8, 1, 4, 32, 2),
}
FORMS = {
    "depthwise": {"depthwise": True, "relu": True, "residual": False},
    "relu": {"depthwise": False, "relu": True, "residual": False},
    "linear": {"depthwise": False, "relu": False, "residual": False},
    "residual": {"depthwise": False, "relu": True, "residual": True},
}


@pytest.fixture
def kernels(monkeypatch):
    """As on a machine with one device; the programs of a test are for one."""
    monkeypatch.setattr(simd, "available", lambda: True)
    monkeypatch.setattr(fused, "LEAST_FLOATS", 0)
    monkeypatch.setattr(convolution, "_KERNEL_FROM_ELEMENTS", 0)
    monkeypatch.setattr(convolution, "_KERNEL_FROM_WEIGHTS", 0)


def arguments(rng, shape, depthwise, relu, residual):
    images, height, width, channels, _ = shape

    def normal(*sizes):
        return rng.standard_normal(sizes).astype(np.float32)

    # A mean far from zero, as an image of one colour gives.
    x = normal(images, height, width, channels) + 20 * normal(channels)
    kernel = normal(3, 3, 1, channels) if depthwise else None
    identity = normal(images, height, width, channels) if residual else None
    return x, kernel, normal(channels), normal(channels), identity


def directly(x, kernel, scale, bias, residual, groups, relu):
    """The definition, in the dtype of its arguments."""
    if kernel is not None:
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        height, width = x.shape[1:3]
        x = sum(padded[:, i : i + height, j : j + width] * kernel[i, j][None, None] for i in range(3) for j in range(3))
    grouped = x.reshape(groups, -1, x.shape[-1])
    mean, var = grouped.mean(axis=1, keepdims=True), grouped.var(axis=1, keepdims=True)
    y = (grouped - mean) / jnp.sqrt(var + fused.NORM_EPSILON) * scale[None, None] + bias[None, None]
    y = y.reshape(x.shape) + (0 if residual is None else residual)
    y = jnp.maximum(y, 0) if relu else y
    return y, y.mean(axis=(1, 2)), mean[:, 0], var[:, 0]


def with_gradients(function, values, groups, relu, weights):
    """Outputs, and the gradients to all that is given of a weighted sum of map and pooled map."""

    def run(values):
        outputs, pull = jax.vjp(lambda *v: function(*v, groups, relu), *values)
        rest = [jnp.zeros_like(o) for o in outputs[2:]]
        return outputs, pull((*(jnp.asarray(w, o.dtype) for w, o in zip(weights, outputs, strict=False)), *rest))

    return jax.tree.leaves(jax.jit(run)(values))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SHAPES)
def test_norms_and_their_gradients_are_those_of_the_definition(rng, name, form):
    shape, flags = SHAPES[name], FORMS[form]
    values = arguments(rng, shape, **flags)
    weights = rng.standard_normal(shape[:4]), rng.standard_normal((shape[0], shape[3]))
    found = with_gradients(fused.normalise, values, shape[4], flags["relu"], weights)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        exact = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), values)
        expected = with_gradients(directly, exact, shape[4], flags["relu"], weights)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, atol=3e-5 * np.abs(other).max())


def test_any_number_of_threads_gives_the_same_bits(rng):
    values = arguments(rng, (16, 32, 16, 16, 2), depthwise=True, relu=True, residual=False)
    weights = rng.standard_normal((16, 32, 16, 16)), rng.standard_normal((16, 16))
    columns = rng.standard_normal((16, 80)).astype(np.float32)
    target, results = cpu_kernels.target(), []
    for threads in (1, 2, 5):
        cpu_kernels.target.cache_clear()
        simd_name = simd.register(f"{target}_{threads}", threads)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_kernels, "target", lambda name=simd_name: name)
            found = with_gradients(fused.normalise, values, 2, True, weights)
            w = cpu_products.panels(columns)
            multiply = jax.jit(lambda x, w=w: cpu_kernels.call("multiply", [(1024, 8, 80)], x.reshape(1024, 8, 16), w))
            results.append(found + multiply(values[0]))
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, results[0])


def test_what_is_not_a_number_is_not_hidden(rng):
    x, kernel, scale, bias, _ = arguments(rng, SHAPES["one row"], depthwise=True, relu=True, residual=False)
    x[3, 0, 2, 5] = np.nan
    y, pooled, *_ = jax.jit(lambda *v: fused.normalise(*v, None, 2, True))(x, kernel, scale, bias)
    # The images of the same group lose that channel, the others keep it.
    assert np.isnan(y[:4, :, :, 5]).all()
    assert np.isnan(pooled[:4, 5]).all()
    assert np.isfinite(y[4:]).all()


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 16), (64, 64), (24, 80), (96, 384), (16, 144)])
def test_products_over_positions(rng, kernels, inputs, outputs):
    x = rng.standard_normal((16, 6, 5, inputs)).astype(np.float32)
    gradient = rng.standard_normal((16, 6, 5, outputs)).astype(np.float32)
    weights = np.zeros((inputs, outputs), np.float32)
    run = jax.jit(lambda x, w, g: jax.vjp(pointwise, x, w)[1](g)[1])
    assert "dmosnet_jax" in run.lower(x, weights, gradient).as_text()
    expected = np.einsum("bhwi,bhwo->io", x, gradient, dtype=np.float64)
    np.testing.assert_allclose(run(x, weights, gradient), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 16), (64, 64), (24, 80), (96, 384), (16, 144), (512, 48)])
def test_products_at_each_position(rng, kernels, inputs, outputs):
    x = rng.standard_normal((3, 6, 12, inputs)).astype(np.float32)
    weights = rng.standard_normal((inputs, outputs)).astype(np.float32)
    run = jax.jit(pointwise)
    assert "dmosnet_jax" in run.lower(x, weights).as_text()
    expected = np.einsum("bhwi,io->bhwo", x, weights, dtype=np.float64)
    np.testing.assert_allclose(run(x, weights), expected, atol=2e-6 * np.abs(expected).max())
    # Of positions that are no multiple of eight XLA makes the products.
    assert "dmosnet_jax" not in run.lower(x[:, :, :3], weights).as_text()
    gradient = rng.standard_normal(expected.shape).astype(np.float32)
    found = jax.jit(lambda g: jax.vjp(lambda x: pointwise(x, weights), x)[1](g)[0])(gradient)
    expected = np.einsum("bhwo,io->bhwi", gradient, weights, dtype=np.float64)
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("height", "width", "outputs"), [(32, 16, 16), (10, 48, 64), (64, 32, 48)])
def test_gradient_of_the_first_convolution(rng, kernels, height, width, outputs):
    x = rng.standard_normal((8, height, width, 3)).astype(np.float32)
    gradient = rng.standard_normal((8, height // 2, width // 2, outputs)).astype(np.float32)
    weights = np.zeros((7, 7, 3, outputs), np.float32)

    def run(x, w, g):
        return jax.vjp(stem7x7, x, w)[1](g)[1]

    assert "dmosnet_jax" in jax.jit(run).lower(x, weights, gradient).as_text()
    with jax.enable_x64(True):
        wide = [np.float64(v) for v in (x, weights, gradient)]
        plain = jax.vjp(convolution._convolve7x7, *wide[:2])[1](wide[2])[1]
    np.testing.assert_allclose(jax.jit(run)(x, weights, gradient), plain, atol=1e-5 * np.abs(plain).max())


def trained_and_tested(name, dtype, arguments):
    """The text of a network's program, and a function of its arguments: what it gives, as four vectors.

    They are the outputs, the statistics after a step, the feature by these, and the gradients.
    """
    size = arguments[2].shape[1:3]
    model = models.build(name, num_classes=5, image_size=size, bn_group_size=4, dtype=dtype)

    def run(params, stats, images, weights):
        def loss(params):
            outputs, new = model.apply(params, stats, images, train=True)
            return jnp.sum(outputs["logits"] * weights), (outputs, new)

        (_, (outputs, new)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        tested = model.apply(params, new, images, train=False)[0]["feature"]
        return outputs, new, tested, gradient

    program = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0}).lower(*arguments)
    compiled = program.compile()

    def vectors(*arguments):
        parts = compiled(*arguments)
        return [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(part)]) for part in parts]

    return program.as_text(), vectors


def relative_errors(vectors, exact):
    return [np.linalg.norm(one - other) / np.linalg.norm(other) for one, other in zip(vectors, exact, strict=True)]


def test_a_network_is_as_near_to_float64_as_with_xla(rng, request):
    name, size = "dmosnet_ibn_x0_25", (64, 64)
    trees = models.build(name, num_classes=5, image_size=size).init(jax.random.key(1))
    draws = [[rng.standard_normal(shape).astype(np.float32) for shape in ((8, *size, 3), (8, 5))] for _ in range(11)]
    batches = [(*trees, *draw) for draw in draws]
    _, plain = trained_and_tested(name, "float32", batches[0])
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = [jax.tree.map(np.float64, batch) for batch in batches]
        _, exactly = trained_and_tested(name, "float64", wide[0])
        exact = [exactly(*batch) for batch in wide]
    usual = [relative_errors(plain(*batch), truth) for batch, truth in zip(batches, exact, strict=True)]
    request.getfixturevalue("kernels")
    text, by_kernels = trained_and_tested(name, "float32", batches[0])
    assert text.count("@dmosnet_jax_") > 50
    ours = [relative_errors(by_kernels(*batch), truth) for batch, truth in zip(batches, exact, strict=True)]
    # A ReLU that falls the other way shows in a single batch, by either program: so the medians over eleven.
    ours, usual = np.median(ours, axis=0), np.median(usual, axis=0)
    assert (ours <= 3 * usual + 1e-6).all(), (ours, usual)


def test_gradient_through_inference(rng, kernels):
    values = arguments(rng, SHAPES["wide"], depthwise=True, relu=True, residual=False)
    x, kernel, factor, offset, _ = values

    def total(function, *v):
        return sum(jnp.sum(jnp.square(part)) for part in function(*v, None, relu=True))

    found = jax.grad(lambda *v: total(lambda *a, relu: fused.scale_and_shift(*a, relu), *v), (0, 1, 2, 3))
    expected = jax.grad(lambda *v: total(fused.plain, *v), (0, 1, 2, 3))
    for one, other in zip(found(x, kernel, factor, offset), expected(x, kernel, factor, offset), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())


def test_several_devices_and_other_types_go_to_xla(monkeypatch):
    assert jax.device_count() == 8
    assert not simd.available()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert simd.available()
    ones = jnp.ones((8, 16, 8, 32), jnp.float32)
    assert fused.runs_here(ones)
    assert not fused.runs_here(ones.astype(jnp.bfloat16))
    assert not fused.runs_here(ones[:, :1, :1])
    # A row of 3 * 8 floats is no whole number of vectors.
    assert not fused.runs_here(jnp.ones((64, 64, 3, 8), jnp.float32))
    monkeypatch.setenv(simd.SWITCH, "0")
    assert not simd.available()


AFFINITY = """
import os, sys
import jax, numpy as np
from dmosnet_jax.models import cpu_kernels, convolution

rng = np.random.default_rng(0)
x, w = rng.normal(size=(64, 32, 16, 64)).astype(np.float32), rng.normal(size=(64, 80)).astype(np.float32)
run = jax.jit(convolution.pointwise)
assert "dmosnet_jax" in run.lower(x, w).as_text()
before = np.asarray(run(x, w))
# A program, or `taskset -p`, may leave fewer cores to its threads: here to all that there are.
for thread in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(thread), {min(os.sched_getaffinity(0))})
np.testing.assert_array_equal(run(x, w), before)
np.testing.assert_allclose(before, x @ w, atol=1e-4)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="there are no sets of cores on this system")
def test_kernels_run_on_the_cores_that_are_left():
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", AFFINITY], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
