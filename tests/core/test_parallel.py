import jax
import numpy as np
import pytest

from dmosnet_jax.core import parallel
from dmosnet_jax.core.errors import ConfigError


@pytest.mark.parametrize("count", [1, 2, 8])
def test_batches_are_split_by_rows_in_order(rng, count):
    mesh = parallel.make_mesh(jax.devices()[:count])
    assert (mesh.size, mesh.axis_names) == (count, ("data",))
    batch = {
        "image": rng.integers(0, 256, (16, 4, 2, 3), np.uint8),
        "pid": rng.integers(0, 9, 16, np.int32),
        "mask": rng.random(16) < 0.5,
    }
    placed = parallel.to_devices(batch, mesh)
    for name, value in batch.items():
        assert placed[name].sharding == parallel.by_rows(mesh)
        rows = 16 // count
        for shard in placed[name].addressable_shards:
            first = jax.devices().index(shard.device) * rows
            np.testing.assert_array_equal(shard.data, value[first : first + rows], strict=True)
    for name, value in parallel.to_host(placed).items():
        np.testing.assert_array_equal(value, batch[name], strict=True)


def test_every_device_takes_part_by_default():
    assert parallel.make_mesh().size == jax.device_count() == 8


def test_replicated_arrays_are_whole_everywhere(rng):
    mesh = parallel.make_mesh()
    value = rng.random((3, 5), np.float32)
    placed = jax.device_put(value, parallel.replicated(mesh))
    assert len(placed.addressable_shards) == 8
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, value)
    np.testing.assert_array_equal(parallel.to_host(placed), value, strict=True)


def test_batches_that_do_not_divide_are_refused():
    mesh = parallel.make_mesh()
    parallel.check_batch(16, mesh)
    with pytest.raises(ConfigError, match=r"batch_size=20 can't be split over 8 devices: .* e\.g\. 24"):
        parallel.check_batch(20, mesh)
