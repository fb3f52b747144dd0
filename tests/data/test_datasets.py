import os
import pickle
import shutil

import numpy as np
import pytest

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data import datasets


@pytest.fixture
def data_dir(tmp_path, write_dataset, example):
    def shard(first, count):
        return [example(bytes([i]), 10 + i // 2, 1 + i % 3, f"train/{i}.jpg") for i in range(first, first + count)]

    write_dataset(tmp_path, "market1501", "1.0.0", {"train": [shard(0, 4), shard(4, 3)], "query": [shard(7, 2)]})
    return tmp_path


def test_split_gives_its_images_in_order(data_dir):
    split = datasets.load_split(data_dir, "market1501", "train")
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
    assert len(datasets.load_split(data_dir, "market1501", "train")) == 1


@pytest.mark.parametrize("folder", ["", "nowhere/deep"])
def test_missing_data_set_says_how_to_convert_it(tmp_path, folder):
    where = tmp_path / folder
    command = f"python -m data_prep.convert --dataset=duke --source=PATH --data_dir={where}"
    with pytest.raises(DataError, match="no data set duke in") as error:
        datasets.load_split(where, "duke", "train")
    assert command in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_split_and_wrong_names(data_dir):
    with pytest.raises(DataError, match="no split 'gallery', there are query, train"):
        datasets.load_split(data_dir, "market1501", "gallery")
    for name in ("", "../market1501", "Market1501", "a/b"):
        with pytest.raises(ConfigError, match="is not a name"):
            datasets.load_split(data_dir, name, "train")


def test_shard_missing_or_cut_at_a_record(data_dir):
    folder = data_dir / "market1501" / "1.0.0"
    shard = folder / "market1501-train.tfrecord-00001-of-00002"
    source = datasets.load_split(data_dir, "market1501", "train").source
    os.truncate(shard, int(source._offsets[6]))
    with pytest.raises(DataError, match="00001-of-00002: holds 2 records instead of 3"):
        datasets.load_split(data_dir, "market1501", "train")
    shard.unlink()
    with pytest.raises(DataError, match="00001-of-00002: cannot be read"):
        datasets.load_split(data_dir, "market1501", "train")


def test_damaged_description_is_named(data_dir):
    info = data_dir / "market1501" / "1.0.0" / "dataset_info.json"
    good = info.read_text()
    for bad in ("", "[]", "{}", good[:40], good.replace('"shardLengths"', '"x"'), good.replace('["4"', '["four"')):
        info.write_text(bad)
        with pytest.raises(DataError, match=r"dataset_info\.json: is damaged"):
            datasets.load_split(data_dir, "market1501", "train")
    info.write_text(good.replace("tfrecord", "riegeli"))
    with pytest.raises(DataError, match="'riegeli' files instead of 'tfrecord'"):
        datasets.load_split(data_dir, "market1501", "train")
    info.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is damaged"):
        datasets.load_split(data_dir, "market1501", "train")


def test_record_error_names_its_place(data_dir):
    split = datasets.load_split(data_dir, "market1501", "train")
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
    labels = datasets.relabel(pids)
    assert labels.dtype == np.int32
    values = np.unique(pids)
    np.testing.assert_array_equal(np.unique(labels), np.arange(len(values)))
    np.testing.assert_array_equal(values[labels], pids)
    assert datasets.relabel(np.zeros(0, np.int32)).shape == (0,)
