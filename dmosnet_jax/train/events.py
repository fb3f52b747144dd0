"""TensorBoard event files of scalars, written without TensorBoard's or TensorFlow's code.

A file is a TFRecord of `Event` messages (tensorflow/core/util/event.proto). Scalars need three of their fields, so they
are encoded by hand: the usual writers import PyTorch or TensorFlow wherever they are installed.
"""

import os
import pathlib
import socket
import struct
import time
from collections.abc import Mapping

import google_crc32c

_SESSION_START = b"\x3a\x02\x08\x01"  # session_log { status: START }


class EventFile:
    """One event file, complete after every call."""

    def __init__(self, folder: pathlib.Path, *, purge_step: int | None = None):
        """Starts a file; TensorBoard then forgets what earlier files say of steps from `purge_step` on."""
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = (folder / name).open("xb", buffering=0)
        self._write(0, _field(3, b"brain.Event:2"))
        if purge_step is not None:
            self._write(purge_step, _SESSION_START)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records the values of a step."""
        entries = (_field(1, name.encode()) + b"\x15" + struct.pack("<f", value) for name, value in values.items())
        self._write(step, _field(5, b"".join(_field(1, entry) for entry in entries)))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, step: int, content: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + b"\x10" + _varint(step) + content
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _checksum(data: bytes) -> bytes:
    """TFRecord's masked CRC32C."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
