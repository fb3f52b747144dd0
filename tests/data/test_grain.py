"""Splits as a Grain user reads them: `MapDataset.source` with Grain's own shuffle, map and batch."""

import io
import pickle

import grain
import numpy as np
import pytest
from PIL import Image

from dmosnet_jax.data.records import Record
from dmosnet_jax.data.splits import JointSplit, Subset, load_split


def encoded(shade):
    out = io.BytesIO()
    Image.new("RGB", (4, 8), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def split(tmp_path, write_dataset, example):
    raw = [example(encoded(10 * i), 100 + i // 2, i % 3, f"train/{i}.jpg") for i in range(12)]
    write_dataset(tmp_path, "market1501", "1.0.0", {"train": [raw[:5], raw[5:]]})
    return load_split(tmp_path, "market1501", "train")


def decoded(record):
    pixels = np.asarray(Image.open(io.BytesIO(record.image)))
    return {"image": pixels, "pid": np.int32(record.pid), "camid": np.int32(record.camid)}


@pytest.mark.parametrize(
    "view",
    [
        lambda split: split,
        lambda split: Subset(split, np.arange(12)[::-1]),
        lambda split: JointSplit((split, Subset(split, np.arange(3)))),
        lambda split: JointSplit((split, split), same=True),
    ],
)
def test_grain_shuffles_maps_and_batches(split, view):
    images = view(split)
    dataset = grain.MapDataset.source(images).shuffle(seed=3).map(decoded).batch(4)
    batches = list(dataset)
    sizes = [len(batch["pid"]) for batch in batches]
    assert (sum(sizes), max(sizes), len(sizes)) == (len(images), 4, -(-len(images) // 4))
    assert batches[0]["image"].shape == (4, 8, 4, 3)
    assert batches[0]["image"].dtype == np.uint8
    found = sorted(
        (int(pid), int(camid), int(pixels[0, 0, 0]))
        for batch in batches
        for pid, camid, pixels in zip(batch["pid"], batch["camid"], batch["image"], strict=True)
    )
    shades = (int(decoded(images.record(row))["image"][0, 0, 0]) for row in range(len(images)))
    assert found == sorted(zip(images.pids.tolist(), images.camids.tolist(), shades, strict=True))
    # Threads, and as one process of several would read it.
    assert len(list(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2)))) == len(batches)
    assert len(list(grain.MapDataset.source(images)[1::2])) == len(images) // 2


def test_grains_data_loader_reads_it(split):
    sampler = grain.samplers.IndexSampler(len(split), grain.sharding.NoSharding(), shuffle=True, num_epochs=1, seed=0)
    records = list(grain.DataLoader(data_source=split, sampler=sampler, worker_count=0))
    assert all(isinstance(record, Record) for record in records)
    assert sorted(record.filename for record in records) == sorted(split.filenames())


def test_a_sequence_as_any_other(split):
    for images in (split, Subset(split, np.arange(4)), JointSplit((split,))):
        assert list(images) == [images.record(row) for row in range(len(images))]
        with pytest.raises(IndexError):
            images[len(images)]
        assert pickle.loads(pickle.dumps(images))[2] == images[2]
