"""Batch normalisation with a depthwise convolution before it, a residual and a ReLU behind it, as one operation.

On one CPU it runs as Numba kernels (`models/cpu_norms.py`), elsewhere as XLA's own programs; both are the same
mathematics.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dmosnet_jax.core import simd
from dmosnet_jax.models import cpu_kernels
from dmosnet_jax.models.activation import relu as rectify
from dmosnet_jax.models.convolution import depthwise3x3
from dmosnet_jax.models.cpu_kernels import call

NORM_EPSILON = 1e-5
# Calls have a cost of their own, some ten microseconds.
LEAST_FLOATS = 1 << 14


def runs_here(x: jax.Array) -> bool:
    """Whether the kernels take a map `[B, H, W, C]` on this machine."""
    # First: in a portable program the number of images may be free, and then no size can be compared.
    if not simd.available() or x.ndim != 4 or x.dtype != jnp.float32 or x.size < LEAST_FLOATS:
        return False
    return cpu_kernels.fits(x.shape)


def _per_group(per_image: jax.Array, groups: int) -> jax.Array:
    """`[B, 2, C]` -> `[groups, B / groups, 2, C]`."""
    return per_image.reshape(groups, -1, *per_image.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def normalise(
    x: jax.Array,
    kernel: jax.Array | None,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    groups: int,
    relu: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Normalises groups of images by their own statistics, on one CPU (see `runs_here`).

    Args:
        x: float32 `[B, H, W, C]`.
        kernel: `[3, 3, 1, C]` of a depthwise convolution that comes first, or None.
        scale: `[C]`.
        bias: `[C]`.
        residual: `[B, H, W, C]` to be added, with `relu` and without `kernel`; or None.
        groups: into which the images are divided, in order.
        relu: whether a ReLU comes last.

    Returns:
        The map `[B, H, W, C]`, its mean per image `[B, C]`, and the groups' means and biased variances `[groups, C]`,
        which carry no gradient.
    """
    return _forward(x, kernel, scale, bias, residual, groups, relu)[0]


def _forward(x, kernel, scale, bias, residual, groups, relu):
    images, height, width, channels = x.shape
    depthwise = kernel is not None
    (moments,) = call("moments", [(images, 2, channels)], x, kernel, depthwise=depthwise)
    grouped = _per_group(moments, groups)
    mean = jnp.mean(grouped[:, :, 0], axis=1)
    between = jnp.square(grouped[:, :, 0] - mean[:, None, :])
    var = jnp.mean(grouped[:, :, 1] / (height * width) + between, axis=1)
    inverse = lax.rsqrt(var + NORM_EPSILON)
    factor = scale[None, :] * inverse
    offset = bias[None, :] - mean * factor
    out, pooled = outputs(x, kernel, factor, offset, residual, relu)
    seen = out if residual is not None else None
    return (out, pooled, mean, var), (x, kernel, mean, inverse, factor, offset, seen)


def _backward(groups, relu, saved, cotangents):
    x, kernel, mean, inverse, factor, offset, seen = saved
    flags = {"depthwise": kernel is not None, "relu": relu, "residual": seen is not None}
    images, height, width, channels = x.shape
    count = images // groups * height * width
    gradient, pooled = cotangents[:2]
    (sums,) = call("sums", [(images, 2, channels)], x, kernel, factor, offset, mean, seen, gradient, pooled, **flags)
    total, weighted = jnp.moveaxis(jnp.sum(_per_group(sums, groups), axis=1), 1, 0)
    weighted = weighted * inverse
    slope, shift = factor * weighted * inverse / count, factor * total / count
    # The kernel's gradient, the residual's, or nothing.
    second = (images, 9, channels) if kernel is not None else (x.shape if seen is not None else (0,))
    arguments = (x, kernel, factor, offset, mean, slope, shift, seen, gradient, pooled)
    dx, other = call("gradients", [x.shape, second], *arguments, **flags)
    dkernel = jnp.sum(other, axis=0).reshape(kernel.shape) if kernel is not None else None
    return dx, dkernel, jnp.sum(weighted, axis=0), jnp.sum(total, axis=0), other if seen is not None else None


normalise.defvjp(_forward, _backward)


def outputs(
    x: jax.Array,
    kernel: jax.Array | None,
    factor: jax.Array,
    offset: jax.Array,
    residual: jax.Array | None,
    relu: bool,
) -> tuple[jax.Array, jax.Array]:
    """`relu(convolved * factor + offset + residual)` and its mean per image; `factor`, `offset` are `[groups, C]`."""
    images, channels = x.shape[0], x.shape[-1]
    flags = {"depthwise": kernel is not None, "relu": relu, "residual": residual is not None}
    arguments = (x, kernel, factor, offset, residual)
    out, pooled = call("outputs", [x.shape, (images, channels)], *arguments, **flags)
    return out, pooled


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def scale_and_shift(
    x: jax.Array,
    kernel: jax.Array | None,
    factor: jax.Array,
    offset: jax.Array,
    residual: jax.Array | None,
    relu: bool,
) -> tuple[jax.Array, jax.Array]:
    """`outputs` with a gradient: by XLA's own program, as inference seldom needs one. `factor`, `offset` are `[C]`."""
    return outputs(x, kernel, factor[None, :], offset[None, :], residual, relu)


def _scale_forward(x, kernel, factor, offset, residual, relu):
    return scale_and_shift(x, kernel, factor, offset, residual, relu), (x, kernel, factor, offset, residual)


def _scale_backward(relu, saved, cotangents):
    return jax.vjp(functools.partial(plain, relu=relu), *saved)[1](cotangents)


def plain(x, kernel, factor, offset, residual, *, relu: bool) -> tuple[jax.Array, jax.Array]:
    """The same by XLA."""
    y = depthwise3x3(x, kernel) if kernel is not None else x
    y = y * factor[None, None, None, :] + offset[None, None, None, :]
    y = y + residual if residual is not None else y
    y = rectify(y) if relu else y
    return y, jnp.mean(y, axis=(1, 2))


scale_and_shift.defvjp(_scale_forward, _scale_backward)
