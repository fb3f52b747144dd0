"""Batch normalisation with what stands before and behind it, and matrix products, for XLA's CPU programs.

A training step on a CPU waits for memory. XLA writes a map after every convolution, norm and gate and reads it again
for every sum; here a depthwise 3x3 convolution is computed anew, from a few rows in the cache, in each of the four
passes (statistics, output; sums for the gradient, gradient), so its output is never written, and the norm, its ReLU
and the pooled map that the gate wants come from the same pass. 1x1 convolutions and their gradients are products whose
sums stay in registers.

Arrays are float32 `[B, H, W, C]`; vectors of a group of images `[G, C]`, group g being images `g * B / G` onwards. What
is summed over an image comes out per image, so no result depends on the number of threads.
"""

import functools
import hashlib
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmosnet_jax.core import simd
from dmosnet_jax.core.kernels import jit
from dmosnet_jax.core.simd import (
    WIDTH,
    add,
    argument,
    data,
    length,
    load,
    load_one,
    mul,
    muladd,
    result,
    spread,
    store,
    store_one,
    sub,
    where_positive,
    zeros,
)

_OPTIONS = {"error_model": "numpy"}
_kernel = jit(**_OPTIONS)
F = 4  # bytes of a float


@_kernel
def _keep(memory):
    return memory.size


@_kernel
def _span(channels):
    """Floats after which the channels begin again at the start of a vector."""
    span = channels
    while span % WIDTH:
        span += channels
    return span


@_kernel
def _repeat(out, source, start, channels, span, scale):
    """Writes `source[start : start + channels] * scale` over and over into `span` floats."""
    for i in range(span):
        store_one(out, i, load_one(source, start + i % channels) * scale)


@_kernel
def _repeat_taps(out, kernel, channels, span, turned):
    for tap in range(9):
        _repeat(out + F * tap * span, kernel, (8 - tap if turned else tap) * channels, channels, span, np.float32(1))


@_kernel
def _clear(out, floats):
    for i in range(0, floats, WIDTH):
        store(out, i, zeros())


@_kernel
def _fold(out, at, sums, channels, span, scale):
    """Writes the sums over the repetitions of each channel."""
    for c in range(channels):
        total = np.float32(0)
        for i in range(c, span, channels):
            total += load_one(sums, i)
        store_one(out, at + c, total * scale)


@_kernel
def _fill_row(row, y, image, h, height, width, channels):
    """Row h of an image with a position of zeros on either side; all zeros outside of the image."""
    for i in range(channels):
        store_one(row, i, np.float32(0))
        store_one(row, (width + 1) * channels + i, np.float32(0))
    inside, base = 0 <= h < height, (image * height + h) * width * channels
    for i in range(0, width * channels, WIDTH):
        store(row, channels + i, load(y, base + i) if inside else zeros())


@_kernel
def _load_taps(taps, span, j):
    return (
        load(taps, j),
        load(taps, span + j),
        load(taps, 2 * span + j),
        load(taps, 3 * span + j),
        load(taps, 4 * span + j),
        load(taps, 5 * span + j),
        load(taps, 6 * span + j),
        load(taps, 7 * span + j),
        load(taps, 8 * span + j),
    )


@_kernel
def _convolve(rows, at, channels, taps):
    """Sixteen outputs of the depthwise convolution of three padded rows."""
    z = mul(load(rows[0], at), taps[0])
    z = muladd(load(rows[0], at + channels), taps[1], z)
    z = muladd(load(rows[0], at + 2 * channels), taps[2], z)
    z = muladd(load(rows[1], at), taps[3], z)
    z = muladd(load(rows[1], at + channels), taps[4], z)
    z = muladd(load(rows[1], at + 2 * channels), taps[5], z)
    z = muladd(load(rows[2], at), taps[6], z)
    z = muladd(load(rows[2], at + channels), taps[7], z)
    return muladd(load(rows[2], at + 2 * channels), taps[8], z)


@_kernel
def _next_rows(ring, stride, y, image, h, height, width, channels):
    """Addresses of the padded rows h - 1, h and h + 1; the last is filled now, the others were by the calls before."""
    row0, row1, row2 = ring + stride * (h % 3), ring + stride * ((h + 1) % 3), ring + stride * ((h + 2) % 3)
    if h == 0:
        _fill_row(row0, y, image, -1, height, width, channels)
        _fill_row(row1, y, image, 0, height, width, channels)
    _fill_row(row2, y, image, h + 1, height, width, channels)
    return row0, row1, row2


def _moments(depthwise: bool) -> Any:
    """`(y, kernel) -> [B, 2, C]`: each image's mean, and its sum of squared differences from that."""

    @simd.kernel
    def moments(frame, start, stop):
        array = argument(frame, 0)
        height, width, channels = length(array, 1), length(array, 2), length(array, 3)
        y, out, row = data(array), data(result(frame, 0)), width * channels
        span, stride = _span(channels), F * (width + 2) * channels
        memory = np.empty(12 * span + 3 * stride, np.float32)
        taps = memory.ctypes.data
        pivot, total, square = taps + F * 9 * span, taps + F * 10 * span, taps + F * 11 * span
        ring = taps + F * 12 * span
        if depthwise:
            _repeat_taps(taps, data(argument(frame, 1)), channels, span, False)
        for image in range(start, stop):
            _clear(total, span)
            _clear(square, span)
            for h in range(height):
                base = y + F * (image * height + h) * row
                rows = (base, base, base)
                if depthwise:
                    rows = _next_rows(ring, stride, y, image, h, height, width, channels)
                if h == 0:
                    # Squares of differences from a value of the channel's own: see `norms._moments`.
                    for j in range(0, span, WIDTH):
                        first = load(rows[0], j)
                        if depthwise:
                            first = _convolve(rows, j, channels, _load_taps(taps, span, j))
                        store(pivot, j, first)
                    for i in range(channels, span):
                        store_one(pivot, i, load_one(pivot, i - channels))
                for j in range(0, span, WIDTH):
                    k, p, t, s = _load_taps(taps, span, j), load(pivot, j), load(total, j), load(square, j)
                    for i in range(j, row, span):
                        z = _convolve(rows, i, channels, k) if depthwise else load(rows[0], i)
                        z = sub(z, p)
                        t, s = add(t, z), muladd(z, z, s)
                    store(total, j, t)
                    store(square, j, s)
            for c in range(channels):
                t, s = 0.0, 0.0
                for i in range(c, span, channels):
                    t += load_one(total, i)
                    s += load_one(square, i)
                mean = t / (height * width)
                store_one(out, 2 * image * channels + c, np.float32(load_one(pivot, c) + mean))
                store_one(out, (2 * image + 1) * channels + c, np.float32(max(s - t * mean, 0.0)))
        _keep(memory)  # to here, or it would be freed after its last use

    return moments


def _outputs(depthwise: bool, relu: bool, residual: bool) -> Any:
    """`(y, kernel, factor, offset, residual) -> [B, H, W, C], [B, C]`: the normalised map and its mean per image."""

    @simd.kernel
    def outputs(frame, start, stop):
        array, vectors = argument(frame, 0), argument(frame, 2)
        images, height, width, channels = length(array, 0), length(array, 1), length(array, 2), length(array, 3)
        y, out, pooled, row = data(array), data(result(frame, 0)), data(result(frame, 1)), width * channels
        identity = data(argument(frame, 4))
        span, stride = _span(channels), F * (width + 2) * channels
        memory = np.empty(12 * span + 3 * stride, np.float32)
        taps = memory.ctypes.data
        factor, offset, total = taps + F * 9 * span, taps + F * 10 * span, taps + F * 11 * span
        ring = taps + F * 12 * span
        if depthwise:
            _repeat_taps(taps, data(argument(frame, 1)), channels, span, False)
        for image in range(start, stop):
            group = image * length(vectors, 0) // images * channels
            _repeat(factor, data(vectors), group, channels, span, np.float32(1))
            _repeat(offset, data(argument(frame, 3)), group, channels, span, np.float32(1))
            _clear(total, span)
            for h in range(height):
                at = (image * height + h) * row
                rows = (y + F * at, y + F * at, y + F * at)
                if depthwise:
                    rows = _next_rows(ring, stride, y, image, h, height, width, channels)
                for j in range(0, span, WIDTH):
                    k, f, o, t = _load_taps(taps, span, j), load(factor, j), load(offset, j), load(total, j)
                    for i in range(j, row, span):
                        z = _convolve(rows, i, channels, k) if depthwise else load(rows[0], i)
                        z = muladd(z, f, o)
                        if residual:
                            z = add(z, load(identity, at + i))
                        if relu:
                            z = where_positive(z, z)
                        store(out, at + i, z)
                        t = add(t, z)
                    store(total, j, t)
            _fold(pooled, image * channels, total, channels, span, np.float32(1.0 / (height * width)))
        _keep(memory)

    return outputs


@_kernel
def _masked(z, factor, offset, gradient, added, output, relu, residual):
    """The gradient behind the ReLU."""
    gradient = add(gradient, added)
    if residual:
        return where_positive(output, gradient)
    return where_positive(muladd(z, factor, offset), gradient) if relu else gradient


def _sums(depthwise: bool, relu: bool, residual: bool) -> Any:
    """`(y, kernel, factor, offset, mean, out, g, pooled_g) -> [B, 2, C]`: the sums of g' and of g' * (z - mean).

    g' is the gradient of the norm's output, z its input; `out` is only read where there is a residual.
    """

    @simd.kernel
    def sums(frame, start, stop):
        array, vectors = argument(frame, 0), argument(frame, 2)
        images, height, width, channels = length(array, 0), length(array, 1), length(array, 2), length(array, 3)
        y, out, row = data(array), data(result(frame, 0)), width * channels
        output, gradient = data(argument(frame, 5)), data(argument(frame, 6))
        span, stride = _span(channels), F * (width + 2) * channels
        memory = np.empty(15 * span + 3 * stride, np.float32)
        taps = memory.ctypes.data
        factor, offset, mean = taps + F * 9 * span, taps + F * 10 * span, taps + F * 11 * span
        added, total, weighted = taps + F * 12 * span, taps + F * 13 * span, taps + F * 14 * span
        ring = taps + F * 15 * span
        if depthwise:
            _repeat_taps(taps, data(argument(frame, 1)), channels, span, False)
        for image in range(start, stop):
            group = image * length(vectors, 0) // images * channels
            _repeat(factor, data(vectors), group, channels, span, np.float32(1))
            _repeat(offset, data(argument(frame, 3)), group, channels, span, np.float32(1))
            _repeat(mean, data(argument(frame, 4)), group, channels, span, np.float32(1))
            share = np.float32(1.0 / (height * width))
            _repeat(added, data(argument(frame, 7)), image * channels, channels, span, share)
            _clear(total, span)
            _clear(weighted, span)
            for h in range(height):
                at = (image * height + h) * row
                rows = (y + F * at, y + F * at, y + F * at)
                if depthwise:
                    rows = _next_rows(ring, stride, y, image, h, height, width, channels)
                for j in range(0, span, WIDTH):
                    k, f, o, m = _load_taps(taps, span, j), load(factor, j), load(offset, j), load(mean, j)
                    a, t, w = load(added, j), load(total, j), load(weighted, j)
                    for i in range(j, row, span):
                        z = _convolve(rows, i, channels, k) if depthwise else load(rows[0], i)
                        seen = load(output, at + i) if residual else z
                        g = _masked(z, f, o, load(gradient, at + i), a, seen, relu, residual)
                        t, w = add(t, g), muladd(g, sub(z, m), w)
                    store(total, j, t)
                    store(weighted, j, w)
            _fold(out, 2 * image * channels, total, channels, span, np.float32(1))
            _fold(out, (2 * image + 1) * channels, weighted, channels, span, np.float32(1))
        _keep(memory)

    return sums


@_kernel
def _add_tap_gradients(sums, span, j, dz, rows, row, channels):
    """Adds to the nine gradients of the taps what one row of output gradients gives."""
    t0, t1, t2, t3, t4, t5, t6, t7, t8 = _load_taps(sums, span, j)
    for i in range(j, row, span):
        d = load(dz, channels + i)
        t0 = muladd(d, load(rows[0], i), t0)
        t1 = muladd(d, load(rows[0], i + channels), t1)
        t2 = muladd(d, load(rows[0], i + 2 * channels), t2)
        t3 = muladd(d, load(rows[1], i), t3)
        t4 = muladd(d, load(rows[1], i + channels), t4)
        t5 = muladd(d, load(rows[1], i + 2 * channels), t5)
        t6 = muladd(d, load(rows[2], i), t6)
        t7 = muladd(d, load(rows[2], i + channels), t7)
        t8 = muladd(d, load(rows[2], i + 2 * channels), t8)
    store(sums, j, t0)
    store(sums, span + j, t1)
    store(sums, 2 * span + j, t2)
    store(sums, 3 * span + j, t3)
    store(sums, 4 * span + j, t4)
    store(sums, 5 * span + j, t5)
    store(sums, 6 * span + j, t6)
    store(sums, 7 * span + j, t7)
    store(sums, 8 * span + j, t8)


def _gradients(depthwise: bool, relu: bool, residual: bool) -> Any:
    """`(y, kernel, factor, offset, mean, slope, shift, out, g, pooled_g)` -> gradients of `y` and of the rest.

    The gradient of the norm's input is `g' * factor - (z - mean) * slope - shift`. The second result is that of the
    depthwise kernel, `[B, 9, C]`, or g', the residual's.
    """

    @simd.kernel
    def gradients(frame, start, stop):
        array, vectors = argument(frame, 0), argument(frame, 2)
        images, height, width, channels = length(array, 0), length(array, 1), length(array, 2), length(array, 3)
        y, dy, second, row = data(array), data(result(frame, 0)), data(result(frame, 1)), width * channels
        output, gradient = data(argument(frame, 7)), data(argument(frame, 8))
        span, stride = _span(channels), F * (width + 2) * channels
        memory = np.empty(33 * span + 6 * stride, np.float32)
        taps = memory.ctypes.data
        turned, tap_sums = taps + F * 9 * span, taps + F * 18 * span
        factor, offset, mean = taps + F * 27 * span, taps + F * 28 * span, taps + F * 29 * span
        slope, shift, added = taps + F * 30 * span, taps + F * 31 * span, taps + F * 32 * span
        ring = taps + F * 33 * span
        dz_ring = ring + 3 * stride
        one = np.float32(1)
        if depthwise:
            _repeat_taps(taps, data(argument(frame, 1)), channels, span, False)
            _repeat_taps(turned, data(argument(frame, 1)), channels, span, True)
        for image in range(start, stop):
            group = image * length(vectors, 0) // images * channels
            _repeat(factor, data(vectors), group, channels, span, one)
            _repeat(offset, data(argument(frame, 3)), group, channels, span, one)
            _repeat(mean, data(argument(frame, 4)), group, channels, span, one)
            _repeat(slope, data(argument(frame, 5)), group, channels, span, one)
            _repeat(shift, data(argument(frame, 6)), group, channels, span, one)
            _repeat(
                added, data(argument(frame, 9)), image * channels, channels, span, np.float32(1.0 / (height * width))
            )
            if depthwise:
                _clear(tap_sums, 9 * span)
                _fill_row(dz_ring, y, image, -1, height, width, channels)
                _fill_row(dz_ring + stride, y, image, -1, height, width, channels)
                _fill_row(dz_ring + 2 * stride, y, image, -1, height, width, channels)
            for h in range(height):
                at = (image * height + h) * row
                rows = (y + F * at, y + F * at, y + F * at)
                # A row of the norm's input gradient: into the ring for the convolution's, or the result itself.
                dz = dy + F * (at - channels)
                if depthwise:
                    rows = _next_rows(ring, stride, y, image, h, height, width, channels)
                    dz = dz_ring + stride * (h % 3)
                for j in range(0, span, WIDTH):
                    k, f, o, m = _load_taps(taps, span, j), load(factor, j), load(offset, j), load(mean, j)
                    p, s, a = load(slope, j), load(shift, j), load(added, j)
                    for i in range(j, row, span):
                        z = _convolve(rows, i, channels, k) if depthwise else load(rows[0], i)
                        seen = load(output, at + i) if residual else z
                        g = _masked(z, f, o, load(gradient, at + i), a, seen, relu, residual)
                        if residual:
                            store(second, at + i, g)
                        store(dz, channels + i, sub(sub(mul(g, f), s), mul(sub(z, m), p)))
                    if depthwise:
                        _add_tap_gradients(tap_sums, span, j, dz, rows, row, channels)
                if depthwise and h > 0:
                    _convolve_row(dy, at - row, dz_ring, stride, h - 1, turned, span, row, channels)
            if depthwise:
                _fill_row(dz_ring + stride * (height % 3), y, image, -1, height, width, channels)
                _convolve_row(
                    dy, ((image + 1) * height - 1) * row, dz_ring, stride, height - 1, turned, span, row, channels
                )
                for tap in range(9):
                    _fold(second, (9 * image + tap) * channels, tap_sums + F * tap * span, channels, span, one)
        _keep(memory)

    return gradients


@_kernel
def _convolve_row(out, at, ring, stride, h, taps, span, row, channels):
    """Row h of the convolution of the padded rows in a ring."""
    rows = (ring + stride * ((h + 2) % 3), ring + stride * (h % 3), ring + stride * ((h + 1) % 3))
    for j in range(0, span, WIDTH):
        k = _load_taps(taps, span, j)
        for i in range(j, row, span):
            store(out, at + i, _convolve(rows, i, channels, k))


# Positions whose rows stay in the first cache while all blocks of the product go over them.
_POSITIONS = 64


@_kernel
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
    store(out, r0, a0)
    store(out, r0 + 16, a1)
    store(out, r0 + 32, a2)
    store(out, r0 + 48, a3)
    store(out, r1, b0)
    store(out, r1 + 16, b1)
    store(out, r1 + 32, b2)
    store(out, r1 + 48, b3)
    store(out, r2, c0)
    store(out, r2 + 16, c1)
    store(out, r2 + 32, c2)
    store(out, r2 + 48, c3)
    store(out, r3, d0)
    store(out, r3 + 16, d1)
    store(out, r3 + 32, d2)
    store(out, r3 + 48, d3)


@_kernel
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
    store(out, at, a0)
    store(out, at + outputs, a1)
    store(out, at + 2 * outputs, a2)
    store(out, at + 3 * outputs, a3)
    at += 4 * outputs
    store(out, at, a4)
    store(out, at + outputs, a5)
    store(out, at + 2 * outputs, a6)
    store(out, at + 3 * outputs, a7)


@_kernel
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


def _products() -> Any:
    """`(x [parts, P, I], g [parts, P, O]) -> [parts, I, O]`: each part's sum over P of the outer products."""

    @simd.kernel
    def products(frame, start, stop):
        first, second = argument(frame, 0), argument(frame, 1)
        positions, inputs, outputs = length(first, 1), length(first, 2), length(second, 2)
        for part in range(start, stop):
            out = data(result(frame, 0)) + F * part * inputs * outputs
            _clear(out, inputs * outputs)
            x, g = data(first) + F * part * positions * inputs, data(second) + F * part * positions * outputs
            _add_products(x, inputs, g, outputs, positions, out)

    return products


@_kernel
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


@_kernel
def _store_64(out, at, v0, v1, v2, v3):
    store(out, at, v0)
    store(out, at + 16, v1)
    store(out, at + 32, v2)
    store(out, at + 48, v3)


@_kernel
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
    store(out, at, a0)
    store(out, at + outputs, a1)
    store(out, at + 2 * outputs, a2)
    store(out, at + 3 * outputs, a3)
    at += 4 * outputs
    store(out, at, a4)
    store(out, at + outputs, a5)
    store(out, at + 2 * outputs, a6)
    store(out, at + 3 * outputs, a7)


def _multiply() -> Any:
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


def _stem() -> Any:
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
            _clear(out, STEM_TAPS * outputs)
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
        _keep(memory)

    return stem


def fits(shape: tuple[int, ...]) -> bool:
    """Whether the rows of a map `[B, H, W, C]` are whole vectors, whose channels begin anew at a row's end."""
    _, _, width, channels = shape
    return (width * channels) % math.lcm(channels, WIDTH) == 0


_MAKERS: dict[str, Callable[..., Any]] = {
    "moments": _moments,
    "outputs": _outputs,
    "sums": _sums,
    "gradients": _gradients,
    "products": _products,
    "multiply": _multiply,
    "stem": _stem,
}


@functools.cache
def target() -> str:
    """Name of the call target of these kernels."""
    sources = b"".join(pathlib.Path(file).read_bytes() for file in (simd.__file__, __file__))
    return simd.register(f"dmosnet_jax_{hashlib.sha256(sources).hexdigest()[:16]}")


def call(kind: str, shapes: Sequence[tuple[int, ...]], *arguments: jax.Array | None, **flags: bool) -> list[jax.Array]:
    """Runs a kernel: see the function that makes it, `_MAKERS[kind]`, for its arguments, results and flags.

    Args:
        kind: a key of `_MAKERS`.
        shapes: of the results, which are float32.
        *arguments: float32 arrays; None for one that is not read.
        **flags: of the maker, in its order.
    """
    variant = (kind, *flags.values())
    number = _VARIANTS.index(variant)
    _compile(number)
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    given = [jnp.zeros((0,), jnp.float32) if argument is None else argument for argument in arguments]
    return list(jax.ffi.ffi_call(target(), results)(*given, kernel=np.int64(number)))


_NORMS = [(True, True, False), (False, True, False), (False, False, False), (False, True, True)]
_VARIANTS: list[tuple[Any, ...]] = [
    ("products",),
    ("multiply",),
    ("stem",),
    ("moments", False),
    ("moments", True),
    *((kind, *flags) for kind in ("outputs", "sums", "gradients") for flags in _NORMS),
]


@functools.cache
def _compile(number: int) -> None:
    kind, *flags = _VARIANTS[number]
    simd.place(number, _MAKERS[kind](*flags))
