"""The device mesh, the shardings, and the arrays that processes give each other; `processes` has what is no array.

There is one axis, `data`: batches and memory rows are split over it, parameters are the same on every device. A batch
is always the global batch, so no result depends on the number of devices.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dmosnet_jax.core.errors import ConfigError, LostProcessError

AXIS = "data"

_Result = TypeVar("_Result")


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A one-axis mesh over the given devices, or over all devices of all processes.

    Each process's devices stand together, whatever their numbers: its slice of a batch is contiguous.
    """
    ordered = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    return Mesh(np.asarray(ordered), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises ConfigError when a global batch can't be split evenly over the mesh."""
    if batch_size % mesh.size:
        near = -(-batch_size // mesh.size) * mesh.size
        raise ConfigError(
            f"batch_size={batch_size} can't be split over {mesh.size} devices: use a multiple of that, e.g. {near}"
        )


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays, split by rows, of a host batch.

    Args:
        batch: this process's contiguous slice of the global batch, by name.
        mesh: the device mesh.

    Returns:
        Arrays of the global batch: their first axis is the process count times the slice's.
    """
    sharding = by_rows(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def to_host(tree: Any) -> Any:
    """NumPy copies of arrays that may be split over devices of several processes; every device holds all of each."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(lambda array: multihost_utils.process_allgather(array, tiled=True), tree)


def from_first(tree: Any) -> Any:
    """Process 0's NumPy arrays, on every process; the others give arrays of the same shapes and dtypes."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def by_process(tree: Any) -> Any:
    """NumPy arrays of every process, stacked along a new first axis."""
    from jax.experimental import multihost_utils

    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree))


def print_once(text: str) -> None:
    """Prints a line on process 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


def agree(work: Callable[[], _Result]) -> _Result | None:
    """Does something on process 0, the result there and None elsewhere; a failure there is one everywhere.

    Raises:
        LostProcessError: on the other processes, whatever the failure on process 0 was; `processes.end` has its line.
    """
    result: _Result | None = None
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            result = work()
        except Exception as error:
            # The others wait: they must learn of it before this process ends.
            failure = error
    if not int(from_first(np.int32(failure is None))) and failure is None:
        raise LostProcessError("process 0 failed, and its message says why")
    if failure is not None:
        raise failure
    return result
