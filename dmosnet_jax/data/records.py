"""The record of one image: a serialised `tf.train.Example`, written by `data_prep` and read here without TensorFlow.

The names below are the schema; both sides import them. The parser knows just the part of the protobuf wire format that
an Example uses (https://protobuf.dev/programming-guides/encoding): it is faster to import than a protobuf runtime, and
it treats every byte as untrusted.
"""

import dataclasses
from typing import Any

from dmosnet_jax.core.errors import DataError

IMAGE = "image"  # the encoded file, byte for byte as in the raw data set
PID = "pid"  # identity; -1 where unlabelled, 0 for a distractor in the gallery
CAMID = "camid"  # camera
FILENAME = "filename"  # path relative to the root of the raw data set
FEATURES = (IMAGE, PID, CAMID, FILENAME)

TRAIN, QUERY, GALLERY = "train", "query", "gallery"
SPLITS = (TRAIN, QUERY, GALLERY)
# Training images that not everybody trains on, and those not told apart from the others.
VAL, TRAINVAL = "val", "trainval"

FILE_FORMAT = "tfrecord"
INFO_FILE = "dataset_info.json"

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_INT32 = range(-(2**31), 2**31)

Buffer = bytes | memoryview


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
    """Reads a record; features that are not part of the schema are ignored.

    Args:
      record: a serialised `tf.train.Example`.

    Returns:
      The record.

    Raises:
      DataError: the bytes are not such an Example. The caller knows the shard and names it.
    """
    values: dict[str, Any] = {}
    try:
        for features in _fields(memoryview(record), 1):
            for entry in _fields(features, 1):
                name = bytes(_last(entry, 1)).decode()
                if name in FEATURES:
                    feature = _last(entry, 2)
                    values[name] = _integer(feature, name) if name in (PID, CAMID) else _string(feature, name)
        missing = [name for name in FEATURES if name not in values]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        return Record(
            image=bytes(values[IMAGE]),
            pid=values[PID],
            camid=values[CAMID],
            filename=bytes(values[FILENAME]).decode(),
        )
    except (ValueError, IndexError) as error:
        raise DataError(f"not a record of this format: {error}") from error


def serialise(record: Record) -> bytes:
    """A record as `parse` reads it; the bytes are those that protobuf's deterministic serialisation gives.

    Args:
      record: the record; its file name must be valid text.
    """
    values = {
        IMAGE: delimited(1, delimited(1, record.image)),
        PID: delimited(3, delimited(1, varint(record.pid % 2**64))),
        CAMID: delimited(3, delimited(1, varint(record.camid % 2**64))),
        FILENAME: delimited(1, delimited(1, record.filename.encode())),
    }
    entries = (delimited(1, name.encode()) + delimited(2, values[name]) for name in sorted(values))
    return delimited(1, b"".join(delimited(1, entry) for entry in entries))


def delimited(number: int, data: bytes) -> bytes:
    """A length-delimited field of a message."""
    return b"".join((bytes([number << 3 | _BYTES]), varint(len(data)), data))


def varint(value: int) -> bytes:
    """A varint."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _string(feature: Buffer, name: str) -> Buffer:
    """The only value of a feature's `bytes_list`."""
    values = [value for strings in _fields(feature, 1) for value in _fields(strings, 1)]
    if len(values) != 1:
        raise ValueError(f"{name} has {len(values)} strings instead of 1")
    return values[0]


def _integer(feature: Buffer, name: str) -> int:
    """The only value of a feature's `int64_list`, which may be packed or not."""
    values: list[int] = []
    for integers in _fields(feature, 3):
        position = 0
        while position < len(integers):
            tag, position = _varint(integers, position)
            if tag == 1 << 3 | _BYTES:
                size, position = _varint(integers, position)
                end = _within(position + size, integers)
                while position < end:
                    value, position = _varint(integers, position)
                    values.append(value)
            elif tag == 1 << 3 | _VARINT:
                value, position = _varint(integers, position)
                values.append(value)
            else:
                raise ValueError(f"unexpected field {tag} in the integers of {name}")
    if len(values) != 1:
        raise ValueError(f"{name} has {len(values)} integers instead of 1")
    value = values[0] - 2**64 if values[0] >= 2**63 else values[0]
    if value not in _INT32:
        raise ValueError(f"{name}={value} is outside int32")
    return value


def _last(message: Buffer, number: int) -> Buffer:
    """The value of a field that occurs once; as protobuf has it, the last one counts and an absent one is empty."""
    value: Buffer = b""
    for value in _fields(message, number):  # noqa: B007
        pass
    return value


def _fields(message: Buffer, number: int) -> list[Buffer]:
    """The values of a length-delimited field of a message; other fields are skipped."""
    values = []
    position = 0
    wanted = number << 3 | _BYTES
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == _BYTES:
            size, position = _varint(message, position)
            end = _within(position + size, message)
            if tag == wanted:
                values.append(message[position:end])
            position = end
        elif kind == _VARINT:
            _, position = _varint(message, position)
        elif kind in (_FIXED64, _FIXED32):
            position = _within(position + (8 if kind == _FIXED64 else 4), message)
        else:
            raise ValueError(f"unknown wire type {kind}")
    return values


def _varint(data: Buffer, position: int) -> tuple[int, int]:
    """An unsigned 64-bit integer and the position behind it."""
    byte = data[position]
    if byte < 0x80:
        return byte, position + 1
    value, shift = byte & 0x7F, 7
    while True:
        position += 1
        byte = data[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
        if shift > 63:
            raise ValueError("an integer is longer than 64 bits")
    if value >= 2**64:
        raise ValueError("an integer is longer than 64 bits")
    return value, position + 1


def _within(end: int, message: Buffer) -> int:
    if end > len(message):
        raise ValueError(f"a field ends at byte {end} of a message of {len(message)} bytes")
    return end
