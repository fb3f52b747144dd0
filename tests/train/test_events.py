"""Event files against protobuf's own reader of the messages' definition (tensorflow/core/util/event.proto)."""

import struct
import time

import google_crc32c
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from dmosnet_jax.train.events import EventFile

MESSAGES = {
    "Value": [("tag", 1, "STRING"), ("simple_value", 2, "FLOAT")],
    "Summary": [("value", 1, "*Value")],
    "SessionLog": [("status", 1, "INT32")],
    "Event": [
        ("wall_time", 1, "DOUBLE"),
        ("step", 2, "INT64"),
        ("file_version", 3, "STRING"),
        ("summary", 5, "Summary"),
        ("session_log", 7, "SessionLog"),
    ],
}


@pytest.fixture(scope="module")
def event_class():
    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="t", syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for label, number, kind in fields:
            field = message.field.add(name=label, number=number, label=field_type.LABEL_OPTIONAL)
            if kind.startswith("*"):
                field.label = field_type.LABEL_REPEATED
            if kind.isupper():
                field.type = getattr(field_type, f"TYPE_{kind}")
            else:
                field.type, field.type_name = field_type.TYPE_MESSAGE, f".t.{kind.lstrip('*')}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Event"))


def read(path, event_class):
    """The events of a file, whose framing is checked on the way."""

    def masked(part):
        crc = google_crc32c.value(part)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32

    data, events = path.read_bytes(), []
    while data:
        length, check = struct.unpack_from("<QI", data)
        content = data[12 : 12 + length]
        assert check == masked(data[:8])
        assert struct.unpack_from("<I", data, 12 + length)[0] == masked(content)
        events.append(event_class.FromString(content))
        data = data[16 + length :]
    return events


def test_scalars_and_the_restart_are_read_back(tmp_path, event_class):
    since = time.time()
    file = EventFile(tmp_path, purge_step=7)
    file.scalars(8, {"loss": 0.5, "clusters": 528, "größe": -1e30})
    file.scalars(2_090_122, {"loss": 0.25})
    (path,) = tmp_path.iterdir()
    # Complete while it is open: a killed run loses nothing.
    first, restart, *rest = read(path, event_class)
    assert first.file_version == "brain.Event:2"
    assert (restart.step, restart.session_log.status) == (7, 1)
    assert [event.step for event in rest] == [8, 2_090_122]
    assert [(value.tag, value.simple_value) for value in rest[0].summary.value] == [
        ("loss", 0.5),
        ("clusters", 528),
        ("größe", np.float32(-1e30)),
    ]
    assert all(since <= event.wall_time <= time.time() for event in rest)
    file.close()


def test_files_do_not_collide(tmp_path, event_class):
    for _ in range(3):
        EventFile(tmp_path).close()
    assert len(list(tmp_path.iterdir())) == 3
    for path in tmp_path.iterdir():
        assert [event.HasField("session_log") for event in read(path, event_class)] == [False]
