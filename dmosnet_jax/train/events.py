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

from dmosnet_jax.data.framing import frame
from dmosnet_jax.data.records import delimited, varint

_SESSION_START = b"\x3a\x02\x08\x01"  # session_log { status: START }


class EventFile:
    """One event file, complete after every call."""

    def __init__(self, folder: pathlib.Path, *, purge_step: int | None = None):
        """Starts a file; TensorBoard then forgets what earlier files say of steps from `purge_step` on."""
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = (folder / name).open("xb", buffering=0)
        self._write(0, delimited(3, b"brain.Event:2"))
        if purge_step is not None:
            self._write(purge_step, _SESSION_START)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records the values of a step."""
        entries = (delimited(1, name.encode()) + b"\x15" + struct.pack("<f", value) for name, value in values.items())
        self._write(step, delimited(5, b"".join(delimited(1, entry) for entry in entries)))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, step: int, content: bytes) -> None:
        self._file.write(frame(b"\x09" + struct.pack("<d", time.time()) + b"\x10" + varint(step) + content))
