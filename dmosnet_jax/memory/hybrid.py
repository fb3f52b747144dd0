"""SpCL's hybrid memory (Ge et al. 2020, sections 3.1 and 3.2; `spcl/models/hm.py`) as pure functions over a pytree.

The memory keeps one feature per training image. Classes are clusters and un-clustered images; the logit of a class is
the mean similarity of its members over the temperature. That mean is (x . sum of the features) / count, so class sums
are kept and a step costs O(B C D), not O(B N D). The mean feature is not normalised: that is deliberate in SpCL.

Tables are padded to fixed sizes, so another number of classes in the next epoch is the same program. A class without
members takes no part, nor do the rows beyond `num_rows`.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from dmosnet_jax.core import mesh as meshes
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.memory import moves, placement

PADDING = 1024
BLOCK = 65_536
_EPSILON = 1e-6
_EXACT = lax.Precision.HIGHEST


Table = Any  # a jax.Array; in a memory of shapes (`jax.eval_shape`) or of shardings, one of those


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
    """

    features: Table
    class_sums: Table
    class_counts: Table
    labels: Table
    num_rows: int = flax.struct.field(pytree_node=False)
    momentum: float = flax.struct.field(pytree_node=False)
    temperature: float = flax.struct.field(pytree_node=False)


def padded_rows(count: int, multiple: int = PADDING) -> int:
    """Table length for `count` rows: every block of the table divides over any device count that divides `multiple`."""
    step = multiple * -(-count // BLOCK)
    return -(-count // step) * step


def init(
    features: np.ndarray | jax.Array,
    labels: np.ndarray,
    *,
    momentum: float,
    temperature: float,
    capacity: int | None = None,
    multiple: int = PADDING,
    mesh: Mesh | None = None,
) -> Memory:
    """A memory of the given features and classes.

    Args:
        features: float32 [N, D], L2-normalised.
        labels: int [N], class of each image, 0 <= label < capacity.
        momentum: share of the old feature that an update keeps (SpCL 0.2).
        temperature: divides similarities (SpCL 0.05).
        capacity: most classes there will ever be, default N, which is always enough. A lower one saves memory and time.
        multiple: table lengths are padded to multiples of this; the device count must divide it.
        mesh: places the tables on it (see `shardings`), without a whole copy on any device. None: the default device.

    Returns:
        The memory.

    Raises:
        ConfigError: momentum or temperature out of range, or fewer classes than labels need.
        DataError: shapes or labels that do not fit.
    """
    if not 0 <= momentum < 1 or not temperature > 0:
        raise ConfigError(
            f"hybrid memory: momentum={momentum}, temperature={temperature}; need 0 <= momentum < 1, temperature > 0 "
            "(SpCL uses 0.2 and 0.05)"
        )
    if features.ndim != 2 or features.shape[0] == 0:
        raise DataError(f"hybrid memory: features have shape {features.shape}; expected [images, dimension], not empty")
    rows, dim = features.shape
    tables = Memory(
        features=jax.ShapeDtypeStruct((padded_rows(rows, multiple), dim), jnp.float32),
        class_sums=jax.ShapeDtypeStruct((padded_rows(capacity or rows, multiple), dim), jnp.float32),
        class_counts=jax.ShapeDtypeStruct((padded_rows(capacity or rows, multiple),), jnp.float32),
        labels=jax.ShapeDtypeStruct((padded_rows(rows, multiple),), jnp.int32),
        num_rows=rows,
        momentum=float(momentum),
        temperature=float(temperature),
    )
    places = _default_places(tables) if mesh is None else shardings(tables, mesh)
    memory = tables.replace(
        features=placement.place_padded(features, tables.features, places.features),
        class_sums=placement.zeros(tables.class_sums, places.class_sums),
        class_counts=placement.zeros(tables.class_counts, places.class_counts),
        labels=placement.place_padded(np.full(rows, -1, np.int32), tables.labels, places.labels, fill=-1),
    )
    return set_labels(memory, labels)


def loss(memory: Memory, inputs: jax.Array, indices: jax.Array) -> jax.Array:
    """SpCL's contrastive loss over all classes (equation 1 of the paper).

    With z[b, c] the mean similarity of input b with class c over the temperature: p = exp(z) / (sum of exp(z) + 1e-6)
    and the loss is the mean of -log(p[label] + 1e-6), as the reference computes it. Exponents are taken relative to the
    largest logit (the 1e-6 with them), so any temperature is safe. Classes are visited in blocks, and the gradient is
    summed up on the same visit, so neither pass holds [B, C].

    Args:
        memory: state before the step; a constant to differentiation.
        inputs: [B, D], L2-normalised; computed in float32.
        indices: int32 [B], rows of the inputs in the memory.

    Returns:
        Scalar float32, differentiable once with respect to `inputs`.
    """
    _check_batch(memory, inputs, indices)
    targets = memory.labels[indices]
    return _contrast(
        inputs.astype(jnp.float32), memory.class_sums, memory.class_counts, targets, 1.0 / memory.temperature
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _contrast(inputs, sums, counts, targets, inverse_temperature):
    return _value_and_gradient(inputs, sums, counts, targets, inverse_temperature)[0]


def _contrast_forward(inputs, sums, counts, targets, inverse_temperature):
    value, gradient = _value_and_gradient(inputs, sums, counts, targets, inverse_temperature)
    # The value answers for the gradient too: what waits for the one (`update`) has then waited for both.
    return jnp.where(jnp.isfinite(gradient).all(), value, jnp.nan), gradient


def _value_and_gradient(inputs, sums, counts, targets, inverse_temperature):
    scale = jnp.where(counts > 0, inverse_temperature / jnp.maximum(counts, 1.0), 0.0)
    blocks = _block_count(sums.shape[0])

    def visit(j, carry):
        top, total, pull = carry
        rows, factor = _block(sums, blocks, j), _block(scale, blocks, j)
        logits = jnp.matmul(inputs, rows.T, precision=_EXACT) * factor[None, :]
        logits = jnp.where(factor[None, :] > 0, logits, -jnp.inf)
        higher = jnp.maximum(top, logits.max(axis=1))
        shrink = jnp.exp(top - higher)
        weight = jnp.exp(logits - higher[:, None])
        total = total * shrink + weight.sum(axis=1)
        pull = pull * shrink[:, None] + jnp.matmul(weight * factor[None, :], rows, precision=_EXACT)
        return higher, total, pull

    # Starting the running maximum at 0 keeps exp(-top), which scales the 1e-6, from overflowing.
    zeros = jnp.zeros(inputs.shape[:1], jnp.float32)
    top, total, pull = lax.fori_loop(0, blocks, visit, (zeros, zeros, jnp.zeros_like(inputs)))
    total = total + _EPSILON * jnp.exp(-top)
    own = sums[targets] * scale[targets][:, None]
    probability = jnp.exp((inputs * own).sum(axis=1) - top) / total
    value = -jnp.log(probability + _EPSILON).mean()
    strength = probability / (probability + _EPSILON) / inputs.shape[0]
    return value, strength[:, None] * (pull / total[:, None] - own)


def _contrast_backward(_, gradient, cotangent):
    return cotangent * gradient, None, None, None


_contrast.defvjp(_contrast_forward, _contrast_backward)


def update(memory: Memory, inputs: jax.Array, indices: jax.Array, *, loss: jax.Array | None = None) -> Memory:
    """Moves the rows of a batch towards its inputs: m = momentum * m + (1 - momentum) * x, then m / ||m||.

    The batch counts as a sequence, as in the reference: a row that occurs twice is moved twice, in order. Rows
    move in rounds, the first occurrences together, then the second ones; class sums follow by the differences, O(B D).

    Args:
        memory: state; its arrays may be donated by the caller's `jax.jit`.
        inputs: [B, D], L2-normalised.
        indices: int32 [B].
        loss: the step's loss. Where it is not finite the memory stays as it is; and since writing has to wait for the
            loss, which reads the tables, a jitted step that donates the memory works in place, without copying them.

    Returns:
        The memory after the batch. Equal results on every run: no row is written by two different values.
    """
    _check_batch(memory, inputs, indices)
    inputs = lax.stop_gradient(inputs).astype(jnp.float32)
    old = memory.features[indices]
    new, turn = moves.in_turn(old, inputs, indices, memory.momentum)
    labels = memory.labels[indices]
    together = labels[:, None] == labels[None, :]
    # Positions of one row hold the same, and count once.
    difference = jnp.where((turn == 0)[:, None], new - old, 0.0)
    # Summed within the batch before it is written: a scatter-add with repeated rows has no fixed order on a GPU.
    change = jnp.matmul(together.astype(jnp.float32), difference, precision=_EXACT)[jnp.argmax(together, axis=1)]
    class_rows = memory.class_sums[labels] + change
    if loss is not None:
        keep = jnp.isfinite(loss)
        indices = jnp.where(keep, indices, memory.features.shape[0])
        labels = jnp.where(keep, labels, memory.class_sums.shape[0])
    return memory.replace(
        features=memory.features.at[indices].set(new, mode="drop"),
        class_sums=memory.class_sums.at[labels].set(class_rows, mode="drop"),
    )


def set_features(memory: Memory, features: np.ndarray | jax.Array) -> Memory:
    """The memory with other features, float32 [N, D] of unit length; `set_labels` or `refresh` has to follow."""
    like = jax.ShapeDtypeStruct(memory.features.shape, jnp.float32)
    return memory.replace(features=placement.place_padded(features, like, memory.features.sharding))


def set_labels(memory: Memory, labels: np.ndarray) -> Memory:
    """The memory with the pseudo-labels of a new epoch; class sums and counts are rebuilt.

    Args:
        memory: state outside of `jax.jit`; sizes and placement stay as they are, so nothing recompiles.
        labels: int [N], 0 <= label < capacity.

    Returns:
        The memory; features are unchanged.

    Raises:
        DataError: labels of another length, or negative.
        ConfigError: more classes than the tables hold.
    """
    labels = np.asarray(labels)
    if labels.shape != (memory.num_rows,):
        raise DataError(f"hybrid memory: labels have shape {labels.shape}; the memory holds {memory.num_rows} images")
    if labels.min() < 0:
        raise DataError(f"hybrid memory: label {labels.min()} at row {labels.argmin()}; every image needs a class >= 0")
    capacity = memory.class_counts.shape[0]
    if labels.max() >= capacity:
        raise ConfigError(
            f"hybrid memory: label {labels.max()} does not fit the capacity of {capacity} classes; raise `capacity`"
        )
    target = jax.ShapeDtypeStruct(memory.labels.shape, jnp.int32)
    placed = placement.place_padded(labels.astype(np.int32), target, memory.labels.sharding, fill=-1)
    return refresh(memory.replace(labels=placed))


def refresh(memory: Memory) -> Memory:
    """The memory with class sums and counts computed anew, free of the rounding that increments collect.

    May be traced; outside of `jax.jit` the tables stay placed as they are.
    """
    if isinstance(memory.features, jax.core.Tracer):
        sums, counts = _class_tables(memory.features, memory.labels, memory.class_counts.shape[0])
    else:
        places = (memory.class_sums.sharding, memory.class_counts.sharding)
        sums, counts = _compiled_tables(places)(memory.features, memory.labels, memory.class_counts.shape[0])
    return memory.replace(class_sums=sums, class_counts=counts)


@jax.jit
def drift(memory: Memory) -> jax.Array:
    """How far increments have led the class means from the exact ones: the longest difference, float32 scalar."""
    sums, counts = _class_tables(memory.features, memory.labels, memory.class_counts.shape[0])
    return (jnp.linalg.norm(memory.class_sums - sums, axis=1) / jnp.maximum(counts, 1.0)).max()


@functools.lru_cache(maxsize=8)
def _compiled_tables(places):
    return jax.jit(_class_tables, static_argnums=2, out_shardings=places)


def _class_tables(features: jax.Array, labels: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Sums float32 [capacity, D] and counts float32 [capacity] of the rows with a label, block of rows by block."""
    blocks = _block_count(features.shape[0])
    # Negative indices would count from the end; past the end they are dropped.
    labels = jnp.where(labels < 0, capacity, labels)

    def add(j, carry):
        sums, counts = carry
        rows, classes = _block(features, blocks, j), _block(labels, blocks, j)
        return sums.at[classes].add(rows, mode="drop"), counts.at[classes].add(1.0, mode="drop")

    empty = (jnp.zeros((capacity, features.shape[1]), jnp.float32), jnp.zeros((capacity,), jnp.float32))
    return lax.fori_loop(0, blocks, add, empty)


def _block_count(rows: int) -> int:
    """Number of equal blocks of at most `BLOCK` rows."""
    count = -(-rows // BLOCK)
    while rows % count:
        count += 1
    return count


def _block(table: jax.Array, blocks: int, j: Any) -> jax.Array:
    """Every `blocks`-th row from row j: of a table sharded by rows, each device holds an equal part of each block."""
    view = table.reshape(table.shape[0] // blocks, blocks, *table.shape[1:])
    return lax.dynamic_index_in_dim(view, j, axis=1, keepdims=False)


def _check_batch(memory: Memory, inputs: jax.Array, indices: jax.Array) -> None:
    if inputs.ndim != 2 or inputs.shape[1] != memory.features.shape[1] or indices.shape != inputs.shape[:1]:
        raise ValueError(
            f"hybrid memory: inputs {inputs.shape} and indices {indices.shape} do not fit features of "
            f"{memory.features.shape[1]} values"
        )


def shardings(memory: Memory, mesh: Mesh) -> Memory:
    """Where the tables belong: features and class tables by rows, labels (4 bytes a row) on every device.

    Args:
        memory: arrays, or `jax.ShapeDtypeStruct`s from `jax.eval_shape`.
        mesh: the devices.

    Returns:
        A `Memory` of `NamedSharding`s.

    Raises:
        ConfigError: the padded tables do not divide over the devices.
    """
    devices = mesh.size
    for name, table in (("rows", memory.features), ("classes", memory.class_sums)):
        if table.shape[0] % devices:
            raise ConfigError(
                f"hybrid memory: {table.shape[0]} padded {name} do not divide over {devices} devices; "
                f"pass multiple={PADDING * devices} to init"
            )
    by_rows, everywhere = meshes.by_rows(mesh), meshes.replicated(mesh)
    return memory.replace(features=by_rows, class_sums=by_rows, class_counts=by_rows, labels=everywhere)


def shard(memory: Memory, mesh: Mesh) -> Memory:
    """The memory placed over the mesh as `shardings` says."""
    return jax.device_put(memory, shardings(memory, mesh))


def _default_places(memory: Memory) -> Memory:
    place = jax.sharding.SingleDeviceSharding(jnp.zeros(()).devices().pop())
    return memory.replace(features=place, class_sums=place, class_counts=place, labels=place)
