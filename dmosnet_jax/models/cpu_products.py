"""Matrix products of 1x1 and first convolutions, and of their gradients: kernels for XLA's CPU programs.

The sums stay in registers while the inputs come from the first cache. All arrays are float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmosnet_jax.core import simd
from dmosnet_jax.core.simd import (
    WIDTH,
    F,
    argument,
    clear,
    data,
    inlined,
    keep,
    length,
    load,
    muladd,
    result,
    spread,
    store,
    zeros,
)

# Positions whose rows stay in the first cache while all blocks of the product go over them.
_POSITIONS = 64


@inlined
def _store_64(out, at, v0, v1, v2, v3):
    store(out, at, v0)
    store(out, at + 16, v1)
    store(out, at + 32, v2)
    store(out, at + 48, v3)


@inlined
def _store_rows(out, at, outputs, v0, v1, v2, v3):
    store(out, at, v0)
    store(out, at + outputs, v1)
    store(out, at + 2 * outputs, v2)
    store(out, at + 3 * outputs, v3)


@inlined
def _add_outer_4x64(x, inputs, g, outputs, positions, out, i, o):
    """`out[i : i + 4, o : o + 64] += x[:, i : i + 4].T @ g[:, o : o + 64]`, the sums in registers."""
    r0, r1, r2, r3 = i * outputs + o, (i + 1) * outputs + o, (i + 2) * outputs + o, (i + 3) * outputs + o
    a0, a1, a2, a3 = load(out, r0), load(out, r0 + 16), load(out, r0 + 32), load(out, r0 + 48)
    b0, b1, b2, b3 = load(out, r1), load(out, r1 + 16), load(out, r1 + 32), load(out, r1 + 48)
    c0, c1, c2, c3 = load(out, r2), load(out, r2 + 16), load(out, r2 + 32), load(out, r2 + 48)
    d0, d1, d2, d3 = load(out, r3), load(out, r3 + 16), load(out, r3 + 32), load(out, r3 + 48)
    for p in range(positions):
        at = p * outputs + o
        g0, g1, g2, g3 = load(g, at), load(g, at + 16), load(g, at + 32), load(g, at + 48)
        v = spread(x, p * inputs + i)
        a0, a1, a2, a3 = muladd(v, g0, a0), muladd(v, g1, a1), muladd(v, g2, a2), muladd(v, g3, a3)
        v = spread(x, p * inputs + i + 1)
        b0, b1, b2, b3 = muladd(v, g0, b0), muladd(v, g1, b1), muladd(v, g2, b2), muladd(v, g3, b3)
        v = spread(x, p * inputs + i + 2)
        c0, c1, c2, c3 = muladd(v, g0, c0), muladd(v, g1, c1), muladd(v, g2, c2), muladd(v, g3, c3)
        v = spread(x, p * inputs + i + 3)
        d0, d1, d2, d3 = muladd(v, g0, d0), muladd(v, g1, d1), muladd(v, g2, d2), muladd(v, g3, d3)
    _store_64(out, r0, a0, a1, a2, a3)
    _store_64(out, r1, b0, b1, b2, b3)
    _store_64(out, r2, c0, c1, c2, c3)
    _store_64(out, r3, d0, d1, d2, d3)


@inlined
def _add_outer_8x16(x, inputs, g, outputs, positions, out, i, o):
    """`out[i : i + 8, o : o + 16] += x[:, i : i + 8].T @ g[:, o : o + 16]`."""
    at = i * outputs + o
    a0, a1, a2, a3 = load(out, at), load(out, at + outputs), load(out, at + 2 * outputs), load(out, at + 3 * outputs)
    at += 4 * outputs
    a4, a5, a6, a7 = load(out, at), load(out, at + outputs), load(out, at + 2 * outputs), load(out, at + 3 * outputs)
    for p in range(positions):
        v, k = load(g, p * outputs + o), p * inputs + i
        a0, a1 = muladd(spread(x, k), v, a0), muladd(spread(x, k + 1), v, a1)
        a2, a3 = muladd(spread(x, k + 2), v, a2), muladd(spread(x, k + 3), v, a3)
        a4, a5 = muladd(spread(x, k + 4), v, a4), muladd(spread(x, k + 5), v, a5)
        a6, a7 = muladd(spread(x, k + 6), v, a6), muladd(spread(x, k + 7), v, a7)
    at = i * outputs + o
    _store_rows(out, at, outputs, a0, a1, a2, a3)
    _store_rows(out, at + 4 * outputs, outputs, a4, a5, a6, a7)


@inlined
def _add_products(x, inputs, g, outputs, positions, out):
    """`out += x.T @ g` for `x` [positions, inputs] and `g` [positions, outputs]."""
    wide = outputs // 64 * 64
    for start in range(0, positions, _POSITIONS):
        many = min(_POSITIONS, positions - start)
        rows, columns = x + F * start * inputs, g + F * start * outputs
        for o in range(0, wide, 64):
            for i in range(0, inputs, 4):
                _add_outer_4x64(rows, inputs, columns, outputs, many, out, i, o)
        for o in range(wide, outputs, 16):
            for i in range(0, inputs, 8):
                _add_outer_8x16(rows, inputs, columns, outputs, many, out, i, o)


def products_kernel() -> Any:
    """`(x [parts, P, I], g [parts, P, O]) -> [parts, I, O]`: each part's sum over P of the outer products."""

    @simd.kernel
    def products(frame, start, stop):
        first, second = argument(frame, 0), argument(frame, 1)
        positions, inputs, outputs = length(first, 1), length(first, 2), length(second, 2)
        for part in range(start, stop):
            out = data(result(frame, 0)) + F * part * inputs * outputs
            clear(out, inputs * outputs)
            x, g = data(first) + F * part * positions * inputs, data(second) + F * part * positions * outputs
            _add_products(x, inputs, g, outputs, positions, out)

    return products


@inlined
def _multiply_4x64(x, inputs, w, out, outputs, p, o):
    """`out[p : p + 4, o : o + 64] = x[p : p + 4] @ w` for `w` [inputs, 64], the sums in registers."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = zeros()
    c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = zeros()
    for i in range(inputs):
        w0, w1, w2, w3 = load(w, 64 * i), load(w, 64 * i + 16), load(w, 64 * i + 32), load(w, 64 * i + 48)
        at = p * inputs + i
        v = spread(x, at)
        a0, a1, a2, a3 = muladd(v, w0, a0), muladd(v, w1, a1), muladd(v, w2, a2), muladd(v, w3, a3)
        v = spread(x, at + inputs)
        b0, b1, b2, b3 = muladd(v, w0, b0), muladd(v, w1, b1), muladd(v, w2, b2), muladd(v, w3, b3)
        v = spread(x, at + 2 * inputs)
        c0, c1, c2, c3 = muladd(v, w0, c0), muladd(v, w1, c1), muladd(v, w2, c2), muladd(v, w3, c3)
        v = spread(x, at + 3 * inputs)
        d0, d1, d2, d3 = muladd(v, w0, d0), muladd(v, w1, d1), muladd(v, w2, d2), muladd(v, w3, d3)
    at = p * outputs + o
    _store_64(out, at, a0, a1, a2, a3)
    _store_64(out, at + outputs, b0, b1, b2, b3)
    _store_64(out, at + 2 * outputs, c0, c1, c2, c3)
    _store_64(out, at + 3 * outputs, d0, d1, d2, d3)


@inlined
def _multiply_8x16(x, inputs, w, out, outputs, p, o):
    """`out[p : p + 8, o : o + 16] = x[p : p + 8] @ w` for `w` [inputs, 16]."""
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = zeros()
    for i in range(inputs):
        v, at = load(w, 16 * i), p * inputs + i
        a0, a1 = muladd(spread(x, at), v, a0), muladd(spread(x, at + inputs), v, a1)
        at += 2 * inputs
        a2, a3 = muladd(spread(x, at), v, a2), muladd(spread(x, at + inputs), v, a3)
        at += 2 * inputs
        a4, a5 = muladd(spread(x, at), v, a4), muladd(spread(x, at + inputs), v, a5)
        at += 2 * inputs
        a6, a7 = muladd(spread(x, at), v, a6), muladd(spread(x, at + inputs), v, a7)
    at = p * outputs + o
    _store_rows(out, at, outputs, a0, a1, a2, a3)
    _store_rows(out, at + 4 * outputs, outputs, a4, a5, a6, a7)


def multiply_kernel() -> Any:
    """`(x [N, 8, I], panels [I * O]) -> [N, 8, O]`: products at 8 N positions, of weights by `panels`."""

    @simd.kernel
    def multiply(frame, start, stop):
        first, second = argument(frame, 0), argument(frame, 1)
        inputs, outputs = length(first, 2), length(result(frame, 0), 2)
        wide = outputs // 64 * 64
        x, w, out = data(first), data(second), data(result(frame, 0))
        for begin in range(8 * start, 8 * stop, _POSITIONS):
            end = min(begin + _POSITIONS, 8 * stop)
            for o in range(0, wide, 64):
                for p in range(begin, end, 4):
                    _multiply_4x64(x, inputs, w + F * o * inputs, out, outputs, p, o)
            for o in range(wide, outputs, 16):
                for p in range(begin, end, 8):
                    _multiply_8x16(x, inputs, w + F * o * inputs, out, outputs, p, o)

    return multiply


def panels(w: jax.Array) -> jax.Array:
    """Weights `[I, O]`, O a multiple of 16, as `multiply` reads them from end to end: by 64 columns, then by 16."""
    wide = w.shape[1] // 64 * 64

    def by(columns: jax.Array, across: int) -> jax.Array:
        return columns.reshape(len(columns), -1, across).swapaxes(0, 1).reshape(-1)

    return jnp.concatenate([by(w[:, :wide], 64), by(w[:, wide:], 16)])


STEM = 7  # side of the first convolution's window
STEM_TAPS = 152  # its 7 * 7 * 3 taps in whole blocks of eight


def stem_kernel() -> Any:
    """`(images [parts, B, H, W, 3], g [parts, B, H/2, W/2, O]) -> [parts, 152, O]`: the first kernel's gradient.

    The windows of a row of positions are written side by side; their product with the row's gradients is added up.
    """

    @simd.kernel
    def stem(frame, start, stop):
        first, second = argument(frame, 0), argument(frame, 1)
        images, height, width, outputs = length(first, 1), length(first, 2), length(first, 3), length(second, 4)
        row, across = 3 * width, width // 2
        run = 3 * STEM
        memory = np.zeros(row + 32 + across * STEM_TAPS, np.float32)
        padded = memory.ctypes.data
        windows = padded + F * (row + 32)
        for part in range(start, stop):
            out = data(result(frame, 0)) + F * part * STEM_TAPS * outputs
            clear(out, STEM_TAPS * outputs)
            for image in range(part * images, (part + 1) * images):
                for h in range(height // 2):
                    for k in range(STEM):
                        above = 2 * h + k - STEM // 2
                        for i in range(0, row, WIDTH):
                            inside = 0 <= above < height
                            pixels = load(data(first), (image * height + above) * row + i) if inside else zeros()
                            store(padded, 9 + i, pixels)
                        for w in range(across):
                            # Twenty-one floats by two overlapping vectors.
                            at = w * STEM_TAPS + k * run
                            store(windows, at, load(padded, 6 * w))
                            store(windows, at + run - WIDTH, load(padded, 6 * w + run - WIDTH))
                    g = data(second) + F * (image * (height // 2) + h) * across * outputs
                    _add_products(windows, STEM_TAPS, g, outputs, across, out)
        keep(memory)

    return stem
