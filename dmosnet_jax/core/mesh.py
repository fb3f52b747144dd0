"""The device mesh, the shardings, and the way from host arrays to global ones. All parallelism is spelled here.

There is one axis, `data`: batches and memory rows are split over it, parameters are the same on every device. A batch
is always the global batch, so no result depends on the number of devices.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dmosnet_jax.core.errors import ConfigError

AXIS = "data"


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
    """NumPy copies of arrays that may be split over devices of several processes."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
