"""The memory's tables in a checkpoint: each process writes and checks its own rows, and a restore allocates them once.

An item of Orbax with a format of its own: Orbax's general one holds an array twice while it reads, and one process
would have to seal all files and every process to check them. The folder has, of each process that writes,
`<table>.<first row>.bin` (rows, little-endian) and `part-<process>.json` (shapes, dtypes, and a CRC32C of every block
of rows); any process can read any rows.
"""

import asyncio
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import google_crc32c
import jax
import numpy as np
import orbax.checkpoint as ocp

from dmosnet_jax.core import safe_json
from dmosnet_jax.core.errors import DataError

PARTS = "part-*.json"
BLOCK_BYTES = 1 << 22
# XLA on CPUs takes such memory as it is, without a copy.
_ALIGNMENT = 64

Runs = dict[str, tuple[tuple[int, ...], list[tuple[int, np.ndarray]]]]


class DamagedTableError(ValueError):
    """A file of a table is missing, or not what was written; the message names it."""


class Handler(ocp.AsyncCheckpointHandler):
    """Writes tables in the background."""

    async def async_save(self, directory: Any, args: "Save") -> list[ocp.future.Future]:
        """Copies this process's rows off the devices, and starts to write them."""
        runs = own_rows(args.tables)
        folder = pathlib.Path(os.fspath(directory))

        async def commit() -> None:
            write(folder, runs)

        return [ocp.future.CommitFutureAwaitingContractedSignals(commit(), name="tables")]

    def save(self, directory: Any, args: "Save") -> None:
        """The same, to its end."""

        async def run() -> None:
            for future in await self.async_save(directory, args):
                future.result()

        asyncio.run(run())

    def restore(self, directory: Any, args: "Restore") -> dict[str, jax.Array]:
        """Tables of the given shapes, dtypes and shardings."""
        folder = pathlib.Path(os.fspath(directory))
        return {name: read(folder, name, like) for name, like in args.tables.items()}

    def metadata(self, directory: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes by name."""
        return shapes(pathlib.Path(os.fspath(directory)))


@ocp.args.register_with_handler(Handler, for_save=True)
@dataclasses.dataclass
class Save(ocp.args.CheckpointArgs):
    """Tables by name, split by rows or the same everywhere."""

    tables: Mapping[str, jax.Array]


@ocp.args.register_with_handler(Handler, for_restore=True)
@dataclasses.dataclass
class Restore(ocp.args.CheckpointArgs):
    """Shapes, dtypes and shardings by name."""

    tables: Mapping[str, jax.ShapeDtypeStruct]


def own_rows(tables: Mapping[str, jax.Array]) -> Runs:
    """Shape and, as copies, the rows that this process writes: of what several devices hold, only the first's."""
    found: Runs = {}
    for name, table in tables.items():
        shards = [shard for shard in table.addressable_shards if shard.replica_id == 0]
        runs = [(shard.index[0].start or 0, np.array(shard.data)) for shard in shards]
        if runs:
            found[name] = table.shape, runs
    return found


def write(folder: pathlib.Path, runs: Runs) -> None:
    """Writes rows, and what they are."""
    described: dict[str, Any] = {}
    for name, (shape, pieces) in runs.items():
        parts = []
        for first, rows in pieces:
            block = max(1, BLOCK_BYTES // max(1, rows[:1].nbytes))
            checksums, file = [], f"{name}.{first}.bin"
            with (folder / file).open("wb") as out:
                for start in range(0, len(rows), block):
                    raw = rows[start : start + block].tobytes()
                    checksums.append(google_crc32c.value(raw))
                    out.write(raw)
                out.flush()
                os.fsync(out.fileno())
            parts.append({"file": file, "first": first, "rows": len(rows), "block": block, "checksums": checksums})
        described[name] = {"shape": shape, "dtype": pieces[0][1].dtype.str, "parts": parts}
    path = folder / PARTS.replace("*", str(jax.process_index()))
    path.write_text(json.dumps(described), encoding="utf-8")


def _descriptions(folder: pathlib.Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob(PARTS)):
        try:
            described = safe_json.read_object(path, fix="")
        except DataError as error:
            raise DamagedTableError(f"{folder.name}/{path.name} can't be read") from error
        for name, table in described.items():
            if not _is_sound(name, table):
                raise DamagedTableError(f"{folder.name}/{path.name} describes no tables")
        found.append(described)
    return found


def _is_sound(name: str, table: Any) -> bool:
    """Whether a table's description is one."""
    try:
        shape = table["shape"]
        sound = all(type(length) is int and length >= 0 for length in shape) and np.dtype(table["dtype"]).itemsize > 0
        for part in table["parts"]:
            numbers = [part["first"], part["rows"], part["block"], *part["checksums"]]
            sound = sound and all(type(number) is int and number >= 0 for number in numbers)
            sound = sound and part["file"] == f"{name}.{part['first']}.bin" and part["first"] + part["rows"] <= shape[0]
            sound = sound and len(part["checksums"]) == -(-part["rows"] // part["block"])
    except (LookupError, TypeError, ValueError, ArithmeticError):
        return False
    return sound


def shapes(folder: pathlib.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the tables in a folder."""
    tables = [item for part in _descriptions(folder) for item in part.items()]
    return {name: jax.ShapeDtypeStruct(tuple(table["shape"]), np.dtype(table["dtype"])) for name, table in tables}


def read(folder: pathlib.Path, name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
    """A table on its devices; each process reads and checks what its own devices hold.

    Args:
        folder: of the item.
        name: of the table.
        like: shape, dtype and sharding.

    Raises:
        DamagedTableError: a file is not what was written.
    """
    parts = [part for described in _descriptions(folder) if name in described for part in described[name]["parts"]]

    def rows(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(like.shape[0])
        found = _aligned((stop - start, *like.shape[1:]), like.dtype)
        filled = 0
        for part in parts:
            filled += _fill(folder, part, found, start)
        if filled != stop - start:
            raise DamagedTableError(f"{folder.name}/{name}.*.bin: {stop - start - filled} rows are missing")
        return found

    assert like.sharding is not None
    return jax.make_array_from_callback(like.shape, like.sharding, rows)


def _fill(folder: pathlib.Path, part: Mapping[str, Any], target: np.ndarray, start: int) -> int:
    """Fills in what a part has of the rows from `start` on; returns how many those are."""
    low, high = max(start, part["first"]), min(start + len(target), part["first"] + part["rows"])
    if low >= high:
        return 0
    label, block = f"{folder.name}/{part['file']}", part["block"]
    try:
        with (folder / part["file"]).open("rb") as file:
            size, expected = os.fstat(file.fileno()).st_size, part["rows"] * target[:1].nbytes
            # Python would make room for all that it is asked to read.
            if size != expected:
                raise DamagedTableError(f"{label} has {size:,} bytes instead of {expected:,}")
            for number in range((low - part["first"]) // block, -(-(high - part["first"]) // block)):
                first = part["first"] + number * block
                count = min(block, part["first"] + part["rows"] - first)
                file.seek((first - part["first"]) * target[:1].nbytes)
                raw = file.read(count * target[:1].nbytes)
                if google_crc32c.value(raw) != part["checksums"][number]:
                    raise DamagedTableError(f"the checksum of {label} differs")
                values = np.frombuffer(raw, target.dtype).reshape(count, *target.shape[1:])
                begin, end = max(low, first), min(high, first + count)
                target[begin - start : end - start] = values[begin - first : end - first]
    except FileNotFoundError as error:
        raise DamagedTableError(f"{label} is missing") from error
    return high - low


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)
