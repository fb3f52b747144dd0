"""TensorBoard event files of scalars: a TFRecord of `Event` messages (tensorflow/core/util/event.proto).

Written here because the usual writers import PyTorch or TensorFlow where those are installed.
"""

import os
import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any

from dmosnet_jax.core.protobuf import message_class
from dmosnet_jax.data.shards import frame

_Event = message_class(
    """
    name: "event.proto" syntax: "proto3"
    message_type {
      name: "Value"
      field { name: "tag" number: 1 type: TYPE_STRING } field { name: "simple_value" number: 2 type: TYPE_FLOAT }
    }
    message_type {
      name: "Summary" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: "Value" }
    }
    message_type { name: "SessionLog" field { name: "status" number: 1 type: TYPE_INT32 } }
    message_type {
      name: "Event"
      field { name: "wall_time" number: 1 type: TYPE_DOUBLE }
      field { name: "step" number: 2 type: TYPE_INT64 }
      field { name: "file_version" number: 3 type: TYPE_STRING }
      field { name: "summary" number: 5 type: TYPE_MESSAGE type_name: "Summary" }
      field { name: "session_log" number: 7 type: TYPE_MESSAGE type_name: "SessionLog" }
    }
    """,
    "Event",
)
_SESSION_START = 1


class EventFile:
    """One event file, complete after every call."""

    def __init__(self, folder: pathlib.Path, *, purge_step: int | None = None):
        """Starts a file; TensorBoard then ignores earlier files' values for steps from `purge_step` on."""
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = (folder / name).open("xb", buffering=0)
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log={"status": _SESSION_START})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records the values of a step."""
        entries = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self._write(step=step, summary={"value": entries})

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, **content: Any) -> None:
        self._file.write(frame(_Event(wall_time=time.time(), **content).SerializeToString()))
