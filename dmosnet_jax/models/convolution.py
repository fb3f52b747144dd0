"""1x1 and depthwise 3x3 convolutions in the forms that XLA runs fast, with their own gradients.

XLA's grouped convolution runs one tiny convolution per channel on CPU. A sum of nine shifted products is a single fused
loop instead, and its gradient to the input is the same loop with the kernel turned round. What remains are gradients to
weights, sums over every position of the batch: on CPU, XLA's layout assignment and fusion make those many times slower
than they need be once the arrays leave the cache, so there they run as a scan over parts of the batch
(`python -m dmosnet_jax.benchmarks.convolution` compares the forms).
"""

import jax
import jax.numpy as jnp
from jax import lax

from dmosnet_jax.models.precision import wide_type, widened

# Above this many elements the scan beats one fused reduction on CPU.
_SCAN_FROM_ELEMENTS = 1 << 19
_POINTWISE_PARTS = 8
DEPTHWISE_SCOPE = "depthwise3x3"


def _scan_pays(x: jax.Array) -> bool:
    # With several devices the batch axis is sharded, and a scan over it would gather the whole batch.
    one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    return one_cpu and x.size >= _SCAN_FROM_ELEMENTS


@jax.custom_vjp
def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """1x1 convolution as a matrix product.

    Args:
        x: `[B, H, W, I]`, any float dtype.
        kernel: `[I, O]`, dtype of `x`.

    Returns:
        `[B, H, W, O]`, dtype of `x`.
    """
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _pointwise_forward(x, kernel):
    return pointwise(x, kernel), (x, kernel)


def _product_over_positions(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Sum over all positions of the outer products, `[I, O]` in at least float32."""
    rows = tuple(range(x.ndim - 1))
    return lax.dot_general(x, gradient, ((rows, rows), ((), ())), preferred_element_type=wide_type(x))


def _pointwise_backward(saved, gradient):
    x, kernel = saved
    dx = lax.dot_general(gradient, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    if _scan_pays(x) and x.shape[0] % _POINTWISE_PARTS == 0:
        parts = [a.reshape(_POINTWISE_PARTS, -1, a.shape[-1]) for a in (x, gradient)]
        start = jnp.zeros(kernel.shape, wide_type(x))
        total, _ = lax.scan(lambda total, part: (total + _product_over_positions(*part), None), start, tuple(parts))
    else:
        total = _product_over_positions(x, gradient)
    return dx, total.astype(kernel.dtype)


pointwise.defvjp(_pointwise_forward, _pointwise_backward)


def _windows(x: jax.Array) -> list[jax.Array]:
    """The nine shifted windows `[..., H, W, C]` of the zero-padded input, row by row."""
    height, width = x.shape[-3:-1]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(1, 1), (1, 1), (0, 0)])
    return [padded[..., i : i + height, j : j + width, :] for i in range(3) for j in range(3)]


@jax.custom_vjp
def depthwise3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Depthwise 3x3 convolution, stride 1, zero padding 1.

    Args:
        x: `[B, H, W, C]`, any float dtype.
        kernel: `[3, 3, 1, C]` (HWIO), dtype of `x`.

    Returns:
        `[B, H, W, C]`, dtype of `x`.
    """
    taps = widened(kernel.reshape(9, kernel.shape[-1]))
    # In float32 and rounded once, as cuDNN does; inside the one fused loop it costs no memory.
    total = jnp.zeros(x.shape, wide_type(x))
    # The name tells these products from others: in profiles, and where operations are counted.
    with jax.named_scope(DEPTHWISE_SCOPE):
        for tap, window in zip(taps, _windows(x), strict=True):
            total = total + widened(window) * tap[None, None, None, :]
    return total.astype(x.dtype)


def _depthwise_forward(x, kernel):
    return depthwise3x3(x, kernel), (x, kernel)


def _taps_by_reduction(x: jax.Array, gradient: jax.Array) -> jax.Array:
    gradient = widened(gradient)
    return jnp.stack([jnp.sum(widened(w) * gradient, axis=(0, 1, 2)) for w in _windows(x)])


def _taps_by_scan(x: jax.Array, gradient: jax.Array) -> jax.Array:
    def add_image(totals, pair):
        image, image_gradient = map(widened, pair)
        return tuple(t + w * image_gradient for t, w in zip(totals, _windows(image), strict=True)), None

    zeros = tuple(jnp.zeros(x.shape[1:], wide_type(x)) for _ in range(9))
    totals, _ = lax.scan(add_image, zeros, (x, gradient))
    return jnp.stack([jnp.sum(total, axis=(0, 1)) for total in totals])


def _depthwise_backward(saved, gradient):
    x, kernel = saved
    taps = (_taps_by_scan if _scan_pays(x) else _taps_by_reduction)(x, gradient)
    return depthwise3x3(gradient, kernel[::-1, ::-1]), taps.reshape(kernel.shape).astype(kernel.dtype)


depthwise3x3.defvjp(_depthwise_forward, _depthwise_backward)
