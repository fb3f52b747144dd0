"""Convolutions, linear maps and pooling, NHWC, with the parameter names of the tree that weight import fills.

Parameters are float32 whatever the compute dtype: a layer casts its weights to the dtype of its input.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from dmosnet_jax.models.convolution import depthwise3x3, pointwise, stem7x7
from dmosnet_jax.models.draws import Draws


class Conv(nnx.Module):
    """Convolution with "SAME"-style explicit padding `(size - 1) // 2`.

    A 1x1 convolution runs as a matrix product and a depthwise 3x3 one as shifted sums: see `models/convolution.py`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        depthwise: bool = False,
        bias: bool = False,
        rngs: Draws,
    ):
        if depthwise and (inputs != outputs or size != 3 or stride != 1):
            raise ValueError(f"depthwise needs 3x3, stride 1 and as many outputs as inputs, got {size=} {stride=}")
        fan_in = 1 if depthwise else inputs
        # He et al. (2015) over the outgoing connections, as torchreid.
        std = math.sqrt(2.0 / (size * size * outputs))
        self.kernel = nnx.Param(rngs.normal((size, size, fan_in, outputs), std))
        if bias:
            self.bias = nnx.Param(np.zeros((outputs,), np.float32))
        self.size, self.stride, self.depthwise, self.has_bias = size, stride, depthwise, bias

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, H, W, inputs]` to `[B, H', W', outputs]`, dtype kept."""
        y = self.convolve(x, self.kernel[...])
        return y + self.bias[...].astype(y.dtype)[None, None, None, :] if self.has_bias else y

    def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The convolution alone, with another kernel of the same shape."""
        kernel = kernel.astype(x.dtype)
        if self.depthwise:
            return depthwise3x3(x, kernel)
        if self.size == 1:
            seen = x if self.stride == 1 else x[:, :: self.stride, :: self.stride]
            return pointwise(seen, kernel[0, 0])
        if self.size == 7 and self.stride == 2:
            return stem7x7(x, kernel)
        pad = (self.size - 1) // 2
        return lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            [(pad, pad), (pad, pad)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class Linear(nnx.Module):
    """Affine map of the last axis, normal(0, 0.01) initialised as in torchreid and fast-reid."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, rngs: Draws):
        self.kernel = nnx.Param(rngs.normal((inputs, outputs), 0.01))
        if bias:
            self.bias = nnx.Param(np.zeros((outputs,), np.float32))
        self.has_bias = bias

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, inputs]` to `[B, outputs]`, dtype kept."""
        y = x @ self.kernel[...].astype(x.dtype)
        return y + self.bias[...].astype(y.dtype)[None, :] if self.has_bias else y


def _halve_by_max(x: jax.Array, axis: int, padded: bool) -> jax.Array:
    """Maximum over windows of three with stride 2 along one axis of even length; see `max_pool3x3`."""
    even, odd = (lax.slice_in_dim(x, start, None, 2, axis) for start in (0, 1))
    border = jnp.full_like(lax.slice_in_dim(odd, 0, 1, axis=axis), -jnp.inf)
    if padded:
        third = lax.concatenate([border, lax.slice_in_dim(odd, 0, odd.shape[axis] - 1, axis=axis)], axis)
    else:
        third = lax.concatenate([lax.slice_in_dim(even, 1, None, axis=axis), border], axis)
    return jnp.maximum(jnp.maximum(third, even), odd)


def max_pool3x3(x: jax.Array, *, padded: bool = True) -> jax.Array:
    """Max pooling 3x3 with stride 2 over `[B, H, W, C]` with even H and W.

    One axis after the other: the gradient of a windowed reduction is a scatter, this one's is selection.

    Args:
        x: the map.
        padded: windows are centred on even rows and columns (PyTorch's `padding=1`); otherwise they start there and
            the last one is cut (`ceil_mode=True`).
    """
    return _halve_by_max(_halve_by_max(x, 2, padded), 1, padded)


def average_pool(x: jax.Array, size: int) -> jax.Array:
    """Average pooling with kernel and stride `size` over `[B, H, W, C]`; a rest smaller than `size` is dropped."""
    batch, height, width, channels = x.shape
    rows, columns = height // size, width // size
    cut = x[:, : rows * size, : columns * size]
    return jnp.mean(cut.reshape(batch, rows, size, columns, size, channels), axis=(2, 4))
