"""Metrics on disk and on the terminal: `metrics.jsonl`, TensorBoard events and a progress bar. Process 0 writes."""

import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import tqdm

from dmosnet_jax.core import files
from dmosnet_jax.core.errors import DataError, printable
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.train.events import EventFile

METRICS_FILE = "metrics.jsonl"


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, oldest first; an empty list where there is none.

    A last line cut short by a killed process is left out.

    Raises:
        DataError: any other line is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no step")
            rows.append(row)
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise DataError(
                    f"{path}: line {number} is not a row of metrics ({printable(line, 40)}); remove it or the file"
                ) from error
    return rows


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all.

    Raises:
        DataError: it can't be written.
    """
    text = json.dumps(value, indent=2, allow_nan=True) + "\n"
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and scalars to TensorBoard; silent on every process but the first."""

    def __init__(self, workdir: str | os.PathLike[str], *, first_step: int = 0):
        """Opens the files; rows after `first_step`, which a resumed run will write again, are dropped."""
        self._file = self._events = None
        if jax.process_index() != 0:
            return
        path = pathlib.Path(workdir) / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        files.remove_unfinished(path.parent)
        if path.exists():
            kept = [row for row in read_rows(path) if row["step"] <= first_step] if first_step else []
            with atomic_write(path) as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._events = EventFile(path.parent, purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records scalars of a step."""
        if self._file is None or self._events is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        finite = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._events.scalars(step, {name: value for name, value in finite.items() if math.isfinite(value)})

    def close(self) -> None:
        """Flushes and closes both files."""
        if self._file is not None and self._events is not None:
            self._file.close()
            self._events.close()
            self._file = self._events = None


class Bar(tqdm.tqdm):
    """A bar that can leave pauses out of its rate and time left."""

    _moved: float | None = None

    def update(self, n: float | None = 1) -> bool | None:
        """As tqdm's."""
        # A disabled bar, as on other processes, has no clock.
        self._moved = None if self.disable else self._time()
        return super().update(n)

    def skip_pause(self) -> None:
        """Leaves out what has gone on since the bar last moved, such as a compilation."""
        if not self.disable:
            now = self._time()
            # Lines in a log file come by this clock too.
            self.last_print_t += now - (self.start_t if self._moved is None else self._moved)
            self._moved = now


def progress_bar(total: int | None, *, label: str, unit: str = "images", initial: int = 0, delay: float = 0.0) -> Bar:
    """A bar with rate and time left on process 0's terminal; in a log file it prints a line every half minute.

    Args:
        total: units in all.
        label: stands before it.
        unit: what is counted.
        initial: units that were done before.
        delay: seconds in which it is not shown; a stage that is over by then has none.
    """
    terminal = sys.stderr.isatty()
    return Bar(
        total=total,
        initial=initial,
        desc=label,
        unit=f" {unit}",
        dynamic_ncols=terminal,
        mininterval=0.5 if terminal else 30.0,
        disable=jax.process_index() != 0,
        delay=delay,
    )
