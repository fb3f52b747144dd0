"""Tables split by rows over the devices of a mesh: allocation, rows of a batch, sums by class, momentum update."""

import functools
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from dmosnet_jax.core import parallel
from dmosnet_jax.core.errors import ConfigError, DataError

PADDING = 1024
# Values of a partial table of class sums, which every device holds of all classes: 256 MiB.
PARTIAL_SUMS = 2**26

BY_ROWS, EVERYWHERE = PartitionSpec(parallel.AXIS), PartitionSpec()

Table = Any  # a jax.Array; in a memory of shapes (`jax.ShapeDtypeStruct`) or of shardings, one of those
AnyMemory = TypeVar("AnyMemory", bound=Any)


def default_mesh() -> Mesh:
    """The default device alone."""
    return parallel.make_mesh(list(jnp.zeros(()).devices()))


def padded(count: int, mesh: Mesh) -> int:
    """Table length for `count` rows, the same on every device; coarse, so that few lengths are compiled for."""
    multiple = math.lcm(PADDING, mesh.size)
    return -(-count // multiple) * multiple


def shardings(memory: AnyMemory, mesh: Mesh) -> AnyMemory:
    """Where a memory's arrays belong: labels (4 bytes a row) on every device, all other tables by rows.

    Args:
        memory: arrays or `jax.ShapeDtypeStruct`s.
        mesh: the devices.

    Returns:
        A memory of `NamedSharding`s.
    """
    rows = jax.tree.map(lambda _: parallel.by_rows(mesh), memory)
    return rows.replace(labels=parallel.replicated(mesh))


def allocate(rows: np.ndarray, like: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding, fill: int = 0) -> jax.Array:
    """The rows on their devices, padded to the table's length; no device holds more than its part.

    Args:
        rows: [N, ...], the same in every process.
        like: shape and dtype of the table, at least N long.
        sharding: over the first dimension, or none.
        fill: value of the padding.
    """

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(like.shape[0])
        piece = np.full((stop - start, *like.shape[1:]), fill, like.dtype)
        real = rows[start:stop]
        piece[: real.shape[0]] = real
        return piece

    return jax.make_array_from_callback(like.shape, sharding, part)


def allocate_labels(labels: np.ndarray, memory: Any, *, lowest: int, capacity: int) -> jax.Array:
    """The labels of all images as a memory's table.

    Args:
        labels: int [N].
        memory: what they are for.
        lowest: the least label that is allowed.
        capacity: classes that there is room for.

    Raises:
        DataError: labels of another length, or too low.
        ConfigError: labels beyond the capacity.
    """
    labels = np.asarray(labels)
    if labels.shape != (memory.num_rows,):
        raise DataError(f"memory: labels have shape {labels.shape}; the memory holds {memory.num_rows} images")
    if labels.min() < lowest:
        raise DataError(f"memory: label {labels.min()} at row {labels.argmin()}; every label must be >= {lowest}")
    if labels.max() >= capacity:
        raise ConfigError(
            f"memory: label {labels.max()} does not fit the capacity of {capacity} classes; raise `capacity`"
        )
    like = jax.ShapeDtypeStruct(memory.labels.shape, jnp.int32)
    return allocate(labels, like, parallel.replicated(memory.mesh), fill=-1)


def allocate_features(features: np.ndarray | jax.Array, memory: Any) -> jax.Array:
    """Features [N, D] of a memory's images as its table, float32, by rows."""
    images, dim = features_shape(features)
    if images != memory.num_rows:
        raise DataError(f"memory: features of {images} images; the memory holds {memory.num_rows}")
    like = jax.ShapeDtypeStruct((padded(images, memory.mesh), dim), jnp.float32)
    return allocate(np.asarray(features), like, parallel.by_rows(memory.mesh))


def features_shape(features: np.ndarray | jax.Array) -> tuple[int, int]:
    """Number of images and of values, or DataError where features are no table."""
    if features.ndim != 2 or features.shape[0] == 0:
        raise DataError(f"memory: features have shape {features.shape}; expected [images, dimension], not empty")
    return features.shape[0], features.shape[1]


def check_settings(momentum: float, temperature: float) -> None:
    """Raises ConfigError for settings that no memory works with."""
    if not 0 <= momentum < 1 or not temperature > 0:
        raise ConfigError(
            f"memory: momentum={momentum}, temperature={temperature}; need 0 <= momentum < 1, temperature > 0 "
            "(SpCL uses 0.2 and 0.05)"
        )


def check_batch(inputs: jax.Array, indices: jax.Array, dim: int) -> None:
    """Raises ValueError for a batch that does not fit a memory of `dim` values a row."""
    if inputs.ndim != 2 or inputs.shape[1] != dim or indices.shape != inputs.shape[:1]:
        raise ValueError(
            f"memory: inputs {inputs.shape} and indices {indices.shape} do not fit features of {dim} values"
        )


# Inside `shard_map`, where a table is this device's part of it.


def local_rows(part: jax.Array, rows: jax.Array) -> jax.Array:
    """Positions in this device's part; those of other devices, and negative ones, lie past its end."""
    position = rows - lax.axis_index(parallel.AXIS) * part.shape[0]
    return jnp.where((position >= 0) & (position < part.shape[0]), position, part.shape[0])


def read(part: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows that this device holds, zero where another one does: their sum over the devices is the rows."""
    return part.at[local_rows(part, rows)].get(mode="fill", fill_value=0)


def write(part: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """The part with the rows that it holds set; the others are dropped. Equal rows must have equal values."""
    return part.at[local_rows(part, rows)].set(values, mode="drop")


@functools.partial(jax.jit, static_argnames=("classes", "mesh"))
def class_sums(features: jax.Array, labels: jax.Array, *, classes: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Sum of the features of each class, and how many there are.

    Each device adds up its own rows, for some columns at a time; the devices then add their partial tables and keep
    their part of the result.

    Args:
        features: float32 [R, D], by rows.
        labels: int32 [R]; rows with a negative one are left out.
        classes: C, a multiple of the device count.
        mesh: the devices.

    Returns:
        float32 [C, D] and [C], by rows.
    """

    def local(rows: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Negative indices would count from the end; past the end they are dropped.
        labels = jnp.where(labels < 0, classes, labels)
        columns = rows.shape[1]
        while columns * classes > PARTIAL_SUMS and columns % 2 == 0:
            columns //= 2

        def collect(values: jax.Array) -> jax.Array:
            partial = jnp.zeros((classes, *values.shape[1:]), jnp.float32).at[labels].add(values, mode="drop")
            return lax.psum_scatter(partial, parallel.AXIS, tiled=True)

        def add_columns(j: jax.Array, sums: jax.Array) -> jax.Array:
            some = collect(lax.dynamic_slice_in_dim(rows, j * columns, columns, axis=1))
            return lax.dynamic_update_slice_in_dim(sums, some, j * columns, axis=1)

        empty = jnp.zeros((classes // mesh.size, rows.shape[1]), jnp.float32)
        empty = lax.pcast(empty, parallel.AXIS, to="varying")
        sums = lax.fori_loop(0, rows.shape[1] // columns, add_columns, empty)
        return sums, collect(jnp.ones(rows.shape[:1], jnp.float32))

    run = jax.shard_map(local, mesh=mesh, in_specs=(BY_ROWS, BY_ROWS), out_specs=(BY_ROWS, BY_ROWS))
    return run(features, labels)


def momentum_update(rows: jax.Array, inputs: jax.Array, keys: jax.Array, momentum: float) -> jax.Array:
    """Moves rows towards a batch's inputs, one after the other: m = momentum m + (1 - momentum) x, then m / ||m||.

    A row that occurs twice moves twice, in the order of the batch: first occurrences together, then the second ones.

    Args:
        rows: float32 [B, D], the table's row for each position; equal where `keys` are.
        inputs: float32 [B, D].
        keys: int32 [B], which row each position moves.
        momentum: share of the old row that stays.

    Returns:
        float32 [B, D], the rows after the whole batch, again equal where `keys` are.
    """
    same = keys[:, None] == keys[None, :]
    first = jnp.argmax(same, axis=1)
    turn = jnp.tril(same, -1).sum(axis=1)

    def move(k: jax.Array, rows: jax.Array) -> jax.Array:
        moved = unit(momentum * rows[first] + (1.0 - momentum) * inputs)
        # Only the positions whose turn it is write; the others aim outside.
        return rows.at[jnp.where(turn == k, first, rows.shape[0])].set(moved, mode="drop")

    return lax.fori_loop(0, turn.max() + 1, move, rows)[first]


def unit(rows: jax.Array) -> jax.Array:
    """Rows scaled to unit length; zero rows stay zero."""
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
