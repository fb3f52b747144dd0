"""Exact k nearest neighbours over all devices of a mesh.

Rows are shared out over the devices and every shard of candidates travels once round the ring: a device holds its own
rows, one visiting shard and one block of similarities. Inside a block the selection is in two levels: the k best values
of a row lie in the k column groups with the highest maxima, so only the group maxima and k groups are ever sorted; the
sort, which accelerators are slow at, sees a small share of the similarities and the result stays exact.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from dmosnet_jax.core import mesh as meshes
from dmosnet_jax.memory.neighbours import Neighbours
from dmosnet_jax.memory.placement import place_padded

QUERY_BLOCK = 4096
CANDIDATE_BLOCK = 8192
GROUP = 32


def _best_of_block(similarity: jax.Array, first: jax.Array, k: int, group: int) -> tuple[jax.Array, jax.Array]:
    """The k best columns of each row, ties by lower column: ([Q, k] values, [Q, k] int32 indices from `first`)."""
    queries, columns = similarity.shape
    groups = columns // group
    if groups <= k:
        values, best = lax.top_k(similarity, min(k, columns))
        return values, best.astype(jnp.int32) + first
    grouped = similarity.reshape(queries, groups, group)
    _, chosen = lax.top_k(grouped.max(axis=2), k)
    # In rising order, so that top_k, which prefers earlier positions, goes on preferring lower indices.
    chosen = jnp.sort(chosen, axis=1)
    kept = jnp.take_along_axis(grouped, chosen[:, :, None], axis=1).reshape(queries, k * group)
    values, position = lax.top_k(kept, k)
    column = jnp.take_along_axis(chosen, position // group, axis=1) * group + position % group
    return values, column.astype(jnp.int32) + first


def _merge(best: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array], k: int) -> tuple[jax.Array, jax.Array]:
    """The k best of two lists, by falling value and then rising index: shards come round in no order of index."""
    values = jnp.concatenate([best[0], new[0]], axis=1)
    ids = jnp.concatenate([best[1], new[1]], axis=1)
    negative, ids = lax.sort((-values, ids), dimension=1, num_keys=2)
    return -negative[:, :k], ids[:, :k]


def _search_shard(shard: jax.Array, *, axis: str, devices: int, rows: int, k: int, query_block: int, block: int):
    """What one device does: its own rows against every shard in turn. Returns values and indices, both [n, k]."""
    local = shard.shape[0]
    me = lax.axis_index(axis)
    queries = shard.reshape(local // query_block, query_block, shard.shape[1])

    def visit(candidates, owner, best):
        def one_query_block(args):
            query, values, ids = args

            def one_candidate_block(j, running):
                part = lax.dynamic_slice_in_dim(candidates, j * block, block)
                similarity = jnp.matmul(query, part.T, precision=lax.Precision.HIGHEST)
                first = (owner * local + j * block).astype(jnp.int32)
                padding = first + jnp.arange(block, dtype=jnp.int32) >= rows
                similarity = jnp.where(padding[None, :], -jnp.inf, similarity)
                return _merge(running, _best_of_block(similarity, first, k, GROUP), k)

            return lax.fori_loop(0, local // block, one_candidate_block, (values, ids))

        return lax.map(one_query_block, (queries, *best))

    def step(turn, carry):
        candidates, best = carry
        best = visit(candidates, (me + turn) % devices, best)
        # One hop to the left: after t turns device d holds the shard of device d + t.
        candidates = lax.ppermute(candidates, axis, [(d, (d - 1) % devices) for d in range(devices)])
        return candidates, best

    shape = (queries.shape[0], query_block, k)
    empty = (jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, rows, jnp.int32))
    empty = jax.tree.map(lambda x: lax.pcast(x, axis, to="varying"), empty)
    _, (values, ids) = lax.fori_loop(0, devices, step, (shard, empty))
    return values.reshape(local, k), ids.reshape(local, k)


@functools.lru_cache(maxsize=8)
def _compiled(mesh: Mesh, rows: int, k: int, query_block: int, block: int):
    axis = mesh.axis_names[0]
    body = functools.partial(
        _search_shard, axis=axis, devices=mesh.size, rows=rows, k=k, query_block=query_block, block=block
    )
    spec = PartitionSpec(axis)
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=(spec, spec)))


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
    features: np.ndarray | jax.Array,
    k: int,
    *,
    mesh: Mesh | None = None,
    query_block: int = QUERY_BLOCK,
    candidate_block: int = CANDIDATE_BLOCK,
) -> Neighbours:
    """Exact k nearest neighbours by inner product, rows shared out over all devices of the mesh.

    Similarities are float32 products at the highest precision the device offers.

    Args:
        features: float32 [N, D], L2-normalised. With several processes: the same array in each.
        k: list length, the row itself included; at most N entries are returned.
        mesh: the devices, default all; a mesh with one axis.
        query_block: most rows of a block of similarities.
        candidate_block: most columns of a block of similarities.

    Returns:
        `Neighbours` as NumPy arrays, the same in every process.
    """
    mesh = meshes.make_mesh() if mesh is None else mesh
    rows, dim = features.shape
    k = min(k, rows)
    query, block, local = _blocks(-(-rows // mesh.size), query_block, candidate_block)
    sharded = isinstance(features, jax.Array) and not features.is_fully_addressable
    host = np.asarray(meshes.to_host(features) if sharded else features, np.float32)
    table = jax.ShapeDtypeStruct((local * mesh.size, dim), jnp.float32)
    array = place_padded(host, table, meshes.by_rows(mesh))
    values, ids = meshes.to_host(_compiled(mesh, rows, k, query, block)(array))
    return Neighbours(ids[:rows], values[:rows])
