"""The record of one image: a serialised `tf.train.Example`, written by `data_prep` and read here without TensorFlow.

The names below are the schema; both sides import them.
"""

import dataclasses
from typing import Any

from google.protobuf.message import DecodeError

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.protobuf import message_class

IMAGE = "image"  # the encoded file, byte for byte as in the raw data set
PID = "pid"  # identity; -1 where unlabelled, 0 for a distractor in the gallery
CAMID = "camid"  # camera
FILENAME = "filename"  # path relative to the root of the raw data set
FEATURES = (IMAGE, PID, CAMID, FILENAME)

TRAIN, QUERY, GALLERY = "train", "query", "gallery"
# MSMT17's validation images, which some train on too, and training images where the two are not told apart.
VAL, TRAINVAL = "val", "trainval"
# More images of each query's person from its camera (Market-1501's gt_bbox).
MULTI_QUERY = "multi_query"

FILE_FORMAT = "tfrecord"
INFO_FILE = "dataset_info.json"

_INT32 = range(-(2**31), 2**31)

# What is used of tensorflow/core/example/example.proto and feature.proto.
_Example = message_class(
    """
    name: "example.proto" syntax: "proto3"
    message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
    message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
    message_type {
      name: "Feature" oneof_decl { name: "kind" }
      field { name: "bytes_list" number: 1 type: TYPE_MESSAGE type_name: "BytesList" oneof_index: 0 }
      field { name: "int64_list" number: 3 type: TYPE_MESSAGE type_name: "Int64List" oneof_index: 0 }
    }
    message_type {
      name: "Features"
      field {
        name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: "Features.FeatureEntry"
      }
      nested_type {
        name: "FeatureEntry" options { map_entry: true }
        field { name: "key" number: 1 type: TYPE_STRING }
        field { name: "value" number: 2 type: TYPE_MESSAGE type_name: "Feature" }
      }
    }
    message_type { name: "Example" field { name: "features" number: 1 type: TYPE_MESSAGE type_name: "Features" } }
    """,
    "Example",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One image of a data set.

    Attributes:
      image: the encoded image file.
      pid: identity, within int32; -1 where unlabelled.
      camid: camera, within int32.
      filename: path relative to the root of the raw data set, with forward slashes.
    """

    image: bytes
    pid: int
    camid: int
    filename: str


def shard_name(dataset: str, split: str, shard: int, shards: int) -> str:
    """File name of a shard, as TensorFlow Datasets has it."""
    return f"{dataset}-{split}.{FILE_FORMAT}-{shard:05d}-of-{shards:05d}"


def parse(record: bytes) -> Record:
    """Reads a serialised `tf.train.Example`; features that are not part of the schema are ignored.

    Raises:
      DataError: the bytes are not such an Example. The caller knows the shard and names it.
    """
    try:
        feature = _Example.FromString(record).features.feature
        missing = [name for name in FEATURES if name not in feature]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        return Record(
            image=_only(feature[IMAGE].bytes_list.value, IMAGE, "strings"),
            pid=_int32(feature[PID], PID),
            camid=_int32(feature[CAMID], CAMID),
            filename=_only(feature[FILENAME].bytes_list.value, FILENAME, "strings").decode(),
        )
    except (DecodeError, ValueError) as error:
        raise DataError(f"not a record of this format: {error}") from error


def serialise(record: Record) -> bytes:
    """A record as `parse` reads it; equal records give equal bytes. The file name must be valid text."""
    example = _Example()
    feature = example.features.feature
    feature[IMAGE].bytes_list.value.append(record.image)
    feature[PID].int64_list.value.append(record.pid)
    feature[CAMID].int64_list.value.append(record.camid)
    feature[FILENAME].bytes_list.value.append(record.filename.encode())
    return example.SerializeToString(deterministic=True)


def _int32(feature: Any, name: str) -> int:
    value = _only(feature.int64_list.value, name, "integers")
    if value not in _INT32:
        raise ValueError(f"{name}={value} is outside int32")
    return value


def _only(values: Any, name: str, kind: str) -> Any:
    if len(values) != 1:
        raise ValueError(f"{name} has {len(values)} {kind} instead of 1")
    return values[0]
