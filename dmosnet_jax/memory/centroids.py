"""Cluster-level memory: one moving centroid per cluster (Cluster Contrast, Dai et al. 2021, arXiv 2103.11568).

The tables are those of the hybrid memory: a class holds its unit centroid as its sum and counts as one image, so that
`hybrid.loss` is the softmax over centroids (with SpCL's 1e-6). Images outside of clusters have no class and are left
out. Centroids start an epoch as the mean of their images' features, which are extracted anew, and follow the batches.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.memory import hybrid, moves, placement
from dmosnet_jax.memory.hybrid import Memory


def begin(memory: Memory, features: np.ndarray | jax.Array, labels: np.ndarray) -> Memory:
    """The memory at the start of an epoch (paper, Eq. 3 and Algorithm 1).

    Args:
        memory: tables of the right sizes; placement stays as it is, so nothing recompiles.
        features: float32 [N, D] of unit length, of the network as it is now.
        labels: int [N], clusters from 0, -1 for images outside of clusters.

    Returns:
        The memory.

    Raises:
        DataError: labels of another length.
        ConfigError: more clusters than the tables hold.
    """
    labels = np.asarray(labels)
    capacity = memory.class_counts.shape[0]
    if labels.shape != (memory.num_rows,):
        raise DataError(f"cluster memory: labels have shape {labels.shape}; the memory holds {memory.num_rows} images")
    if labels.max() >= capacity:
        raise ConfigError(f"cluster memory: label {labels.max()} does not fit {capacity} classes; raise the capacity")
    like = jax.ShapeDtypeStruct(memory.labels.shape, jnp.int32)
    placed = placement.place_padded(labels.astype(np.int32), like, memory.labels.sharding, fill=-1)
    memory = hybrid.refresh(hybrid.set_features(memory, features).replace(labels=placed))
    places = (memory.class_sums.sharding, memory.class_counts.sharding)
    sums, counts = _compiled_start(places)(memory.class_sums, memory.class_counts)
    return memory.replace(class_sums=sums, class_counts=counts)


@functools.lru_cache(maxsize=8)
def _compiled_start(places):
    def start(sums, counts):
        return moves.unit(sums), (counts > 0).astype(jnp.float32)

    return jax.jit(start, out_shardings=places, donate_argnums=(0, 1))


def update(
    memory: Memory, inputs: jax.Array, indices: jax.Array, *, loss: jax.Array | None = None, hardest: bool = False
) -> Memory:
    """Moves the centroids of a batch's clusters towards its inputs, one after the other, and back to unit length.

    Args:
        memory: state; its arrays may be donated by the caller's `jax.jit`.
        inputs: [B, D], L2-normalised.
        indices: int32 [B], images; all of them in clusters.
        loss: as in `hybrid.update`.
        hardest: move each centroid once, by the cluster's input in the batch that resembles it least.

    Returns:
        The memory after the batch.
    """
    inputs = lax.stop_gradient(inputs).astype(jnp.float32)
    labels = memory.labels[indices]
    old = memory.class_sums[labels]
    if hardest:
        likeness = jnp.sum(inputs * old, axis=1)
        same = labels[:, None] == labels[None, :]
        least = jnp.argmin(jnp.where(same, likeness[None, :], jnp.inf), axis=1)
        new = moves.unit(memory.momentum * old + (1.0 - memory.momentum) * inputs[least])
    else:
        new, _ = moves.in_turn(old, inputs, labels, memory.momentum)
    if loss is not None:
        labels = jnp.where(jnp.isfinite(loss), labels, memory.class_sums.shape[0])
    # Below zero would count from the end.
    labels = jnp.where(labels < 0, memory.class_sums.shape[0], labels)
    return memory.replace(class_sums=memory.class_sums.at[labels].set(new, mode="drop"))
