"""Cluster-level memory: one centroid per cluster (Cluster Contrast, Dai et al. 2021, arXiv 2103.11568).

The loss is the cross-entropy over the centroids. Images outside of clusters have no class and are left out.
Centroids start an epoch as the mean of their images' features, which are extracted anew, and follow the batches.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int, Int32

from dmosnet_jax.core import parallel
from dmosnet_jax.core.unit import unit_rows
from dmosnet_jax.memory import tables
from dmosnet_jax.memory.clustering import Clustering
from dmosnet_jax.memory.contrast import contrast
from dmosnet_jax.memory.tables import BY_ROWS, EVERYWHERE, Table


class Memory(flax.struct.PyTreeNode):
    """State of the cluster memory.

    Attributes:
        centroids: float32 [C, D], L2-normalised; zero rows beyond the clusters that exist.
        present: bool [C], which clusters exist.
        labels: int32 [R], cluster of each image; -1 for images outside of clusters, and beyond `num_rows`.
        num_rows: images, N.
        momentum: share of the old centroid that an update keeps.
        temperature: divides similarities.
        hardest: an update uses, for each centroid, only the input that is least similar to it.
        mesh: devices that the tables are split over by rows; labels are on each.
    """

    centroids: Table
    present: Table
    labels: Table
    num_rows: int = flax.struct.field(pytree_node=False)
    momentum: float = flax.struct.field(pytree_node=False)
    temperature: float = flax.struct.field(pytree_node=False)
    hardest: bool = flax.struct.field(pytree_node=False)
    mesh: Mesh = flax.struct.field(pytree_node=False)

    def completed(self, like: Any) -> "Memory":
        """As it is: a checkpoint leaves nothing out."""
        del like
        return self

    def compacted(self) -> "Memory":
        """As it is: nothing follows from the rest."""
        return self


def shapes(
    images: int,
    dim: int,
    *,
    momentum: float,
    temperature: float,
    hardest: bool = False,
    capacity: int | None = None,
    mesh: Mesh | None = None,
) -> Memory:
    """A memory of `jax.ShapeDtypeStruct`s, to restore a checkpoint into; `set_labels` fills it.

    Args:
        images: N.
        dim: feature length.
        momentum: share of the old centroid that an update keeps (paper: 0.1).
        temperature: divides similarities (paper: 0.05).
        hardest: update a centroid once a batch, by the input that is least similar to it.
        capacity: most clusters there will be, default N.
        mesh: devices to split the tables over; default the default device alone.

    Raises:
        ConfigError: momentum or temperature out of range.
    """
    tables.check_settings(momentum, temperature)
    tables.check_capacity(capacity)
    mesh = tables.default_mesh() if mesh is None else mesh
    classes = tables.padded(capacity or images, mesh)
    return Memory(
        centroids=jax.ShapeDtypeStruct((classes, dim), jnp.float32),
        present=jax.ShapeDtypeStruct((classes,), jnp.bool_),
        labels=jax.ShapeDtypeStruct((tables.padded(images, mesh),), jnp.int32),
        num_rows=images,
        momentum=float(momentum),
        temperature=float(temperature),
        hardest=hardest,
        mesh=mesh,
    )


def init(features: Float[np.ndarray | jax.Array, "n d"], labels: Int[np.ndarray, " n"], **settings: Any) -> Memory:
    """A memory of the clusters' centroids (paper, Eq. 3).

    Args:
        features: L2-normalised; with several processes the same in each.
        labels: clusters from 0, -1 for images outside of clusters.
        **settings: of `shapes`.

    Raises:
        ConfigError: momentum or temperature out of range, or fewer classes than labels need.
        DataError: shapes or labels that do not fit.
    """
    return set_labels(shapes(*tables.features_shape(features), **settings), labels, features=features)


def loss(
    memory: Memory, inputs: Float[Array | np.ndarray, "b d"], indices: Int[Array | np.ndarray, " b"]
) -> Float32[Array, ""]:
    """Cross-entropy over all centroids (the authors' `clustercontrast/models/cm.py`); see `contrast`.

    Args:
        memory: state before the step; a constant to differentiation.
        inputs: L2-normalised; computed in float32. The loss is differentiable once with respect to them.
        indices: images; all of them in clusters.
    """
    tables.check_batch(inputs, indices, memory.centroids.shape[1], memory.num_rows)
    scale = jnp.where(memory.present, 1.0 / memory.temperature, 0.0)
    return contrast(inputs.astype(jnp.float32), memory.centroids, scale, memory.labels[indices], memory.mesh, 0.0)


def update(
    memory: Memory,
    inputs: Float[Array | np.ndarray, "b d"],
    indices: Int[Array | np.ndarray, " b"],
    *,
    loss: Float32[Array, ""] | None = None,
) -> Memory:
    """Moves the centroids of a batch's clusters towards its inputs: towards each by `momentum_update`, or the hardest.

    Args:
        memory: state; its arrays may be donated by the caller's `jax.jit`.
        inputs: L2-normalised.
        indices: images; all of them in clusters.
        loss: as in `hybrid.update`.

    Returns:
        The memory after the batch.
    """
    tables.check_batch(inputs, indices, memory.centroids.shape[1], memory.num_rows)
    keep = jnp.bool_(True) if loss is None else jnp.isfinite(loss)

    def local(centroids, inputs, labels, keep):
        old = lax.psum(tables.read(centroids, labels), parallel.AXIS)
        rule = _hardest_update if memory.hardest else tables.momentum_update
        return tables.write(centroids, jnp.where(keep, labels, -1), rule(old, inputs, labels, memory.momentum))

    specs = (BY_ROWS, EVERYWHERE, EVERYWHERE, EVERYWHERE)
    run = jax.shard_map(local, mesh=memory.mesh, in_specs=specs, out_specs=BY_ROWS)
    inputs = lax.stop_gradient(inputs).astype(jnp.float32)
    return memory.replace(centroids=run(memory.centroids, inputs, memory.labels[indices], keep))


def _hardest_update(rows: jax.Array, inputs: jax.Array, keys: jax.Array, momentum: float) -> jax.Array:
    similarity = jnp.sum(inputs * rows, axis=1)
    same = keys[:, None] == keys[None, :]
    hardest = jnp.argmin(jnp.where(same, similarity[None, :], jnp.inf), axis=1)
    return unit_rows(momentum * rows + (1.0 - momentum) * inputs[hardest])


def set_labels(
    memory: Memory,
    labels: Int[np.ndarray, " n"],
    *,
    features: Float[np.ndarray | jax.Array, "n d"] | tables.TableRows,
    capacity: int | None = None,
) -> Memory:
    """The memory at the start of an epoch (paper, Eq. 3 and Algorithm 1).

    Args:
        memory: state outside of `jax.jit`, or shapes.
        labels: clusters from 0, -1 for images outside of clusters.
        features: of unit length, of the network as it is now.
        capacity: most clusters from now on, default as before; tables of another length compile anew.

    Raises:
        DataError: labels of another length.
        ConfigError: more clusters than there is room for.
    """
    tables.check_capacity(capacity)
    classes = memory.present.shape[0] if capacity is None else tables.padded(capacity, memory.mesh)
    placed = tables.allocate_labels(labels, memory, lowest=-1, capacity=classes)
    table = tables.allocate_features(features, memory)
    centroids, present = _centroids(table, placed, classes=classes, mesh=memory.mesh)
    return memory.replace(labels=placed, centroids=centroids, present=present)


@functools.partial(jax.jit, static_argnames=("classes", "mesh"))
def _centroids(features: jax.Array, labels: jax.Array, *, classes: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    sums, counts = tables.class_sums(features, labels, classes=classes, mesh=mesh)
    return unit_rows(sums), counts > 0


def refresh(memory: Memory) -> Memory:
    """The memory unchanged: it keeps no running sums in which rounding could collect."""
    return memory


# What the recipe asks of any memory.


def class_labels(found: Clustering) -> Int32[np.ndarray, " n"]:
    """The labels of a clustering that this memory takes: DBSCAN's, -1 for images outside of clusters."""
    return found.dbscan


def stored_features(memory: Memory) -> tables.TableRows | None:
    """None: centroids do not tell images apart, so that features are extracted before each clustering."""
    del memory
    return None


def diagnostics(memory: Memory) -> dict[str, float]:
    """Nothing for the log."""
    del memory
    return {}
