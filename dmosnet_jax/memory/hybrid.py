"""SpCL's hybrid memory (Ge et al. 2020, sections 3.1 and 3.2; `spcl/models/hm.py`) as pure functions over a pytree.

The memory keeps one feature per training image. Classes are clusters and un-clustered images; the logit of a class is
the mean similarity of its members over the temperature. That mean is (x . sum of the features) / count, so class sums
are kept and a step costs O(B C D), not O(B N D). The mean feature is not normalised: that is deliberate in SpCL.

Tables are padded, so another number of classes in the next epoch is the same program. A class without members takes no
part, nor do the rows beyond `num_rows`.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int, Int32

from dmosnet_jax.core import parallel
from dmosnet_jax.memory import tables
from dmosnet_jax.memory.clustering import Clustering
from dmosnet_jax.memory.contrast import contrast
from dmosnet_jax.memory.tables import BY_ROWS, EVERYWHERE, Table


class Memory(flax.struct.PyTreeNode):
    """State of the hybrid memory.

    Attributes:
        features: float32 [R, D], L2-normalised rows, R >= `num_rows`; zero beyond.
        class_sums: float32 [C, D], sum of each class's features.
        class_counts: float32 [C], members of each class (exact below 2^24).
        labels: int32 [R], class of each row; -1 beyond `num_rows`.
        num_rows: images, N.
        momentum: share of the old feature that an update keeps.
        temperature: divides similarities.
        mesh: devices that the tables are split over by rows; labels are on each.
    """

    features: Table
    class_sums: Table
    class_counts: Table
    labels: Table
    num_rows: int = flax.struct.field(pytree_node=False)
    momentum: float = flax.struct.field(pytree_node=False)
    temperature: float = flax.struct.field(pytree_node=False)
    mesh: Mesh = flax.struct.field(pytree_node=False)

    def completed(self, like: Any) -> "Memory":
        """With class sums and counts as long as another memory's, where a checkpoint left them out."""
        return _with_class_tables(self, like.class_counts.shape[0]) if self.class_sums is None else self

    def compacted(self) -> "Memory":
        """Without class sums and counts, which follow from features and labels; for checkpoints."""
        return self.replace(class_sums=None, class_counts=None)


def shapes(
    images: int, dim: int, *, momentum: float, temperature: float, capacity: int | None = None, mesh: Mesh | None = None
) -> Memory:
    """A memory of `jax.ShapeDtypeStruct`s, to restore a checkpoint into; `set_labels` with features fills it.

    Args:
        images: N.
        dim: feature length.
        momentum: as in `init`, with the others.
        temperature: likewise.
        capacity: likewise.
        mesh: likewise.

    Raises:
        ConfigError: momentum or temperature out of range.
    """
    tables.check_settings(momentum, temperature)
    tables.check_capacity(capacity)
    mesh = tables.default_mesh() if mesh is None else mesh
    rows, classes = tables.padded(images, mesh), tables.padded(capacity or images, mesh)
    return Memory(
        features=jax.ShapeDtypeStruct((rows, dim), jnp.float32),
        class_sums=jax.ShapeDtypeStruct((classes, dim), jnp.float32),
        class_counts=jax.ShapeDtypeStruct((classes,), jnp.float32),
        labels=jax.ShapeDtypeStruct((rows,), jnp.int32),
        num_rows=images,
        momentum=float(momentum),
        temperature=float(temperature),
        mesh=mesh,
    )


def init(
    features: Float[np.ndarray | jax.Array, "n d"],
    labels: Int[np.ndarray, " n"],
    *,
    momentum: float,
    temperature: float,
    capacity: int | None = None,
    mesh: Mesh | None = None,
) -> Memory:
    """A memory of the given features and classes.

    Args:
        features: L2-normalised; with several processes the same in each.
        labels: class of each image, 0 <= label < capacity.
        momentum: share of the old feature that an update keeps (SpCL 0.2).
        temperature: divides similarities (SpCL 0.05).
        capacity: most classes there will be, default N, which is always enough. A lower one saves memory and time.
        mesh: devices to split the tables over; default the default device alone.

    Raises:
        ConfigError: momentum or temperature out of range, or fewer classes than labels need.
        DataError: shapes or labels that do not fit.
    """
    images, dim = tables.features_shape(features)
    empty = shapes(images, dim, momentum=momentum, temperature=temperature, capacity=capacity, mesh=mesh)
    return set_labels(empty, labels, features=features)


def loss(
    memory: Memory, inputs: Float[Array | np.ndarray, "b d"], indices: Int[Array | np.ndarray, " b"]
) -> Float32[Array, ""]:
    """SpCL's contrastive loss over all classes (equation 1 of the paper); see `contrast`.

    Args:
        memory: state before the step; a constant to differentiation.
        inputs: L2-normalised; computed in float32. The loss is differentiable once with respect to them.
        indices: rows of the inputs in the memory.
    """
    tables.check_batch(inputs, indices, memory.features.shape[1], memory.num_rows)
    counts = memory.class_counts
    scale = jnp.where(counts > 0, 1.0 / memory.temperature / jnp.maximum(counts, 1.0), 0.0)
    return contrast(inputs.astype(jnp.float32), memory.class_sums, scale, memory.labels[indices], memory.mesh)


def update(
    memory: Memory,
    inputs: Float[Array | np.ndarray, "b d"],
    indices: Int[Array | np.ndarray, " b"],
    *,
    loss: Float32[Array, ""] | None = None,
) -> Memory:
    """Moves the features of a batch's images towards its inputs by `tables.momentum_update`.

    The batch counts as a sequence, as in the reference. Class sums follow by the differences, O(B D).

    Args:
        memory: state; its arrays may be donated by the caller's `jax.jit`.
        inputs: L2-normalised.
        indices: rows of the inputs in the memory.
        loss: the step's loss. Where it is not finite the memory stays as it is; and since writing has to wait for the
            loss, which reads the tables, a jitted step that donates the memory works in place, without copying them.

    Returns:
        The memory after the batch. Equal results on every run: no row is written by two different values.
    """
    tables.check_batch(inputs, indices, memory.features.shape[1], memory.num_rows)
    keep = jnp.bool_(True) if loss is None else jnp.isfinite(loss)

    def local(features, sums, inputs, indices, labels, keep):
        before = jnp.concatenate([tables.read(features, indices), tables.read(sums, labels)], axis=1)
        old, class_rows = jnp.split(lax.psum(before, parallel.AXIS), 2, axis=1)
        new = tables.momentum_update(old, inputs, indices, memory.momentum)
        first = jnp.argmax(indices[:, None] == indices[None, :], axis=1) == jnp.arange(indices.shape[0])
        # Positions of one row hold the same, and count once.
        difference = jnp.where(first[:, None], new - old, 0.0)
        # Summed within the batch before it is written: a scatter-add with repeated rows has no fixed order on a GPU.
        same = (labels[:, None] == labels[None, :]).astype(jnp.float32)
        change = jnp.matmul(same, difference, precision=lax.Precision.HIGHEST)[jnp.argmax(same, axis=1)]
        indices, labels = jnp.where(keep, indices, -1), jnp.where(keep, labels, -1)
        return tables.write(features, indices, new), tables.write(sums, labels, class_rows + change)

    run = jax.shard_map(
        local,
        mesh=memory.mesh,
        in_specs=(BY_ROWS, BY_ROWS, EVERYWHERE, EVERYWHERE, EVERYWHERE, EVERYWHERE),
        out_specs=(BY_ROWS, BY_ROWS),
    )
    inputs = lax.stop_gradient(inputs).astype(jnp.float32)
    features, sums = run(memory.features, memory.class_sums, inputs, indices, memory.labels[indices], keep)
    return memory.replace(features=features, class_sums=sums)


def set_labels(
    memory: Memory,
    labels: Int[np.ndarray, " n"],
    *,
    features: Float[np.ndarray | jax.Array, "n d"] | tables.TableRows | None = None,
    capacity: int | None = None,
) -> Memory:
    """The memory with the pseudo-labels of a new epoch; class sums and counts are rebuilt.

    Args:
        memory: state outside of `jax.jit`, or shapes where features are given.
        labels: 0 <= label < capacity.
        features: of unit length, to take the place of those in the memory.
        capacity: most classes from now on, default as before; tables of another length compile anew.

    Raises:
        DataError: labels of another length, or negative.
        ConfigError: more classes than there is room for.
    """
    tables.check_capacity(capacity)
    classes = memory.class_counts.shape[0] if capacity is None else tables.padded(capacity, memory.mesh)
    memory = memory.replace(labels=tables.allocate_labels(labels, memory, lowest=0, capacity=classes))
    if features is not None:
        memory = memory.replace(features=tables.allocate_features(features, memory))
    return _with_class_tables(memory, classes)


def refresh(memory: Memory) -> Memory:
    """The memory with class sums and counts computed anew, free of the rounding that increments collect."""
    return _with_class_tables(memory, memory.class_counts.shape[0])


def _with_class_tables(memory: Memory, classes: int) -> Memory:
    sums, counts = tables.class_sums(memory.features, memory.labels, classes=classes, mesh=memory.mesh)
    return memory.replace(class_sums=sums, class_counts=counts)


@jax.jit
def drift(memory: Memory) -> Float32[Array, ""]:
    """Rounding that the increments have collected: the longest difference of a class mean from the exact one."""
    exact = refresh(memory)
    length = jnp.linalg.norm(memory.class_sums - exact.class_sums, axis=1)
    return (length / jnp.maximum(exact.class_counts, 1.0)).max()


# What the recipe asks of any memory.


def class_labels(found: Clustering) -> Int32[np.ndarray, " n"]:
    """The labels of a clustering that this memory takes: every image in a class, un-clustered ones in their own."""
    return found.labels


def stored_features(memory: Memory) -> tables.TableRows | None:
    """Features to cluster next."""
    return tables.TableRows(memory.features, 0, memory.num_rows, memory.mesh)


def diagnostics(memory: Memory) -> dict[str, float]:
    """Figures for the log at the end of an epoch."""
    return {"class_sum_drift": float(drift(memory))}
