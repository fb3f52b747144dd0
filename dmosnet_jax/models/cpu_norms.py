"""Batch normalisation with what stands before and behind it, in few passes over the maps, for XLA's CPU programs.

A training step on a CPU waits for memory. XLA writes a map after every convolution, norm and gate and reads it again
for every sum; here a depthwise 3x3 convolution is computed anew, from a few rows in the cache, in each of the four
passes (statistics, output; sums for the gradient, gradient), so its output is never written, and the norm, its ReLU
and the pooled map that the gate wants come from the same pass.

Arrays are float32 `[B, H, W, C]`; vectors of a group of images `[G, C]`, group g being images `g * B / G` onwards. What
is summed over an image comes out per image, so no result depends on the number of threads.
"""

from typing import Any

import numpy as np

from dmosnet_jax.core import simd
from dmosnet_jax.core.simd import (
    WIDTH,
    F,
    add,
    argument,
    clear,
    data,
    inlined,
    keep,
    length,
    load,
    load_one,
    mul,
    muladd,
    result,
    store,
    store_one,
    sub,
    where_positive,
    zeros,
)


@inlined
def _span(channels):
    """Floats after which the channels begin again at the start of a vector."""
    span = channels
    while span % WIDTH:
        span += channels
    return span


@inlined
def _repeat(out, source, start, channels, span, scale):
    """Writes `source[start : start + channels] * scale` over and over into `span` floats."""
    for i in range(span):
        store_one(out, i, load_one(source, start + i % channels) * scale)


@inlined
def _repeat_taps(out, kernel, channels, span, turned):
    for tap in range(9):
        _repeat(out + F * tap * span, kernel, (8 - tap if turned else tap) * channels, channels, span, np.float32(1))


@inlined
def _fold(out, at, sums, channels, span, scale):
    """Writes the sums over the repetitions of each channel."""
    for c in range(channels):
        total = np.float32(0)
        for i in range(c, span, channels):
            total += load_one(sums, i)
        store_one(out, at + c, total * scale)


@inlined
def _fill_row(row, y, image, h, height, width, channels):
    """Row h of an image with a position of zeros on either side; all zeros outside of the image."""
    for i in range(channels):
        store_one(row, i, np.float32(0))
        store_one(row, (width + 1) * channels + i, np.float32(0))
    inside, base = 0 <= h < height, (image * height + h) * width * channels
    for i in range(0, width * channels, WIDTH):
        store(row, channels + i, load(y, base + i) if inside else zeros())


@inlined
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


@inlined
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


@inlined
def _next_rows(ring, stride, y, image, h, height, width, channels):
    """Addresses of the padded rows h - 1, h and h + 1; the last is filled now, the others were by the calls before."""
    row0, row1, row2 = ring + stride * (h % 3), ring + stride * ((h + 1) % 3), ring + stride * ((h + 2) % 3)
    if h == 0:
        _fill_row(row0, y, image, -1, height, width, channels)
        _fill_row(row1, y, image, 0, height, width, channels)
    _fill_row(row2, y, image, h + 1, height, width, channels)
    return row0, row1, row2


def moments_kernel(depthwise: bool) -> Any:
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
            clear(total, span)
            clear(square, span)
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
        keep(memory)  # to here, or it would be freed after its last use

    return moments


def outputs_kernel(depthwise: bool, relu: bool, residual: bool) -> Any:
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
            clear(total, span)
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
        keep(memory)

    return outputs


@inlined
def _masked(z, factor, offset, gradient, added, output, relu, residual):
    """The gradient behind the ReLU."""
    gradient = add(gradient, added)
    if residual:
        return where_positive(output, gradient)
    return where_positive(muladd(z, factor, offset), gradient) if relu else gradient


def sums_kernel(depthwise: bool, relu: bool, residual: bool) -> Any:
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
            clear(total, span)
            clear(weighted, span)
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
        keep(memory)

    return sums


@inlined
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


def gradients_kernel(depthwise: bool, relu: bool, residual: bool) -> Any:
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
                clear(tap_sums, 9 * span)
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
        keep(memory)

    return gradients


@inlined
def _convolve_row(out, at, ring, stride, h, taps, span, row, channels):
    """Row h of the convolution of the padded rows in a ring."""
    rows = (ring + stride * ((h + 2) % 3), ring + stride * (h % 3), ring + stride * ((h + 1) % 3))
    for j in range(0, span, WIDTH):
        k = _load_taps(taps, span, j)
        for i in range(j, row, span):
            store(out, at + i, _convolve(rows, i, channels, k))
