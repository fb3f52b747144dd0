"""Batch and instance normalisation, NHWC, in at least float32 whatever the compute dtype."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from dmosnet_jax.models import fused
from dmosnet_jax.models.activation import relu as rectify
from dmosnet_jax.models.convolution import depthwise3x3
from dmosnet_jax.models.fused import NORM_EPSILON
from dmosnet_jax.models.precision import wide_type, widened


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise_groups(
    x: jax.Array, scale: jax.Array, bias: jax.Array, relu: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises groups by their own statistics.

    Args:
        x: `[groups, size, ..., C]`, any float dtype; what the gradient needs is kept in it.
        scale: `[C]`, float32, or float64 like x.
        bias: `[C]`, same dtype.
        relu: whether a ReLU comes last; its gradient is then no map of its own.

    Returns:
        The normalised array in the dtype of x, and the groups' means and biased variances `[groups, C]` in that of
        `scale`, which carry no gradient.
    """
    return _normalise_forward(x, scale, bias, relu)[0]


def _wide(per_group: jax.Array, like: jax.Array) -> jax.Array:
    """`[groups, C]` shaped to broadcast against `[groups, size, ..., C]`."""
    return per_group.reshape(per_group.shape[0], *(1,) * (like.ndim - 2), per_group.shape[1])


def _last(per_channel: jax.Array, like: jax.Array) -> jax.Array:
    """`[C]` shaped to broadcast against `[..., C]`."""
    return per_channel.reshape((1,) * (like.ndim - 1) + per_channel.shape)


def _moments(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance over `axes`, in one pass, kept as axes of length 1.

    The squares are of differences from one value of each group, not from zero: where the mean is far from zero, the
    difference of two large numbers would leave nothing of the variance.
    """
    pivot = x
    for axis in axes:
        pivot = lax.slice_in_dim(pivot, 0, 1, axis=axis)
    shifted = x - lax.stop_gradient(pivot)
    mean = jnp.mean(shifted, axis=axes, keepdims=True)
    var = jnp.maximum(jnp.mean(jnp.square(shifted), axis=axes, keepdims=True) - jnp.square(mean), 0.0)
    return mean + lax.stop_gradient(pivot), var


def _normalise_forward(x, scale, bias, relu):
    wide = widened(x)
    mean, var = (m.reshape(x.shape[0], x.shape[-1]) for m in _moments(wide, tuple(range(1, x.ndim - 1))))
    inverse = lax.rsqrt(var + NORM_EPSILON)
    factor = scale[None, :] * inverse
    y = (wide - _wide(mean, x)) * _wide(factor, x) + _wide(bias[None, :], x)
    y = jnp.maximum(y, 0) if relu else y
    return (y.astype(x.dtype), mean, var), (x, scale, bias, mean, inverse)


def _normalise_backward(relu, saved, gradients):
    x, scale, bias, mean, inverse = saved
    axes, gradient = tuple(range(1, x.ndim - 1)), gradients[0]
    if jax.default_backend() == "cpu":
        # Fused into the sums below, whatever produces these two would be computed once for each sum.
        x, gradient = lax.optimization_barrier((x, gradient))
    dtype, x, gradient = x.dtype, widened(x), widened(gradient)
    count = x.size // mean.size
    centred = x - _wide(mean, x)
    factor = scale[None, :] * inverse
    if relu:
        gradient = jnp.where(centred * _wide(factor, x) + _wide(bias[None, :], x) > 0, gradient, 0)
    total = jnp.sum(gradient, axis=axes)
    weighted = jnp.sum(gradient * centred, axis=axes) * inverse
    slope = factor * weighted * inverse / count
    dx = gradient * _wide(factor, x) - centred * _wide(slope, x) - _wide(factor * total / count, x)
    return dx.astype(dtype), jnp.sum(weighted, axis=0), jnp.sum(total, axis=0)


normalise_groups.defvjp(_normalise_forward, _normalise_backward)


def folds() -> bool:
    """Whether kernels take the factors of the norms behind them; on CPUs norms keep PyTorch's order, for parity."""
    return jax.default_backend() != "cpu"


class BatchNorm(nnx.Module):
    """Batch normalisation over groups of `group_size` images, whatever the number of devices.

    Each group is normalised by its own statistics; the running ones follow the average of the groups', with PyTorch's
    momentum 0.1 and unbiased running variance. The group is part of the algorithm: SpCL's accuracy moves by 6 to 20
    points of mAP with the number of images that share statistics.
    """

    def __init__(self, channels: int, *, group_size: int | None = None, momentum: float = 0.1):
        self.scale = nnx.Param(np.ones((channels,), np.float32))
        self.bias = nnx.Param(np.zeros((channels,), np.float32))
        self.mean = nnx.BatchStat(np.zeros((channels,), np.float32))
        self.var = nnx.BatchStat(np.ones((channels,), np.float32))
        self.group_size, self.momentum = group_size, momentum

    def __call__(
        self,
        x: jax.Array,
        *,
        train: bool,
        relu: bool = False,
        depthwise: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """`pooled` without the mean."""
        return self.pooled(x, train=train, relu=relu, depthwise=depthwise, residual=residual)[0]

    def pooled(
        self,
        x: jax.Array,
        *,
        train: bool,
        relu: bool = False,
        depthwise: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Normalises `[B, ..., C]`, dtype kept; with `train` it also moves the running statistics.

        Args:
            x: the input.
            train: whether to normalise by the batch's own statistics.
            relu: whether a ReLU comes last.
            depthwise: kernel `[3, 3, 1, C]` of a depthwise convolution that comes first.
            residual: `[B, ..., C]` to be added before the ReLU; not together with `depthwise`.

        Returns:
            The output, and its mean per image and channel, `[B, C]`.
        """
        if fused.runs_here(x):
            return self._by_kernels(x, train, relu, depthwise, residual)
        x = x if depthwise is None else depthwise3x3(x, depthwise)
        if train:
            first = relu and residual is None
            return self._finished(self._by_batch(x, first), relu and not first, residual)
        factor, offset = (_last(v, x) for v in self._factors(widened(x)))
        return self._finished((widened(x) * factor + offset).astype(x.dtype), relu, residual)

    def after(
        self,
        convolve: Callable[[jax.Array], jax.Array],
        kernel: jax.Array,
        *,
        train: bool,
        relu: bool = False,
        residual: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """`pooled` of a convolution without bias; where an accelerator infers, the kernel takes the norm's factor.

        Args:
            convolve: from the kernel to the map `[B, ..., C]`.
            kernel: `[..., C]`.
            train: as for `pooled`, and the rest.
            relu: whether a ReLU comes last.
            residual: `[B, ..., C]` to be added before the ReLU.
        """
        if train or not folds():
            return self.pooled(convolve(kernel), train=train, relu=relu, residual=residual)
        factor, offset = self._factors(kernel)
        y = convolve(kernel * _last(factor, kernel))
        return self._finished(y + _last(offset.astype(y.dtype), y), relu, residual)

    @staticmethod
    def _finished(y: jax.Array, relu: bool, residual: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        y = y if residual is None else y + residual
        y = rectify(y) if relu else y
        return y, jnp.mean(y, axis=tuple(range(1, y.ndim - 1)))

    def _by_kernels(self, x, train, relu, depthwise, residual):
        scale, bias = self.scale[...], self.bias[...]
        if not train:
            return fused.scale_and_shift(x, depthwise, *self._factors(x), residual, relu)
        size = group_of(x.shape[0], self.group_size)
        groups = x.shape[0] // size
        y, pooled, mean, var = fused.normalise(x, depthwise, scale, bias, residual, groups, relu)
        self._move(mean, var, x.size // mean.size)
        return y, pooled

    def _factors(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the running statistics make of scale and bias, in x's dtype; grouped as in PyTorch, for parity."""
        scale, bias, mean, var = (v[...].astype(x.dtype) for v in (self.scale, self.bias, self.mean, self.var))
        factor = scale * lax.rsqrt(var + NORM_EPSILON)
        return factor, bias - mean * factor

    def _by_batch(self, x: jax.Array, relu: bool) -> jax.Array:
        shape, dtype = x.shape, wide_type(x)
        scale, bias = self.scale[...].astype(dtype), self.bias[...].astype(dtype)
        size = group_of(shape[0], self.group_size)
        grouped = x.reshape(shape[0] // size, size, *shape[1:])
        y, mean, var = normalise_groups(grouped, scale, bias, relu)
        self._move(mean, var, grouped.size // mean.size)
        return y.reshape(shape)

    def _move(self, mean: jax.Array, var: jax.Array, count: int) -> None:
        unbiased = jnp.mean(var, axis=0) * (count / max(count - 1, 1))
        for running, batch in ((self.mean, jnp.mean(mean, axis=0)), (self.var, unbiased)):
            fresh = lax.stop_gradient(batch).astype(jnp.float32)
            running.set_value((1 - self.momentum) * running[...] + self.momentum * fresh)


def group_of(batch: int, group_size: int | None) -> int:
    """Images that share statistics in a batch of `batch`; a batch smaller than the group is one group.

    Raises:
        ValueError: the batch is not a whole number of groups.
    """
    size = batch if group_size is None else min(group_size, batch)
    if batch % size:
        raise ValueError(f"batch of {batch} images is not a multiple of bn_group_size={group_size}")
    return size


class InstanceNorm(nnx.Module):
    """Per-image, per-channel normalisation with scale and bias, no running statistics (IBN-Net's style norm)."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(np.ones((channels,), np.float32))
        self.bias = nnx.Param(np.zeros((channels,), np.float32))

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Normalises `[B, H, W, C]`, dtype kept; `train` is accepted so that norms are interchangeable."""
        del train
        scale, bias = (p[...].astype(wide_type(x)) for p in (self.scale, self.bias))
        return normalise_groups(x, scale, bias)[0]
