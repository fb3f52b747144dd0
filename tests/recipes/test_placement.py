"""Training images on the devices: the same run as with images from the host."""

import jax
import numpy as np
import pytest

from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.parallel import make_mesh, to_devices
from dmosnet_jax.data import placement
from dmosnet_jax.data.loading import ImageCache
from dmosnet_jax.data.pipeline import train_batches
from dmosnet_jax.data.splits import load_split


@pytest.mark.parametrize("devices", [1, 4])
def test_batches_are_those_of_the_host(tiny_data, devices, rng):
    split, mesh = load_split(tiny_data, "tiny", "train"), make_mesh(jax.devices()[:devices])
    plan = rng.integers(0, len(split), (3, 8))
    labels = rng.integers(0, 5, len(split)).astype(np.int32)
    cache = ImageCache(len(split), (32, 16))
    assert sum(placement.fill(cache, split, interpolation="bicubic", threads=1)) == len(split)
    images = placement.DeviceImages(cache, mesh)
    options = {"start": 1, "process_index": 0, "process_count": 1, "labels": labels}
    found = placement.plan_batches(split, plan, **options)
    expected = train_batches(split, plan, image_size=(32, 16), threads=1, **options)
    for mine, theirs in zip(found, expected, strict=True):
        placed = to_devices(mine, mesh)
        placed["image"] = images(placed["index"])
        assert placed["image"].sharding.is_equivalent_to(placed["index"].sharding, 4)
        assert placed.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_array_equal(placed[name], value)


def test_a_process_gives_its_part(tiny_data):
    split = load_split(tiny_data, "tiny", "train")
    options = {"start": 0, "process_count": 2, "labels": None}
    parts = [list(placement.plan_batches(split, np.arange(8)[None], process_index=p, **options)) for p in (0, 1)]
    assert [part[0]["index"].tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    np.testing.assert_array_equal(parts[1][0]["pid"], split.pids[4:8])


def test_room(tiny_data):
    split = load_split(tiny_data, "tiny", "train")

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 2 * len(split) * 32 * 16 * 3 - 1}

    class Mesh:
        local_devices = (Device(),)

    with pytest.raises(ConfigError, match=r"more than half of a device's .* use data\.placement=host"):
        placement.check_room(split, (32, 16), Mesh())
    placement.check_room(split, (32, 8), Mesh())


@pytest.mark.parametrize("recipe", ["finetune", "spcl_market1501"])
def test_a_run_learns_the_same(cli, tiny_flags, tmp_path, recipe):
    ends = []
    for place in ("host", "device"):
        flags = tiny_flags(recipe, **{"data.placement": place, "train.epochs": 1, "train.steps_per_epoch": 3})
        finished = cli.forked(*flags, f"--workdir={tmp_path / place}")
        assert finished.status == 0, finished.err
        ends.append((tmp_path / place / "metrics.jsonl").read_text())
    losses = [[line.partition('"loss": ')[2].partition(",")[0] for line in text.splitlines()] for text in ends]
    assert losses[0] == losses[1]
    assert any(losses[0])


def test_autoaugment_is_refused(cli, tiny_flags, tmp_path):
    flags = tiny_flags("finetune", **{"data.placement": "device", "augment.autoaugment": 0.1})
    finished = cli.forked(*flags, f"--workdir={tmp_path / 'run'}")
    assert finished.status == 2
    assert "augment.autoaugment=0" in finished.errors[0]
