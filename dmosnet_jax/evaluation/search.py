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

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.kernels import map_rows, thread_count
from dmosnet_jax.memory.clustering.neighbours import take_rows

BLOCK, QUERIES = 16_384, 2048
# On the device a block is sent at once.
_DEVICE_BLOCK = 65_536


class Matches(NamedTuple):
    """The k best of each query, best first.

    Attributes:
        indices: rows of the gallery.
        scores: inner products, which are cosines of unit features.
    """

    indices: Int64[np.ndarray, "q k"]
    scores: Float32[np.ndarray, "q k"]


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
        gallery: its rows in one array after the other, float16 or float32; may be mapped from files.
        top_k: how many; at most all are returned.
        backend: "host", "device", or "auto": the device where that is an accelerator.
        block: rows of the gallery at once.
        threads: of the host, default all cores (BLAS has its own setting).

    Raises:
        ConfigError: `top_k` below 1, or an unknown backend.
        DataError: queries of another size than the gallery, or not finite.
    """
    if top_k < 1:
        raise ConfigError(f"top_k={top_k} must be at least 1")
    if backend not in ("auto", "host", "device"):
        raise ConfigError(f"search: backend={backend!r} is unknown; use 'auto', 'host' or 'device'")
    queries = np.ascontiguousarray(queries, np.float32)
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

    def loaded(item: tuple[int, np.ndarray]) -> tuple[int, np.ndarray]:
        return item[0], np.asarray(item[1], np.float32)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()

        def finish() -> None:
            first, rows = waiting.popleft().result()
            product = queries @ rows.T

            def select(start: int, stop: int) -> None:
                take_rows(product, 0, first, start, stop, scores, indices, worst)

            map_rows(select, len(queries), threads=threads, task_rows=max(-(-len(queries) // threads), 1))

        # Reading and widening the next blocks takes as long as the product with a single query.
        for item in _blocks(gallery, size):
            waiting.append(pool.submit(loaded, item))
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
    product = jnp.where((numbers < count)[None, :], product, -jnp.inf)
    # Of equal ones the first is taken, so those so far stand first.
    values, places = lax.top_k(jnp.concatenate([scores, product], axis=1), scores.shape[1])
    ids = jnp.concatenate([indices, jnp.broadcast_to((numbers + first)[None, :], product.shape)], axis=1)
    return values, jnp.take_along_axis(ids, places, axis=1)
