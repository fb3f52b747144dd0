"""1x1, depthwise 3x3 and first convolutions in the forms that XLA runs fast, with their own gradients.

XLA's grouped convolution runs one tiny convolution per channel on CPU. A sum of nine shifted products is a single fused
loop instead, and its gradient to the input is the same loop with the kernel turned round. On one CPU 1x1 products,
their gradients, and gradients to the first convolution's weights are kernels of `models/cpu_products.py`; gradients to
weights that these don't take (bfloat16) go over the batch in a scan (`python -m dmosnet_jax.benchmarks.convolution`
compares the forms).

On GPUs and TPUs a 1x1 and a depthwise 3x3 convolution in a row run as one whole 3x3 convolution: nine times the
products, but on matrix units, which have them to spare, and half of the memory traffic, which is what takes the time.
"""

import jax
import jax.numpy as jnp
from jax import lax

from dmosnet_jax.core import simd
from dmosnet_jax.models import cpu_kernels, cpu_products
from dmosnet_jax.models.precision import is_full_precision, wide_type, widened

# Above this many elements the scan beats one fused reduction on CPU.
_SCAN_FROM_ELEMENTS = 1 << 19
# Where the kernels pay: from this much of an input, up to so many weights, whose sums must stay in the cache.
_KERNEL_FROM_ELEMENTS, _KERNEL_TO_WEIGHTS = 1 << 16, 384 * 384
# From so many weights on products by a kernel are faster than XLA's; with fewer both wait for memory.
_KERNEL_FROM_WEIGHTS = 64 * 64
# The batch is summed in parts, whatever the number of threads.
_PARTS = 8
# Names by which operations are counted.
DEPTHWISE_SCOPE, MERGED_SCOPE = "depthwise3x3", "merged3x3"


def _scan_pays(x: jax.Array) -> bool:
    # With several devices the batch axis is sharded, and a scan over it would gather the whole batch.
    one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    return one_cpu and x.size >= _SCAN_FROM_ELEMENTS


def _pays(x: jax.Array) -> bool:
    whole = x.shape[0] % _PARTS == 0 and x.size >= _KERNEL_FROM_ELEMENTS
    return whole and x.dtype == jnp.float32 and simd.available()


def _by_kernel(x: jax.Array, gradient: jax.Array) -> bool:
    inputs, outputs = x.shape[-1], gradient.shape[-1]
    return inputs % 8 == 0 and outputs % 16 == 0 and inputs * outputs <= _KERNEL_TO_WEIGHTS and _pays(x)


@jax.custom_vjp
def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """1x1 convolution as a matrix product.

    Args:
        x: `[B, H, W, I]`, any float dtype.
        kernel: `[I, O]`, dtype of `x`.

    Returns:
        `[B, H, W, O]`, dtype of `x`.
    """
    return _multiply(x, kernel)


def _multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    outputs, enough = kernel.shape[-1], kernel.size >= _KERNEL_FROM_WEIGHTS
    # Availability first: in a portable program the number of images may be free, and no size can be compared.
    if simd.available() and x.ndim == 4 and x.dtype == jnp.float32 and outputs % 16 == 0 and enough:
        images, height, width, inputs = x.shape
        positions = images * height * width
        if positions % 8 == 0 and x.size >= _KERNEL_FROM_ELEMENTS:
            arguments = x.reshape(-1, 8, inputs), cpu_products.panels(kernel)
            (product,) = cpu_kernels.call("multiply", [(positions // 8, 8, outputs)], *arguments)
            return product.reshape(images, height, width, outputs)
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _pointwise_forward(x, kernel):
    return pointwise(x, kernel), (x, kernel)


def _product_over_positions(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Sum over all positions of the outer products, `[I, O]` in at least float32."""
    rows = tuple(range(x.ndim - 1))
    return lax.dot_general(x, gradient, ((rows, rows), ((), ())), preferred_element_type=wide_type(x))


def _pointwise_backward(saved, gradient):
    x, kernel = saved
    # Turned round by itself: XLA's products of small matrices are twice as fast in this order on CPU.
    dx = _multiply(gradient, lax.optimization_barrier(kernel.T))
    if _by_kernel(x, gradient):
        parts = [a.reshape(_PARTS, -1, a.shape[-1]) for a in (x, gradient)]
        total = jnp.sum(cpu_kernels.call("products", [(_PARTS, *kernel.shape)], *parts)[0], axis=0)
    else:
        total = _product_over_positions(x, gradient)
    return dx, total.astype(kernel.dtype)


pointwise.defvjp(_pointwise_forward, _pointwise_backward)


def _windows(x: jax.Array) -> list[jax.Array]:
    """The nine shifted windows `[..., H, W, C]` of the zero-padded input, row by row."""
    height, width = x.shape[-3:-1]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(1, 1), (1, 1), (0, 0)])
    return [padded[..., i : i + height, j : j + width, :] for i in range(3) for j in range(3)]


def merges(x: jax.Array) -> bool:
    """Whether 1x1 and depthwise 3x3 convolutions run as one: on matrix units, so not where products must be exact."""
    exact = x.dtype == jnp.float64 or (x.dtype == jnp.float32 and is_full_precision())
    return jax.default_backend() != "cpu" and not exact


def merged_kernel(kernel: jax.Array, depthwise: jax.Array) -> jax.Array:
    """The kernel `[3, 3, I, O]` of a 1x1 convolution `[1, 1, I, O]` and a depthwise 3x3 one `[3, 3, 1, O]` after it."""
    return kernel * depthwise


def convolve3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution with zero padding 1.

    Args:
        x: `[B, H, W, I]`, any float dtype.
        kernel: `[3, 3, I, O]`, dtype of `x`.

    Returns:
        `[B, H, W, O]`, dtype of `x`.
    """
    with jax.named_scope(MERGED_SCOPE):
        return lax.conv_general_dilated(x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC"))


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


def _stem_of_quarters(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`stem7x7` as a 4x4 convolution with stride 1 over the image's 2x2 blocks.

    Their 12 values are filled up to 16 channels: matrix units have no use for three.
    """
    batch, height, width, channels = x.shape
    blocks = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    taps = (
        jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(4, 2, 4, 2, channels, -1).transpose(0, 2, 1, 3, 4, 5)
    )
    fill = ((0, 0),) * 3 + ((0, 16 - 4 * channels),)
    return lax.conv_general_dilated(
        jnp.pad(blocks.reshape(*blocks.shape[:3], -1), fill),
        jnp.pad(taps.reshape(4, 4, 4 * channels, -1), (*fill[:2], fill[3], fill[0])),
        (1, 1),
        [(2, 1), (2, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _convolve7x7(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (2, 2), [(3, 3), (3, 3)], dimension_numbers=("NHWC", "HWIO", "NHWC"))


def stem7x7(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution 7x7 with stride 2 and zero padding 3.

    Args:
        x: images `[B, H, W, 3]`, any float dtype.
        kernel: `[7, 7, 3, O]` (HWIO), dtype of `x`.

    Returns:
        `[B, H/2, W/2, O]`, dtype of `x`.
    """
    even = x.shape[1] % 2 == 0 and x.shape[2] % 2 == 0
    return _stem_of_quarters(x, kernel) if merges(x) and even and x.shape[-1] == 3 else _stem(x, kernel)


@jax.custom_vjp
def _stem(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _convolve7x7(x, kernel)


def _stem_forward(x, kernel):
    return _stem(x, kernel), (x, kernel)


def _stem_backward(saved, gradient):
    x, kernel = saved
    dx, dkernel = jax.vjp(_convolve7x7, x, kernel)[1](gradient)
    _, height, width, channels = x.shape
    if channels == 3 and kernel.shape[-1] % 16 == 0 and height % 2 == 0 and width % 16 == 0 and _pays(x):
        parts = [a.reshape(_PARTS, -1, *a.shape[1:]) for a in (x, gradient)]
        shape = (_PARTS, cpu_products.STEM_TAPS, kernel.shape[-1])
        total = jnp.sum(cpu_kernels.call("stem", [shape], *parts)[0], axis=0)
        dkernel = total[: kernel.size // kernel.shape[-1]].reshape(kernel.shape)
    return dx, dkernel


_stem.defvjp(_stem_forward, _stem_backward)
