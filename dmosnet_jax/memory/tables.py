"""Tables split by rows over the devices of a mesh: allocation, access to rows, sums by class, momentum update."""

import dataclasses
import functools
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Float32, Int, Int32, Shaped

from dmosnet_jax.core import arguments, parallel
from dmosnet_jax.core.errors import ArgumentError, ConfigError, DataError
from dmosnet_jax.core.unit import unit_rows

PADDING = 1024
# Values of a partial table of class sums, which every device holds of all classes: 256 MiB.
PARTIAL_SUMS = 2**26
# Most bytes that every process holds of a table while process 0 takes a copy.
PIECE_BYTES = 2**26

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
    """Sharding of a memory's arrays: labels (4 bytes a row) on every device, all other tables by rows.

    Args:
        memory: arrays or `jax.ShapeDtypeStruct`s.
        mesh: the devices.

    Returns:
        A memory of `NamedSharding`s.
    """
    rows = jax.tree.map(lambda _: parallel.by_rows(mesh), memory)
    return rows.replace(labels=parallel.replicated(mesh))


def allocate(
    rows: Shaped[np.ndarray, "n ..."], like: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding, fill: int = 0
) -> Shaped[Array, "r ..."]:
    """The rows on their devices, padded to the table's length; no device holds more than its part.

    Args:
        rows: the same in every process.
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


@dataclasses.dataclass(frozen=True)
class TableRows:
    """Some rows of a table that is split over the devices of all processes; none of these need hold all of it.

    Attributes:
        table: float32 [R, D], by rows.
        start: the first row.
        stop: the row after the last.
        mesh: the devices.
    """

    table: jax.Array
    start: int
    stop: int
    mesh: Mesh

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of values."""
        return self.stop - self.start, self.table.shape[1]

    def fetch(self, start: int, stop: int) -> Float32[np.ndarray, "n d"]:
        """A copy of a few rows on every process; all of them call this with the same rows."""
        if self.table.is_fully_addressable:
            # On CPUs a view; from other devices only what is asked for.
            whole = all(device.platform == "cpu" for device in self.table.devices())
            return self._here[start:stop] if whole else np.asarray(self.table[self.start + start : self.start + stop])
        found = _rows_of(self.table, np.int32(self.start + start), count=stop - start, mesh=self.mesh)
        return np.asarray(found)

    @functools.cached_property
    def on_first(self) -> Float32[np.ndarray, "n d"] | None:
        """All rows on process 0, None elsewhere; all processes ask for it. The others never hold more than a piece."""
        if self.table.is_fully_addressable:
            return self._here
        rows, dim = self.shape
        found = np.empty((rows, dim), np.float32) if jax.process_index() == 0 else None
        piece = min(rows, max(1, PIECE_BYTES // (4 * dim)))
        for begin in range(0, rows, piece):
            # The last one reaches back, so that all are one program.
            begin = max(0, min(begin, rows - piece))
            values = self.fetch(begin, begin + piece)
            if found is not None:
                found[begin : begin + piece] = values
        return found

    @functools.cached_property
    def _here(self) -> np.ndarray:
        return np.asarray(self.table)[self.start : self.stop]


@functools.partial(jax.jit, static_argnames=("count", "mesh"))
def _rows_of(table: jax.Array, start: jax.Array, *, count: int, mesh: Mesh) -> jax.Array:
    def local(part: jax.Array, start: jax.Array) -> jax.Array:
        return lax.psum(read(part, start + jnp.arange(count)), parallel.AXIS)

    return jax.shard_map(local, mesh=mesh, in_specs=(BY_ROWS, EVERYWHERE), out_specs=EVERYWHERE)(table, start)


class Filling:
    """A table of features that come piece by piece; each process keeps the rows of its own devices alone."""

    def __init__(self, images: int, dim: int, mesh: Mesh):
        """An empty table.

        Args:
            images: N.
            dim: D.
            mesh: the devices to split it over.
        """
        self._shape, self._mesh = (padded(images, mesh), dim), mesh
        # A process's devices stand together in the mesh.
        mine = [i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
        assert mine == list(range(mine[0], mine[-1] + 1)), "use parallel.make_mesh"
        local = self._shape[0] // mesh.size
        self._first = mine[0] * local
        self._rows = np.zeros((len(mine) * local, dim), np.float32)
        self._images, self._written = images, 0
        self._bad, self._first_bad = 0, images

    def write(self, start: int, piece: Float[np.ndarray, "n d"]) -> None:
        """Takes some rows, the same on every process, from `start` on."""
        if found := arguments.first_not_finite(piece):
            self._bad, self._first_bad = self._bad + found[0], min(self._first_bad, start + found[1])
        self._written += len(piece)
        low, high = max(start, self._first), min(start + len(piece), self._first + len(self._rows))
        if low < high:
            self._rows[low - self._first : high - self._first] = piece[low - start : high - start]

    def finish(self) -> TableRows:
        """The table, once all rows are there.

        Raises:
            DataError: some are not finite.
        """
        assert self._written == self._images, f"{self._written} of {self._images} rows"
        if self._bad:
            raise DataError(
                f"memory: {self._bad} of {self._images} features are not finite, the first is row {self._first_bad}; "
                "the network has diverged: go on from an earlier checkpoint, with a lower learning rate"
            )

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(self._shape[0])
            return self._rows[start - self._first : stop - self._first]

        table = jax.make_array_from_callback(self._shape, parallel.by_rows(self._mesh), part)
        return TableRows(table, 0, self._images, self._mesh)


def allocate_labels(labels: Int[np.ndarray, " n"], memory: Any, *, lowest: int, capacity: int) -> Int32[Array, " r"]:
    """The labels of all images as a memory's table.

    Args:
        labels: class of each image.
        memory: what they are for.
        lowest: the least label that is allowed.
        capacity: classes that there is room for.

    Raises:
        DataError: labels of another length, or too low.
        ConfigError: labels beyond the capacity.
    """
    labels = arguments.integers("memory: labels", labels)
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


def allocate_features(features: Float[np.ndarray | jax.Array, "n d"] | TableRows, memory: Any) -> Float32[Array, "r d"]:
    """Features of a memory's images as its table, by rows; a `Filling`'s is taken as it is.

    Raises:
        DataError: they are of another shape, or not finite.
    """
    images, dim = features.shape if isinstance(features, TableRows) else features_shape(features)
    if images != memory.num_rows:
        raise DataError(f"memory: features of {images} images; the memory holds {memory.num_rows}")
    if isinstance(features, TableRows):
        return features.table
    filling = Filling(images, dim, memory.mesh)
    filling.write(0, arguments.matrix("memory: features", features))
    return filling.finish().table


def features_shape(features: np.ndarray | jax.Array) -> tuple[int, int]:
    """Number of images and of values, or DataError where features are no table."""
    shape = (
        np.shape(features) if isinstance(features, jax.Array) else arguments.numbers("memory: features", features).shape
    )
    if len(shape) != 2 or 0 in shape:
        raise DataError(f"memory: features have shape {shape}; expected [images, dimension], not empty")
    return shape


def check_settings(momentum: float, temperature: float) -> None:
    """Raises ConfigError for settings that no memory works with."""
    for name, value in (("momentum", momentum), ("temperature", temperature)):
        arguments.number(f"memory: {name}", value)
    if not 0 <= momentum < 1 or not temperature > 0:
        raise ConfigError(
            f"memory: momentum={momentum}, temperature={temperature}; need 0 <= momentum < 1, temperature > 0 "
            "(SpCL uses 0.2 and 0.05)"
        )


def check_capacity(capacity: int | None) -> None:
    """Raises ConfigError for what is no number of classes; None and 0 are the usual one."""
    if capacity is not None:
        arguments.count("memory: capacity", capacity, least=0)


def check_batch(inputs: Any, indices: Any, dim: int, images: int) -> None:
    """Raises ArgumentError for a batch that does not fit a memory of so many images with `dim` values each.

    Indices are looked at outside of `jax.jit` alone; inside, those that are too high mean the last image.
    """
    arguments.arrays(inputs=inputs, indices=indices)
    if inputs.ndim != 2 or inputs.shape[1] != dim or indices.shape != inputs.shape[:1]:
        raise ArgumentError(
            f"memory: inputs {inputs.shape} and indices {indices.shape} do not fit features of {dim} values"
        )
    if not jnp.issubdtype(inputs.dtype, jnp.floating) or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ArgumentError(f"memory: inputs are {inputs.dtype} and indices {indices.dtype}; give floats and integers")
    if not isinstance(indices, jax.core.Tracer):
        arguments.rows("memory: indices", indices, images)


# Inside `shard_map`, where a table is this device's part of it.


def local_rows(part: Shaped[Array, "n ..."], rows: Int[Array, " b"]) -> Int[Array, " b"]:
    """Positions in this device's part; those of other devices, and negative ones, lie past its end."""
    position = rows - lax.axis_index(parallel.AXIS) * part.shape[0]
    return jnp.where((position >= 0) & (position < part.shape[0]), position, part.shape[0])


def read(part: Shaped[Array, "n ..."], rows: Int[Array, " b"]) -> Shaped[Array, "b ..."]:
    """Rows that this device holds, zero where another one does: their sum over the devices is the rows."""
    return part.at[local_rows(part, rows)].get(mode="fill", fill_value=0)


def write(
    part: Shaped[Array, "n ..."], rows: Int[Array, " b"], values: Shaped[Array, "b ..."]
) -> Shaped[Array, "n ..."]:
    """The part with the rows that it holds set; the others are dropped. Equal rows must have equal values."""
    return part.at[local_rows(part, rows)].set(values, mode="drop")


@functools.partial(jax.jit, static_argnames=("classes", "mesh"))
def class_sums(
    features: Float32[Array, "r d"], labels: Int[Array, " r"], *, classes: int, mesh: Mesh
) -> tuple[Float32[Array, "c d"], Float32[Array, " c"]]:
    """Sum of the features of each class, and how many there are.

    Each device adds up its own rows, for some columns at a time; the devices then add their partial tables and keep
    their part of the result.

    Args:
        features: by rows.
        labels: rows with a negative one are left out.
        classes: c, a multiple of the device count.
        mesh: the devices.

    Returns:
        Sums and counts, by rows.
    """

    def local(rows: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Negative indices would count from the end; past the end they are dropped.
        labels = jnp.where(labels < 0, classes, labels)
        if mesh.size == 1:
            sums = jnp.zeros((classes, rows.shape[1]), jnp.float32).at[labels].add(rows, mode="drop")
            return sums, jnp.zeros((classes,), jnp.float32).at[labels].add(1.0, mode="drop")
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


def momentum_update(
    rows: Float32[Array, "b d"], inputs: Float32[Array, "b d"], keys: Int[Array, " b"], momentum: float
) -> Float32[Array, "b d"]:
    """The sequential update m = momentum m + (1 - momentum) x, then m / ||m||, of table rows by a batch's inputs.

    A row that occurs twice is updated twice, in the order of the batch: all first occurrences in one round, then all
    second ones.

    Args:
        rows: the table's row for each position of the batch; equal where `keys` are.
        inputs: x.
        keys: which row each position updates.
        momentum: share of the old row that stays.

    Returns:
        The rows after the whole batch, again equal where `keys` are.
    """
    same = keys[:, None] == keys[None, :]
    first = jnp.argmax(same, axis=1)
    occurrence = jnp.tril(same, -1).sum(axis=1)

    def update(k: jax.Array, rows: jax.Array) -> jax.Array:
        updated = unit_rows(momentum * rows[first] + (1.0 - momentum) * inputs)
        # Only k-th occurrences are written; the index of the others is out of range.
        return rows.at[jnp.where(occurrence == k, first, rows.shape[0])].set(updated, mode="drop")

    return lax.fori_loop(0, occurrence.max() + 1, update, rows)[first]
