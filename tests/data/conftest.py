"""Writers of records and shards that share no code with the readers under test."""

import json
import struct

import google_crc32c
import pytest
from tensorflow_datasets.proto import tf_example_pb2


def example_bytes(image=b"\xff\xd8", pid=1, camid=2, filename="bounding_box_train/0001.jpg", drop=(), extra=()):
    """A serialised Example, by the protobuf runtime."""
    example = tf_example_pb2.Example()
    feature = example.features.feature
    for name, value in {"image": image, "filename": filename.encode(), **dict(extra)}.items():
        feature[name].bytes_list.value.append(value)
    feature["pid"].int64_list.value.append(pid)
    feature["camid"].int64_list.value.append(camid)
    for name in drop:
        del feature[name]
    return example.SerializeToString(deterministic=True)


def masked_crc(data):
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32


def framed(data):
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))


@pytest.fixture
def example():
    return example_bytes


@pytest.fixture
def write_shard():
    """The function `write_shard(path, records)`: writes a TFRecord file and returns the records' offsets."""

    def write(path, records):
        offsets, content = [], b""
        for record in records:
            offsets.append(len(content))
            content += framed(record)
        path.write_bytes(content)
        return offsets

    return write


@pytest.fixture
def write_dataset(write_shard):
    """The function `write_dataset(data_dir, name, version, splits)`: `splits` maps names to lists of shards."""

    def write(data_dir, name, version, splits, file_format="tfrecord"):
        folder = data_dir / name / version
        folder.mkdir(parents=True)
        for split, shards in splits.items():
            for number, shard in enumerate(shards):
                write_shard(folder / f"{name}-{split}.tfrecord-{number:05d}-of-{len(shards):05d}", shard)
        described = [{"name": split, "shardLengths": [str(len(s)) for s in shards]} for split, shards in splits.items()]
        info = {"name": name, "version": version, "fileFormat": file_format, "splits": described}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        return folder

    return write
