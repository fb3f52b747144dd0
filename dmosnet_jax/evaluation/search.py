"""Exact search of the most similar features, by blocks: on all cores, or on the accelerator.

No product is larger than a block of queries by a block of the gallery, and of the gallery no more is in memory than a
few blocks, so that it may be larger than the memory. Equal similarities are in the order of the gallery.
"""

import collections
import concurrent.futures
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Float32, Int64

from dmosnet_jax.core import arguments
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.kernels import jit, map_rows, thread_count
from dmosnet_jax.memory.clustering.neighbours import take_rows

BLOCK, QUERIES = 16_384, 2048
# On the device a block is sent at once.
_DEVICE_BLOCK = 65_536
# Up to so many queries a row is read once for all of them; more are worth a matrix product.
_FEW = 16
# float32's exponent begins so much lower than float16's.
_REBIAS = np.float32(2.0**112)


class Matches(NamedTuple):
    """The k best of each query, best first.

    Attributes:
        indices: rows of the gallery.
        scores: inner products, which are cosines of unit features.
    """

    indices: Int64[np.ndarray, "q k"]
    scores: Float32[np.ndarray, "q k"]


@jit()
def _widen(halves, bits, values):
    """float16 numbers, by their bits, as float32: ten times as fast as NumPy. `bits` and `values` are one array."""
    for r in range(halves.shape[0]):
        for c in range(halves.shape[1]):
            half = np.uint32(halves[r, c])
            sign, rest = half & np.uint32(0x8000), half & np.uint32(0x7FFF)
            bits[r, c] = (sign << np.uint32(16)) | (rest << np.uint32(13))
        for c in range(halves.shape[1]):
            values[r, c] *= _REBIAS


@jit(fastmath={"reassoc", "contract"})
def _products(rows, queries):
    """Inner products of few queries with rows of float16 or float32, given by their bits, float32 [q, n]."""
    product = np.empty((queries.shape[0], rows.shape[0]), np.float32)
    row = np.empty((1, rows.shape[1]), np.uint32)
    values = row.view(np.float32)
    for r in range(rows.shape[0]):
        if rows.itemsize == 2:
            _widen(rows[r : r + 1], row, values)
        else:
            row[0] = rows[r]
        for q in range(queries.shape[0]):
            total = np.float32(0)
            for c in range(rows.shape[1]):
                total += values[0, c] * queries[q, c]
            product[q, r] = total
    return product


def _widened(rows: np.ndarray) -> np.ndarray:
    if rows.dtype != np.float16:
        return np.asarray(rows, np.float32)
    values = np.empty(rows.shape, np.float32)
    _widen(np.ascontiguousarray(rows).view(np.uint16), values.view(np.uint32), values)
    return values


def search(
    queries: Float[np.ndarray, "q d"],
    gallery: Sequence[Float[np.ndarray, "_ d"]],
    top_k: int,
    *,
    backend: str = "auto",
    block: int | None = None,
    threads: int | None = None,
) -> Matches:
    """The most similar rows of a gallery, by inner products in float32.

    Args:
        queries: of unit length, for cosines.
        gallery: its rows in one array after the other, float16 or float32; may be mapped from files. Of a row that is
            not a number nothing is found.
        top_k: how many; at most all are returned.
        backend: "host", "device", or "auto": the device where that is an accelerator.
        block: rows of the gallery at once.
        threads: of the host, default all cores (BLAS has its own setting).

    Raises:
        ConfigError: `top_k` or `block` below 1, or an unknown backend.
        DataError: no matrices of numbers, queries of another size than the gallery, or not finite.
    """
    top_k = arguments.count("search: top_k", top_k)
    block = None if block is None else arguments.count("search: block", block)
    if backend not in ("auto", "host", "device"):
        raise ConfigError(f"search: backend={backend!r} is unknown; use 'auto', 'host' or 'device'")
    queries = arguments.matrix("search: queries", queries, may_be_empty=True)
    if not isinstance(gallery, Sequence) or isinstance(gallery, str):
        raise DataError("search: the gallery must be a list of matrices: give [features]")
    shape = "images, dimension"
    gallery = [arguments.numbers(f"search: features {i} of the gallery", g, shape=shape) for i, g in enumerate(gallery)]
    widths = {part.shape[1] for part in gallery} - {queries.shape[1]}
    if widths:
        raise DataError(f"search: queries have {queries.shape[1]} values, the gallery's features {widths.pop()}")
    if not np.isfinite(queries).all():
        raise DataError("search: the queries' features are not finite; the network has diverged or is damaged")
    if backend == "auto":
        backend = "host" if jax.default_backend() == "cpu" else "device"
    k = min(top_k, sum(len(part) for part in gallery))
    found = [
        _on_host(part, gallery, k, block or BLOCK, thread_count(threads))
        if backend == "host"
        else _on_device(part, gallery, k, block or _DEVICE_BLOCK)
        for part in np.array_split(queries, max(-(-len(queries) // QUERIES), 1))
    ]
    return Matches(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))


def _blocks(gallery: Sequence[np.ndarray], size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of rows, each with the number of its first."""
    first = 0
    for part in gallery:
        for start in range(0, len(part), size):
            yield first + start, part[start : start + size]
        first += len(part)


def _on_host(queries: np.ndarray, gallery: Sequence[np.ndarray], k: int, size: int, threads: int) -> Matches:
    shape = (len(queries), k)
    scores, indices = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)
    worst = np.full(len(queries), -np.inf, np.float32)

    few = len(queries) <= _FEW

    def read(first: int, rows: np.ndarray) -> tuple[int, np.ndarray]:
        if not few:
            return first, _widened(rows)
        if rows.dtype != np.float16:
            rows = np.asarray(rows, np.float32)
        return first, _products(np.ascontiguousarray(rows).view(f"u{rows.itemsize}"), queries)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()

        def finish() -> None:
            first, block = waiting.popleft().result()
            product = block if few else queries @ block.T

            def select(start: int, stop: int) -> None:
                take_rows(product, 0, first, start, stop, scores, indices, worst)

            map_rows(select, len(queries), threads=threads, task_rows=max(-(-len(queries) // threads), 1))

        for first, rows in _blocks(gallery, size):
            waiting.append(pool.submit(read, first, rows))
            if len(waiting) > threads:
                finish()
        while waiting:
            finish()
    return Matches(indices, scores)


def _on_device(queries: np.ndarray, gallery: Sequence[np.ndarray], k: int, size: int) -> Matches:
    scores = jnp.full((len(queries), k), -jnp.inf, jnp.float32)
    indices = jnp.full((len(queries), k), -1, jnp.int32)
    placed = jax.device_put(queries)
    for first, rows in _blocks(gallery, size):
        # Few programs: the last block of a part is filled up with zeros, which are not offered.
        count = len(rows)
        if count < size:
            rows = np.concatenate([rows, np.zeros((size - count, rows.shape[1]), rows.dtype)])
        scores, indices = _offer(placed, rows, np.int32(first), np.int32(count), scores, indices)
    return Matches(np.asarray(indices, np.int64), np.asarray(scores))


@functools.partial(jax.jit, donate_argnums=(4, 5))
def _offer(
    queries: jax.Array, rows: jax.Array, first: jax.Array, count: jax.Array, scores: jax.Array, indices: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The best of those so far and of the rows."""
    product = jnp.matmul(queries, rows.astype(jnp.float32).T, precision=lax.Precision.HIGHEST)
    numbers = jnp.arange(rows.shape[0], dtype=jnp.int32)
    # `top_k` takes what is not a number for the largest.
    product = jnp.where((numbers < count)[None, :] & ~jnp.isnan(product), product, -jnp.inf)
    # Of equal ones the first is taken, so those so far stand first.
    values, places = lax.top_k(jnp.concatenate([scores, product], axis=1), scores.shape[1])
    ids = jnp.concatenate([indices, jnp.broadcast_to((numbers + first)[None, :], product.shape)], axis=1)
    return values, jnp.take_along_axis(ids, places, axis=1)
