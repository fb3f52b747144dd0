"""A split's images in the devices' memory: batches are gathered there, and the host does nothing while training."""

from collections.abc import Generator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Integer

from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.parallel import by_rows, replicated
from dmosnet_jax.data.loading import ImageCache
from dmosnet_jax.data.pipeline import evaluation_batches
from dmosnet_jax.data.splits import Rows

# The rest is for the network: parameters, and the maps of a training step.
_SHARE = 0.5


class DeviceImages:
    """All decoded and resized images of a split, uint8 [N, H, W, 3], on every device."""

    def __init__(self, cache: ImageCache, mesh: Mesh):
        """Copies a complete cache to the devices."""
        self._images = jax.make_array_from_process_local_data(replicated(mesh), cache.images, cache.images.shape)
        self._take = jax.jit(lambda images, rows: jnp.take(images, rows, axis=0), out_shardings=by_rows(mesh))

    def __call__(self, rows: jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3] of rows int32 [B], both split over the devices."""
        return self._take(self._images, rows)


def check_room(split: Rows, image_size: tuple[int, int], mesh: Mesh) -> None:
    """Raises ConfigError where the images would leave the network too little of a device's memory."""
    need = len(split) * image_size[0] * image_size[1] * 3
    memory = mesh.local_devices[0].memory_stats() or {}
    room = memory.get("bytes_limit")
    if room is not None and need > _SHARE * room:
        raise ConfigError(
            f"data.placement='device': the {len(split):,} images of {split.name} take {need / 2**30:.1f} GiB, more "
            f"than half of a device's {room / 2**30:.1f} GiB: use data.placement=host"
        )


def fill(cache: ImageCache, split: Rows, *, interpolation: str, threads: int) -> Generator[int, None, None]:
    """Decodes what a cache does not hold yet; gives the number of images as they are done.

    Raises:
        DataError: a record or image can't be read.
    """
    size, batch = (cache.images.shape[1], cache.images.shape[2]), 256
    for done in evaluation_batches(
        split, image_size=size, interpolation=interpolation, batch_size=batch, threads=threads, cache=cache
    ):
        yield int(done["mask"].sum())


def plan_batches(
    split: Rows,
    plan: Integer[np.ndarray, "steps batch"],
    *,
    start: int,
    process_index: int,
    process_count: int,
    labels: Integer[np.ndarray, " n"] | None,
) -> Generator[dict[str, np.ndarray], None, None]:
    """`pipeline.train_batches` without the images."""
    pids, camids = (np.asarray(ids, np.int32) for ids in (split.pids if labels is None else labels, split.camids))
    for batch in plan[start:]:
        size = len(batch) // process_count
        rows = batch[process_index * size : (process_index + 1) * size].astype(np.int32)
        yield {"pid": pids[rows], "camid": camids[rows], "index": rows, "mask": np.ones(size, bool)}
