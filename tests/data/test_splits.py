import io
import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data import splits
from dmosnet_jax.data.pipeline import evaluation_batches
from dmosnet_jax.data.shards import INDEX_SUFFIX
from dmosnet_jax.data.splits import JointSplit, Subset


@pytest.fixture
def data_dir(tmp_path, write_dataset, example):
    def shard(first, count):
        return [example(bytes([i]), 10 + i // 2, 1 + i % 3, f"train/{i}.jpg") for i in range(first, first + count)]

    write_dataset(tmp_path, "market1501", "1.0.0", {"train": [shard(0, 4), shard(4, 3)], "query": [shard(7, 2)]})
    return tmp_path


def test_split_gives_its_images_in_order(data_dir):
    split = splits.load_split(data_dir, "market1501", "train")
    assert (split.name, split.split, len(split)) == ("market1501", "train", 7)
    np.testing.assert_array_equal(split.pids, [10, 10, 11, 11, 12, 12, 13])
    np.testing.assert_array_equal(split.camids, [1, 2, 3, 1, 2, 3, 1])
    assert split.pids.dtype == split.camids.dtype == np.int32
    assert split.filenames() == [f"train/{i}.jpg" for i in range(7)]
    assert split.filenames(np.array([5, 0, 5])) == ["train/5.jpg", "train/0.jpg", "train/5.jpg"]
    copy = pickle.loads(pickle.dumps(split))
    for row in range(7):
        record = copy.record(row)
        assert (record.image, record.pid, record.camid) == (bytes([row]), split.pids[row], split.camids[row])


def test_highest_finished_version_is_taken(data_dir, write_dataset, example):
    write_dataset(data_dir, "market1501", "1.10.0", {"train": [[example()]]})
    write_dataset(data_dir, "market1501", "1.9.0", {"train": [[example()] * 2]})
    (data_dir / "market1501" / "2.0.0").mkdir()  # has no description
    shutil.copytree(data_dir / "market1501" / "1.9.0", data_dir / "market1501" / "incomplete.AB_3.0.0")
    assert len(splits.load_split(data_dir, "market1501", "train")) == 1


@pytest.mark.parametrize("folder", ["", "nowhere/deep"])
def test_missing_data_set_says_how_to_convert_it(tmp_path, folder):
    where = tmp_path / folder
    command = f"python -m data_prep.convert --dataset=duke --source=PATH --data_dir={where}"
    with pytest.raises(DataError, match="no data set duke in") as error:
        splits.load_split(where, "duke", "train")
    assert command in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_split_and_wrong_names(data_dir):
    with pytest.raises(DataError, match="no split 'gallery', there are query, train"):
        splits.load_split(data_dir, "market1501", "gallery")
    for name in ("", "../market1501", "Market1501", "a/b"):
        with pytest.raises(ConfigError, match="is not a name"):
            splits.load_split(data_dir, name, "train")


def test_shard_missing_or_cut_at_a_record(data_dir):
    folder = data_dir / "market1501" / "1.0.0"
    shard = folder / "market1501-train.tfrecord-00001-of-00002"
    source = splits.load_split(data_dir, "market1501", "train").source
    os.truncate(shard, int(source._offsets[6]))
    with pytest.raises(DataError, match="00001-of-00002: holds 2 records instead of 3"):
        splits.load_split(data_dir, "market1501", "train")
    shard.unlink()
    with pytest.raises(DataError, match="00001-of-00002: cannot be read"):
        splits.load_split(data_dir, "market1501", "train")


def test_damaged_description_is_named(data_dir):
    info = data_dir / "market1501" / "1.0.0" / "dataset_info.json"
    good = info.read_text()
    for bad in ("", "[]", "{}", good[:40], good.replace('"shardLengths"', '"x"'), good.replace('["4"', '["four"')):
        info.write_text(bad)
        with pytest.raises(DataError, match=r"dataset_info\.json: is damaged"):
            splits.load_split(data_dir, "market1501", "train")
    info.write_text(good.replace("tfrecord", "riegeli"))
    with pytest.raises(DataError, match="'riegeli' files instead of 'tfrecord'"):
        splits.load_split(data_dir, "market1501", "train")
    info.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is damaged"):
        splits.load_split(data_dir, "market1501", "train")


def test_record_error_names_its_place(data_dir):
    split = splits.load_split(data_dir, "market1501", "train")
    shard = data_dir / "market1501" / "1.0.0" / "market1501-train.tfrecord-00001-of-00002"
    offset = int(split.source._offsets[5])
    content = bytearray(shard.read_bytes())
    content[offset + 20] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=f"00001-of-00002: record 1 at byte {offset}"):
        split.record(5)
    assert split.record(4).pid == 12


def test_relabel_is_contiguous_and_keeps_groups(rng):
    pids = rng.choice([-1, 0, 2, 5, 1501, 7], size=50).astype(np.int32)
    labels = splits.relabel(pids)
    assert labels.dtype == np.int32
    values = np.unique(pids)
    np.testing.assert_array_equal(np.unique(labels), np.arange(len(values)))
    np.testing.assert_array_equal(values[labels], pids)
    assert splits.relabel(np.zeros(0, np.int32)).shape == (0,)


def shard_of(data_dir, number=0):
    return data_dir / "market1501" / "1.0.0" / f"market1501-train.tfrecord-{number:05d}-of-00002"


def with_labels(sidecar, **columns):
    """Writes other labels into an index."""
    with np.load(sidecar) as stored:
        arrays = dict(stored)
    np.savez(sidecar, **(arrays | columns))


def rewritten(shard, write_shard, example, pids):
    """Writes a shard of records of equal size."""
    image = io.BytesIO()
    Image.new("RGB", (4, 8)).save(image, "PNG")
    # PNG ends before the zeros: without them most of the file would be among the two ends that are compared anyway.
    content = image.getvalue() + bytes(3000)
    write_shard(shard, [example(content, pid, 1, f"{row:03d}.png") for row, pid in enumerate(pids)])


@pytest.fixture
def permuted(tmp_path, write_dataset, write_shard, example, rng):
    """A data set whose shard was written again with permuted identities, beside the index of the one before."""
    pids = np.arange(1000, 1040)
    write_dataset(tmp_path, "market1501", "1.0.0", {"query": [[]]})
    (tmp_path / "market1501" / "1.0.0" / "dataset_info.json").write_text(
        '{"fileFormat": "tfrecord", "splits": [{"name": "query", "shardLengths": ["40"]}]}'
    )
    shard = tmp_path / "market1501" / "1.0.0" / "market1501-query.tfrecord-00000-of-00001"
    rewritten(shard, write_shard, example, pids)
    splits.load_split(tmp_path, "market1501", "query")
    other = np.concatenate([pids[:2], rng.permutation(pids[2:-2]), pids[-2:]])
    rewritten(shard, write_shard, example, other)
    return tmp_path, other


def test_labels_that_are_not_the_records_are_refused_when_read(permuted):
    data_dir, pids = permuted
    split = splits.load_split(data_dir, "market1501", "query")
    row = int(np.flatnonzero(split.pids != pids)[0])
    for read in (split, Subset(split, np.int32([row])), JointSplit((split, split)), pickle.loads(pickle.dumps(split))):
        with pytest.raises(DataError) as error:
            read.record(0 if len(read) == 1 else row)
        message = str(error.value)
        assert f"query.tfrecord-00000-of-00001: record {row} at byte {split.source._offsets[row]}: " in message
        assert f"its pid is {pids[row]}, in the index {split.pids[row]}: remove {split.source.paths[0]}" in message
        assert "\n" not in message
    with pytest.raises(DataError, match=f"its pid is {pids[row]}"):
        list(evaluation_batches(split, image_size=(8, 4), batch_size=8, threads=0))
    with pytest.raises(DataError, match=rf"record {row} at byte"):
        split.record(row - 40)


@pytest.mark.parametrize("label", ["pid", "camid"])
def test_an_index_of_one_label_is_not_believed(data_dir, label):
    before = splits.load_split(data_dir, "market1501", "train")
    sidecars = [
        shard_of(data_dir, number).with_name(shard_of(data_dir, number).name + INDEX_SUFFIX) for number in (0, 1)
    ]
    for sidecar, count in zip(sidecars, (4, 3), strict=True):
        with_labels(sidecar, **{label: np.full(count, 7, np.int32)})
    split = splits.load_split(data_dir, "market1501", "train")
    for row in range(7):
        with pytest.raises(DataError, match=rf"its {label} is .*, in the index 7: remove .*index\.npz"):
            split.record(row)
    # As the message says.
    for sidecar in sidecars:
        sidecar.unlink()
    split = splits.load_split(data_dir, "market1501", "train")
    np.testing.assert_array_equal(split.pids, before.pids)
    np.testing.assert_array_equal(split.camids, before.camids)
    assert [split.record(row).pid for row in range(7)] == before.pids.tolist()


def test_one_wrong_label_is_refused_where_it_is_read(data_dir):
    pids = splits.load_split(data_dir, "market1501", "train").pids[:4]
    sidecar = shard_of(data_dir).with_name(shard_of(data_dir).name + INDEX_SUFFIX)
    with_labels(sidecar, pid=np.where(np.arange(4) == 2, 5, pids).astype(np.int32))
    split = splits.load_split(data_dir, "market1501", "train")
    assert split.record(1).pid == pids[1]
    with pytest.raises(DataError, match=r"record 2 at byte .*: its pid is 11, in the index 5: remove .*index\.npz"):
        split.record(2)
