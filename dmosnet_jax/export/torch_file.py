"""The three containers of PyTorch weights: zip (torch >= 1.6), the older pickle stream, and safetensors.

Memory is bounded by a small multiple of the file's size: zip entries must be stored (as torch writes them), so there is
nothing to inflate, and tensors that share a storage may not add up to much more than the file.
"""

import io
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np
import safetensors

from dmosnet_jax.core import files, safe_pickle
from dmosnet_jax.core.errors import DataError, printable
from dmosnet_jax.export.torch_pickle import StorageRef, TensorRef, TorchVocabulary, decode, item_size, view

# Chooses the named tensors that are wanted from what the pickle holds.
Choose = Callable[[Any], Mapping[str, TensorRef]]

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_SAFETENSORS_TYPES = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "BF16": "bfloat16",
    "I64": "i8",
    "I32": "i4",
    "I16": "i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "bool",
}
# Tied weights come out as copies, and bfloat16 doubles; a file that asks for more than this is an amplification attack.
_MAX_GROWTH = 4
# What zipfile raises on damaged archives (OSError: a seek to before the start); it has no common base class for them.
_BAD_ZIP = (
    zipfile.BadZipFile,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    EOFError,
    RuntimeError,
    OverflowError,
    struct.error,
)


def read_tensors(path: str | os.PathLike[str], choose: Choose) -> dict[str, np.ndarray]:
    """Reads the tensors that `choose` picks from a PyTorch or safetensors file; the container is known by its bytes.

    Returns:
        Contiguous arrays of their own, by name, in the file's element type (bfloat16 as float32).

    Raises:
        DataError: no such file, not a checkpoint, damaged, or refused.
    """
    where = str(path)
    try:
        with files.open_local(path) as file:
            start = file.read(512)
            if start.startswith(_ZIP_MAGIC):
                return _read_zip(file, where, choose)
            # Before the pickle: the length of the header, which comes first, may begin with any byte.
            if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
                return _read_safetensors(file, where)
            if start.startswith(b"\x80"):
                return _read_legacy(file, where, choose)
    except IsADirectoryError as error:
        raise DataError(f"{where}: is a directory; give a .pth, .pth.tar, .pt or .safetensors file") from error
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror or error}); check the path") from error
    if found := files.foreign(start):
        raise DataError(f"{where}: {found}")
    problem = "is empty" if not start else "is neither a PyTorch checkpoint nor a safetensors file"
    raise DataError(f"{where}: {problem}; give a .pth, .pth.tar, .pt or .safetensors file")


def _tensors(
    chosen: Mapping[str, TensorRef],
    storage: Callable[[StorageRef], bytes | memoryview],
    order: str,
    budget: int,
    where: str,
) -> dict[str, np.ndarray]:
    """Copies of the chosen tensors, up to `budget` bytes; storages that several of them share are decoded once."""
    decoded: dict[tuple[StorageRef, str], np.ndarray] = {}
    result = {}
    for name, ref in chosen.items():
        slot = (ref.storage, ref.kind)
        if slot not in decoded:
            data = storage(ref.storage)
            if len(data) % item_size(ref.kind):
                raise DataError(
                    f"{where}: storage {printable(ref.storage.key)} ends within an element; the file is damaged"
                )
            decoded[slot] = decode(data, ref.kind, order)
        window = view(ref, decoded[slot], f"{where}: {printable(name)}")
        budget -= window.nbytes
        if budget < 0:
            raise DataError(f"{where}: the tensors share storages to claim many times the file's size; refused")
        result[name] = np.array(window, order="C")
    return result


def _window(data: bytes | memoryview, ref: StorageRef, where: str) -> memoryview:
    """The bytes of `ref` within its storage's bytes."""
    size = item_size(ref.kind)
    start, end = ref.offset * size, (ref.offset + ref.count) * size
    if end > len(data):
        raise DataError(
            f"{where}: storage {printable(ref.key)} has {len(data)} bytes of {end} (truncated?); "
            "copy or download the file again"
        )
    return memoryview(data)[start:end]


def _read_zip(file: BinaryIO, where: str, choose: Choose) -> dict[str, np.ndarray]:
    """Torch >= 1.6: `<name>/data.pkl`, `<name>/byteorder`, `<name>/data/<key>`, all stored without compression."""
    try:
        with zipfile.ZipFile(file) as archive:
            size = os.fstat(file.fileno()).st_size
            _check_zip(archive, size, where)
            names = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(names) != 1:
                raise DataError(f"{where}: a zip file with {len(names)} data.pkl entries; a PyTorch checkpoint has one")
            prefix = names[0].removesuffix("data.pkl")
            order = archive.read(prefix + "byteorder") if prefix + "byteorder" in archive.namelist() else b"little"
            vocabulary = TorchVocabulary(where)
            root = safe_pickle.interpret(io.BytesIO(archive.read(names[0])), vocabulary, where)
            contents: dict[str, bytes] = {}

            def storage(ref: StorageRef) -> memoryview:
                if ref.key not in contents:
                    contents[ref.key] = archive.read(f"{prefix}data/{ref.key}")
                return _window(contents[ref.key], ref, where)

            return _tensors(choose(root), storage, ">" if order == b"big" else "<", _MAX_GROWTH * size, where)
    except _BAD_ZIP as error:
        raise DataError(
            f"{where}: damaged zip archive ({printable(error)}); copy or download the file again"
        ) from error


def _check_zip(archive: zipfile.ZipFile, file_size: int, where: str) -> None:
    """Refuses programs, compressed entries, and entries that overlap to claim more than the file's bytes."""
    if any("/code/__torch__" in f"/{name}" or name.endswith("/model.json") for name in archive.namelist()):
        raise DataError(
            f"{where}: is a TorchScript program, and programs are not run: save its weights in PyTorch by "
            "torch.save(torch.jit.load(path).state_dict(), other_path)"
        )
    total = 0
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise DataError(
                f"{where}: zip entry {printable(entry.filename)} is compressed ({entry.compress_size} -> "
                f"{entry.file_size} bytes); torch does not compress, so save the checkpoint again with torch.save"
            )
        total += entry.file_size
    if total > file_size:
        raise DataError(f"{where}: zip entries claim {total} bytes of a file of {file_size}; the file is damaged")


def _read_legacy(file: BinaryIO, where: str, choose: Choose) -> dict[str, np.ndarray]:
    """Torch < 1.6: five pickles (magic, protocol, system, object, storage keys), then each storage with its count."""
    file.seek(0)
    # Windows of one buffer: storages of optimisers that nobody asks for cost nothing beyond it.
    data = file.read()
    stream = io.BytesIO(data)
    vocabulary = TorchVocabulary(where)
    if safe_pickle.interpret(stream, vocabulary, where) != _LEGACY_MAGIC:
        raise DataError(
            f"{where}: a pickle that torch.save did not write; save the weights with torch.save or safetensors"
        )
    protocol = safe_pickle.interpret(stream, vocabulary, where)
    system = safe_pickle.interpret(stream, vocabulary, where)
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise DataError(f"{where}: unknown PyTorch file version; save the checkpoint again with a current torch")
    root = safe_pickle.interpret(stream, vocabulary, where)
    keys = safe_pickle.interpret(stream, vocabulary, where)
    order = "<" if system.get("little_endian", True) else ">"
    contents = _legacy_storages(memoryview(data), stream.tell(), keys, vocabulary, order)

    def storage(ref: StorageRef) -> memoryview:
        if ref.key not in contents:
            raise DataError(f"{where}: storage {printable(ref.key)} is not in the file; the file is damaged")
        return _window(contents[ref.key], ref, where)

    return _tensors(choose(root), storage, order, _MAX_GROWTH * len(data), where)


def _legacy_storages(
    data: memoryview, position: int, keys: Any, vocabulary: TorchVocabulary, order: str
) -> dict[str, memoryview]:
    """Windows of the raw storages that follow the pickles: an int64 count and the elements, in the order of `keys`."""
    if not isinstance(keys, list):
        raise vocabulary.damaged("no list of storages")
    contents = {}
    for key in keys:
        ref = vocabulary.storages.get(key) if isinstance(key, str) else None
        if ref is None:
            raise vocabulary.damaged("a storage that no tensor uses")
        if position + 8 > len(data):
            raise vocabulary.damaged(f"truncated before storage {printable(key)}")
        (count,) = struct.unpack_from(order + "q", data, position)
        end = position + 8 + count * item_size(ref.kind)
        if count != ref.count or end > len(data):
            raise vocabulary.damaged(f"storage {printable(key)} has not its {ref.count} elements: truncated?")
        contents[key] = data[position + 8 : end]
        position = end
    return contents


def _read_safetensors(file: BinaryIO, where: str) -> dict[str, np.ndarray]:
    """Header and offsets are checked by the safetensors library; element types that NumPy lacks are refused."""
    file.seek(0)
    try:
        entries = safetensors.deserialize(file.read())
    except safetensors.SafetensorError as error:
        raise DataError(
            f"{where}: damaged safetensors file ({printable(error)}); copy or download the file again"
        ) from error
    result = {}
    for name, entry in sorted(entries, key=lambda item: item[0]):
        kind = _SAFETENSORS_TYPES.get(entry["dtype"])
        if kind is None:
            raise DataError(f"{where}: {printable(name)} has element type {entry['dtype']}; save it as float32")
        result[name] = decode(entry["data"], kind).reshape(entry["shape"])
    return result
