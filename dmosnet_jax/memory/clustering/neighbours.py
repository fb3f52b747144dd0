"""Exact k nearest neighbours, never more than a block of similarities at once.

On the host: BLAS multiplies blocks of the upper triangle only, since similarity is symmetric, and a compiled pass over
each block updates the running lists of its rows, another those of its columns. On accelerators: `neighbours_device`.

Order, everywhere: higher similarity first, equal similarities by lower index. An image is therefore its own first
neighbour, unless exact duplicates with lower indices come before it.
"""

import concurrent.futures
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Float32, Int, Int32

from dmosnet_jax.core import arguments, parallel
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.kernels import jit, thread_count
from dmosnet_jax.memory.tables import TableRows

BLOCK = 2048
# Blocks of rows that columns are compared with before the next rows.
_STRIP = 16
_MERGE_ROWS = 65_536
_PROBE_CELLS = 2**26  # similarities at once in measuring recall


class Neighbours(NamedTuple):
    """The k best of every row.

    Attributes:
        indices: best first, the row itself included.
        similarities: inner products; with `half_norms`, minus half the squared Euclidean distance.
        farthest: the lowest similarity of the row over all rows; None unless it was asked for.
    """

    indices: Int32[np.ndarray, "n k"]
    similarities: Float32[np.ndarray, "n k"]
    farthest: Float32[np.ndarray, " n"] | None = None


@jit()
def _insert(values, ids, value, index):
    """Puts a candidate into a list sorted by falling value; behind equal values, so earlier candidates stay ahead."""
    position = values.shape[0] - 1
    while position > 0 and values[position - 1] < value:
        values[position] = values[position - 1]
        ids[position] = ids[position - 1]
        position -= 1
    values[position] = value
    ids[position] = index


@jit()
def take_rows(block, row0, col0, start, stop, values, ids, worst):
    """Offers the columns of `block` to the lists of its rows `start..stop`."""
    last = values.shape[1] - 1
    for r in range(start, stop):
        row = row0 + r
        bound = worst[row]
        for c in range(block.shape[1]):
            if block[r, c] > bound:
                _insert(values[row], ids[row], block[r, c], col0 + c)
                bound = values[row, last]
        worst[row] = bound


@jit()
def _take_columns(block, row0, col0, start, stop, values, ids, worst):
    """Offers the rows of `block` to the lists of its columns `start..stop`."""
    last = values.shape[1] - 1
    for r in range(block.shape[0]):
        for c in range(start, stop):
            column = col0 + c
            if block[r, c] > worst[column]:
                _insert(values[column], ids[column], block[r, c], row0 + r)
                worst[column] = values[column, last]


def _strips(rows: int, block: int) -> Iterator[tuple[int, int]]:
    """First rows of strips, each with the first columns of all blocks from there on."""
    for first in range(0, rows, _STRIP * block):
        for col0 in range(first, rows, block):
            yield first, col0


def _spans(count: int, parts: int) -> list[tuple[int, int]]:
    edges = [count * part // parts for part in range(parts + 1)]
    return [(a, b) for a, b in itertools.pairwise(edges) if b > a]


def search_host(
    features: Float[np.ndarray, "n d"] | TableRows,
    k: int,
    *,
    half_norms: Float32[np.ndarray, " n"] | None = None,
    farthest: bool = False,
    block: int = BLOCK,
    share: tuple[int, int] = (0, 1),
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Neighbours:
    """Exact k nearest neighbours on the processor.

    Args:
        features: L2-normalised for cosine similarity; computed in float32. Of a table that is split over processes
            each holds a strip of rows and a block; all of them call this at once.
        k: list length; at most n entries are returned.
        half_norms: half the squared norm of each row: ranks by Euclidean distance instead.
        farthest: also find each row's lowest similarity.
        block: rows and columns of one block of similarities.
        share: (i, n): look at every n-th block only, from the i-th on; `merge` joins the n results.
        threads: threads for the selection (BLAS has its own setting), default all cores.
        progress: called with the finished fraction.

    Returns:
        `Neighbours` with min(k, n) columns.
    """
    if isinstance(features, TableRows):
        fetch = features.fetch
    else:
        whole = np.ascontiguousarray(features, np.float32)
        fetch = lambda start, stop: whole[start:stop]  # noqa: E731
    rows, k = features.shape[0], min(k, features.shape[0])
    values = np.full((rows, k), -np.inf, np.float32)
    ids = np.full((rows, k), -1, np.int32)
    worst = np.full(rows, -np.inf, np.float32)
    lowest = np.full(rows, np.inf, np.float32)
    workers = thread_count(threads)
    starts = range(0, rows, block)
    total, done = len(starts) * (len(starts) + 1) // 2, 0
    part, parts = share
    buffer = np.empty(min(block, rows) ** 2, np.float32)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for first, col0 in _strips(rows, block):
            if col0 == first:
                strip = fetch(first, min(first + _STRIP * block, rows))
            right = fetch(col0, min(col0 + block, rows))
            # Every list sees its candidates by rising index, which is what makes `_insert` break ties by index: those
            # of earlier strips as a column, then those of its own, at last the columns behind it.
            for row0 in range(first, min(col0 + 1, first + _STRIP * block), block):
                done += 1
                if done % parts != part:
                    continue
                left = strip[row0 - first : row0 - first + block]
                shape = (left.shape[0], right.shape[0])
                similarity = np.matmul(left, right.T, out=buffer[: shape[0] * shape[1]].reshape(shape))
                if half_norms is not None:
                    similarity -= half_norms[row0 : row0 + block, None]
                    similarity -= half_norms[None, col0 : col0 + block]
                state = (values, ids, worst)
                tasks = [pool.submit(take_rows, similarity, row0, col0, *s, *state) for s in _spans(shape[0], workers)]
                if col0 > row0:
                    tasks += [
                        pool.submit(_take_columns, similarity, row0, col0, *s, *state)
                        for s in _spans(shape[1], workers)
                    ]
                if farthest:
                    _lower(lowest, row0, similarity.min(axis=1))
                    _lower(lowest, col0, similarity.min(axis=0))
                for task in tasks:
                    task.result()
            if progress is not None:
                progress(done / total)
    return Neighbours(ids, values, lowest if farthest else None)


def _lower(lowest: np.ndarray, start: int, values: np.ndarray) -> None:
    part = lowest[start : start + values.shape[0]]
    np.minimum(part, values, out=part)


def merge(parts: Sequence[Neighbours]) -> Neighbours:
    """The k best of several searches over different candidates, each with all rows."""
    rows, k = parts[0].indices.shape
    indices, similarities = np.empty((rows, k), np.int32), np.empty((rows, k), np.float32)
    for start in range(0, rows, _MERGE_ROWS):
        some = slice(start, start + _MERGE_ROWS)
        ids = np.concatenate([part.indices[some] for part in parts], axis=1)
        values = np.concatenate([part.similarities[some] for part in parts], axis=1)
        order = np.lexsort((ids, -values), axis=1)[:, :k]
        indices[some] = np.take_along_axis(ids, order, axis=1)
        similarities[some] = np.take_along_axis(values, order, axis=1)
    return Neighbours(indices, similarities)


def _search_hosts(features: np.ndarray | TableRows, k: int, processes: Sequence[int], **options: Any) -> Neighbours:
    """`search_host` with the blocks shared out over processes, which all call this with the same features."""
    share = (sorted(processes).index(jax.process_index()), len(processes))
    mine = search_host(features, k, share=share, **options)
    indices, similarities = parallel.by_process((mine.indices, mine.similarities))
    return merge([Neighbours(indices[p], similarities[p]) for p in processes])


def recall(
    features: Float32[np.ndarray, "n d"], indices: Int[np.ndarray, "n k"], *, probes: int = 256, seed: int = 0
) -> float:
    """Share of the true nearest images that a table of neighbours has, for a random sample of rows.

    Args:
        features: as for the search.
        indices: no row twice in a line.
        probes: how many rows to search exactly.
        seed: of the sample.

    Returns:
        In [0, 1]; of images at equal similarities any will do.
    """
    rows, k = indices.shape
    sample = np.random.default_rng(seed).choice(rows, min(probes, rows), replace=False)
    hits = 0
    for part in np.array_split(sample, max(len(sample) * rows // _PROBE_CELLS, 1)):
        similarity = features[part] @ features.T
        found = np.take_along_axis(similarity, indices[part], axis=1)
        similarity.partition(rows - k, axis=1)
        hits += int((found >= similarity[:, rows - k, None]).sum())
    return hits / (len(sample) * k)


def search(
    features: Float[np.ndarray | jax.Array, "n d"] | TableRows,
    k: int,
    *,
    mesh: Mesh | None = None,
    backend: str = "auto",
    candidates: int = 0,
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Neighbours:
    """Exact k nearest neighbours by inner product, on the accelerators of the mesh or on the processor.

    Args:
        features: L2-normalised; NumPy, or a jax array for the device search, the same in each of several processes; or
            rows of a table that is split over them. All processes call this and get the same result.
        k: list length, the row itself included; at most n entries are returned.
        mesh: `jax.sharding.Mesh`; the work is shared out over all its devices. None: all devices of all processes. Of a
            table it is always the table's.
        backend: "host", "device", or "auto": device where those are accelerators, host on CPU, where it is faster.
        candidates: for devices: look for this many, more than k, with bfloat16 products, and take the k best of them
            by exact similarity. `recall` says what that loses. 0: exact throughout, as the host's search always is.
        threads: host threads, default all cores.
        progress: called with the finished fraction.

    Returns:
        `Neighbours` as NumPy arrays.

    Raises:
        ConfigError: unknown backend, k below 1, or fewer candidates than k.
        DataError: features that are no matrix of finite numbers; of those on devices the shape alone is looked at.
    """
    k, candidates = (
        arguments.count("neighbours: k", k),
        arguments.count("neighbours: candidates", candidates, least=0),
    )
    if isinstance(features, TableRows):
        mesh = features.mesh
    elif not isinstance(features, jax.Array):
        features = arguments.matrix("neighbours: features", features)
        if found := arguments.first_not_finite(features):
            raise DataError(f"neighbours: {found[0]} features are not finite, the first is row {found[1]}")
    elif features.ndim != 2 or 0 in features.shape:
        raise DataError(f"neighbours: features have shape {features.shape}; expected [images, dimension], not empty")
    if backend not in ("auto", "host", "device"):
        raise ConfigError(f"neighbours: backend={backend!r} is unknown; use 'auto', 'host' or 'device'")
    if 0 < candidates < k:
        raise ConfigError(f"neighbours: candidates={candidates} must be at least k={k}, or 0 for the exact search")
    devices = jax.devices() if mesh is None else list(mesh.devices.flat)
    if backend == "auto":
        backend = "device" if devices[0].platform != "cpu" else "host"
    if backend == "host":
        rows = features if isinstance(features, TableRows) else np.asarray(features)
        processes = sorted({device.process_index for device in devices})
        if len(processes) > 1:
            return _search_hosts(rows, k, processes, threads=threads, progress=progress)
        return search_host(rows, k, threads=threads, progress=progress)
    from dmosnet_jax.memory.clustering import neighbours_device  # which imports this module

    return neighbours_device.search_device(
        features, k, mesh=mesh, candidates=candidates, threads=threads, progress=progress
    )
