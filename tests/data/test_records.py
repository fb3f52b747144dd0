import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import records


def test_parses_what_protobuf_writes(example, rng):
    for _ in range(200):
        want = records.Record(
            image=rng.bytes(int(rng.integers(0, 40_000))),
            pid=int(rng.choice([-1, 0, 1, 127, 128, 1501, 2**31 - 1, -(2**31), rng.integers(2**31)])),
            camid=int(rng.integers(0, 300)),
            filename="дом/" * int(rng.integers(0, 40)) + "0002_c1s1_000451_03.jpg",
        )
        raw = example(want.image, want.pid, want.camid, want.filename)
        assert records.parse(raw) == want


def test_writes_what_protobuf_writes(example, rng):
    for _ in range(200):
        record = records.Record(
            image=rng.bytes(int(rng.integers(0, 40_000))),
            pid=int(rng.choice([-1, 0, 127, 128, 2**31 - 1, -(2**31), rng.integers(2**31)])),
            camid=int(rng.integers(0, 2**31)),
            filename="дом/" * int(rng.integers(0, 40)) + "34_01_0341_00001865.jpg",
        )
        raw = records.serialise(record)
        assert raw == example(record.image, record.pid, record.camid, record.filename)
        assert records.parse(raw) == record


def test_other_features_and_unpacked_integers_are_accepted(example):
    raw = example(extra=[("split", b"train")])
    assert records.parse(raw).camid == 2
    # int64_list { value: 300 } written as one varint field instead of a packed one.
    entry = b"\x0a\x03pid" + b"\x12\x05" + b"\x1a\x03" + b"\x08\xac\x02"
    features = b"\x0a" + bytes([len(entry)]) + entry
    rest = tf_example_pb2.Example.FromString(example(drop=["pid"])).features.SerializeToString()
    body = features + rest
    assert len(body) < 128
    assert records.parse(b"\x0a" + bytes([len(body)]) + body).pid == 300


@pytest.mark.parametrize("name", records.FEATURES)
def test_missing_feature_is_named(example, name):
    with pytest.raises(DataError, match=f"no {name}"):
        records.parse(example(drop=[name]))


def test_wrong_kind_or_number_of_values_is_named(example):
    example = tf_example_pb2.Example.FromString(example(drop=["pid"]))
    example.features.feature["pid"].int64_list.value.extend([1, 2])
    with pytest.raises(DataError, match="pid has 2 integers"):
        records.parse(example.SerializeToString())
    example.features.feature["pid"].bytes_list.value.append(b"1")
    with pytest.raises(DataError, match="pid has 0 integers"):
        records.parse(example.SerializeToString())
    example.features.feature["pid"].int64_list.value.append(2**31)
    with pytest.raises(DataError, match="pid=2147483648 is outside int32"):
        records.parse(example.SerializeToString())


def test_any_bytes_give_a_record_or_a_data_error(example, rng):
    raw = example(image=bytes(range(50)))
    outcomes = {"record": 0, "error": 0}
    for _ in range(5000):
        broken = np.frombuffer(raw, np.uint8).copy()
        places = rng.integers(0, len(broken), size=int(rng.integers(1, 4)))
        broken[places] = rng.integers(0, 256, size=len(places), dtype=np.uint8)
        data = broken.tobytes()[: int(rng.integers(1, len(raw) + 1))] if rng.random() < 0.3 else broken.tobytes()
        try:
            record = records.parse(data)
        except DataError as error:
            outcomes["error"] += str(error).count("\n") == 0
        else:
            assert isinstance(record.image, bytes)
            outcomes["record"] += 1
    assert outcomes["record"] + outcomes["error"] == 5000
    assert min(outcomes.values()) > 100
    for size in range(len(raw)):
        with pytest.raises(DataError):
            records.parse(raw[:size])
