"""Exact k nearest neighbours over all devices of a mesh.

Rows are shared out over the devices and every shard of candidates travels once round the ring: a device holds its own
rows, one visiting shard and one block of similarities. Sorting is what accelerators are slow at, so little is sorted: a
block's columns are seen in groups, and the k best values of a row lie in the k groups with the highest maxima. Once the
running lists have filled up, few groups hold anything better than a row's k-th best; then only these are looked into.
The result stays exact.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float

from dmosnet_jax.core import parallel
from dmosnet_jax.memory.clustering import jaccard
from dmosnet_jax.memory.clustering.neighbours import Neighbours
from dmosnet_jax.memory.tables import TableRows, allocate

QUERY_BLOCK = 4096
CANDIDATE_BLOCK = 32_768
GROUP = 32
# Groups of the cheap selection; XLA has a special top-k for GPUs up to this length.
FEW = 16
# Calls of the compiled search, at most: between them progress is shown and signals are heard.
_PARTS = 16

Lists = tuple[jax.Array, jax.Array]


class _How(NamedTuple):
    """Sizes of a search."""

    k: int
    query: int  # rows of a query block
    per_part: int  # query blocks of a call
    block: int  # columns of a block of similarities
    padded: int  # rows of a device's part, filled up to whole blocks
    dtype: Any  # of the products


def _best_of_groups(grouped: jax.Array, first: jax.Array, k: int, kept: int) -> Lists:
    """The k best values of each row, ties by lower column, if they lie in the `kept` groups of the highest maxima.

    Args:
        grouped: float32 [Q, G, group] similarities.
        first: index of the first column.
        k: list length.
        kept: groups to look into.

    Returns:
        [Q, k] values and [Q, k] int32 indices, fewer columns where the groups have fewer.
    """
    queries, groups, group = grouped.shape
    if groups > kept:
        _, chosen = lax.top_k(grouped.max(axis=2), kept)
        # In rising order, so that top_k, which prefers earlier positions, goes on preferring lower indices.
        chosen = jnp.sort(chosen, axis=1)
        grouped = jnp.take_along_axis(grouped, chosen[:, :, None], axis=1)
    else:
        chosen = jnp.broadcast_to(jnp.arange(groups)[None, :], (queries, groups))
    flat = grouped.reshape(queries, -1)
    values, position = lax.top_k(flat, min(k, flat.shape[1]))
    column = jnp.take_along_axis(chosen, position // group, axis=1) * group + position % group
    return values, column.astype(jnp.int32) + first


def _merge(best: Lists, new: Lists, k: int) -> Lists:
    """The k best of two lists, by falling value and then rising index: shards come round in no order of index."""
    values = jnp.concatenate([best[0], new[0]], axis=1)
    ids = jnp.concatenate([best[1], new[1]], axis=1)
    negative, ids = lax.sort((-values, ids), dimension=1, num_keys=2)
    return -negative[:, :k], ids[:, :k]


def _take_block(similarity: jax.Array, first: jax.Array, best: Lists, k: int) -> Lists:
    """Offers a block of similarities [Q, C] to the running lists."""
    queries, columns = similarity.shape
    grouped = similarity.reshape(queries, columns // GROUP, GROUP)
    # A value equal to the k-th best may still come in by its lower index.
    promising = (grouped.max(axis=2) >= best[0][:, -1:]).sum(axis=1)

    def take(kept: int) -> Lists:
        return _merge(best, _best_of_groups(grouped, first, k, kept), k)

    return lax.cond(promising.max() <= FEW, lambda: take(FEW), lambda: take(k))


def _search_part(shard: jax.Array, start: jax.Array, *, axis: str, devices: int, first: int, rows: int, how: _How):
    """What one device does: some of its rows, from `start`, against every shard in turn; values and indices [n, k].

    Of the table's rows those from `first` on count, so many as `rows`.
    """
    local, k = shard.shape[0], how.k
    shard = jnp.pad(shard, ((0, how.padded - local), (0, 0)))
    me = lax.axis_index(axis)
    queries = lax.dynamic_slice_in_dim(shard, start, how.query * how.per_part).astype(how.dtype)
    queries = queries.reshape(how.per_part, how.query, shard.shape[1])

    def visit(candidates, owner, best):
        def one_query_block(args):
            query, values, ids = args

            def one_candidate_block(j, running):
                part = lax.dynamic_slice_in_dim(candidates, j * how.block, how.block)
                similarity = jnp.matmul(
                    query, part.T, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
                )
                column = j * how.block + jnp.arange(how.block, dtype=jnp.int32)
                index = owner * local + column - first
                real = (column < local) & (index >= 0) & (index < rows)
                similarity = jnp.where(real[None, :], similarity, -jnp.inf)
                return _take_block(similarity, index[0].astype(jnp.int32), running, k)

            return lax.fori_loop(0, how.padded // how.block, one_candidate_block, (values, ids))

        return lax.map(one_query_block, (queries, *best))

    def step(turn, carry):
        candidates, best = carry
        best = visit(candidates, (me + turn) % devices, best)
        # One hop to the left: after t turns device d holds the shard of device d + t.
        candidates = lax.ppermute(candidates, axis, [(d, (d - 1) % devices) for d in range(devices)])
        return candidates, best

    shape = (how.per_part, how.query, k)
    empty = (jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, rows, jnp.int32))
    empty = jax.tree.map(lambda x: lax.pcast(x, axis, to="varying"), empty)
    _, (values, ids) = lax.fori_loop(0, devices, step, (shard.astype(how.dtype), empty))
    return values.reshape(-1, k), ids.reshape(-1, k)


@functools.lru_cache(maxsize=8)
def _compiled(mesh: Mesh, first: int, rows: int, how: _How):
    axis = mesh.axis_names[0]
    body = functools.partial(_search_part, axis=axis, devices=mesh.size, first=first, rows=rows, how=how)
    spec = PartitionSpec(axis)
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=(spec, spec)))


def _blocks(local: int, query_block: int, candidate_block: int) -> tuple[int, int, int]:
    """(query block, candidate block, padded rows per device): blocks that divide the padded rows evenly."""
    blocks = -(-local // candidate_block)
    block = -(-local // (blocks * GROUP)) * GROUP
    padded = block * blocks
    query = min(query_block, block)
    while padded % query:
        query -= 1
    return query, block, padded


def search_device(
    features: Float[np.ndarray | jax.Array, "n d"] | TableRows,
    k: int,
    *,
    mesh: Mesh | None = None,
    candidates: int = 0,
    query_block: int = QUERY_BLOCK,
    candidate_block: int = CANDIDATE_BLOCK,
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Neighbours:
    """Exact k nearest neighbours by inner product, rows shared out over all devices of the mesh.

    Similarities are float32 products at the highest precision the device offers.

    Args:
        features: L2-normalised. With several processes: the same array in each, or rows of a table over the mesh, of
            which only process 0 takes a copy, and only to score candidates.
        k: list length, the row itself included; at most n entries are returned.
        mesh: the devices, default all; a mesh with one axis.
        candidates: more than 0: find this many with bfloat16 products, then the k best of them by float32 similarity.
        query_block: most rows of a block of similarities.
        candidate_block: most columns of a block of similarities.
        threads: host threads that score candidates.
        progress: called with the finished fraction.

    Returns:
        `Neighbours` as NumPy arrays, the same in every process.
    """
    mesh = parallel.make_mesh() if mesh is None else mesh
    rows, dim = features.shape
    k = min(k, rows)
    length = min(max(candidates, k), rows)
    if not isinstance(features, TableRows):
        like = jax.ShapeDtypeStruct((-(-rows // mesh.size) * mesh.size, dim), jnp.float32)
        table = allocate(np.asarray(features, np.float32), like, parallel.by_rows(mesh))
        features = TableRows(table, 0, rows, mesh)
    local = features.table.shape[0] // mesh.size
    query, block, padded = _blocks(local, query_block, candidate_block)
    queries = padded // query
    per_part = -(-queries // min(_PARTS, queries))
    how = _How(length, query, per_part, block, padded, jnp.bfloat16 if candidates else jnp.float32)
    run, span = _compiled(mesh, features.start, rows, how), query * per_part
    values = np.empty((mesh.size, local, length), np.float32)
    ids = np.empty((mesh.size, local, length), np.int32)
    for begin in range(0, local, span):
        # The last call may look at some rows again, so that all calls are one program.
        start = min(begin, padded - span)
        stop = min(start + span, local)
        found = parallel.to_host(run(features.table, np.int32(start)))
        for whole, part in zip((values, ids), found, strict=True):
            whole[:, start:stop] = part.reshape(mesh.size, span, length)[:, : stop - start]
        if progress is not None:
            progress(min((begin + span) / local, 1.0))
    mine = slice(features.start, features.stop)
    found = Neighbours(ids.reshape(-1, length)[mine], values.reshape(-1, length)[mine])
    if not candidates:
        return found
    best = parallel.agree(functools.partial(_rescore, features.on_first, found, k, threads))
    return Neighbours(
        *parallel.from_first((found.indices[:, :k], found.similarities[:, :k]) if best is None else best[:2])
    )


def _rescore(features: np.ndarray | None, found: Neighbours, k: int, threads: int | None) -> Neighbours:
    """The k best candidates by exact similarity, ties by lower index; where the features are."""
    assert features is not None
    rows, length = found.indices.shape
    indptr = np.arange(rows + 1, dtype=np.int64) * length
    flat = np.ascontiguousarray(found.indices).reshape(-1)
    exact = jaccard.pair_products(features, indptr, flat, threads=threads).reshape(rows, length)
    order = np.lexsort((found.indices, -exact), axis=1)[:, :k]
    return Neighbours(
        np.take_along_axis(found.indices, order, axis=1), np.take_along_axis(exact, order, axis=1).astype(np.float32)
    )
