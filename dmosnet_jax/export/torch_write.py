"""Writes `.pth` files as torch >= 1.6 does, without torch.

The container is a zip archive with `data.pkl`, a pickle of protocol 2 that calls `torch._utils._rebuild_tensor_v2` once
for each tensor, and the tensors' bytes beside it. `torch.load(path, weights_only=True)` reads it.
"""

import os
import struct
import zipfile
from collections.abc import Iterator, Mapping

import numpy as np

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.files import atomic_write

# Element types by NumPy code.
_STORAGES = {"<f4": "FloatStorage", "<f8": "DoubleStorage", "<f2": "HalfStorage", "<i8": "LongStorage"}
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_pth(path: str | os.PathLike[str], state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict.

    Args:
        path: the file; it appears whole or not at all.
        state_dict: arrays by name, of float16, float32, float64 or int64.

    Raises:
        DataError: the file can't be written, or an array has another element type.
    """
    arrays = {name: np.ascontiguousarray(value).reshape(np.shape(value)) for name, value in state_dict.items()}
    for name, array in arrays.items():
        if array.dtype.newbyteorder("<").str not in _STORAGES:
            raise DataError(f"{path}: {name} is {array.dtype}, which is not written: give floats, or int64")
    with atomic_write(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        _put(archive, "data.pkl", b"".join(_pickle(arrays)))
        _put(archive, "byteorder", b"little")
        for key, array in enumerate(arrays.values()):
            _put(archive, f"data/{key}", array.tobytes())
        _put(archive, "version", b"3\n")


def _put(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    # A fixed date: equal weights give equal files.
    archive.writestr(zipfile.ZipInfo(f"archive/{name}", _EPOCH), data)


def _pickle(arrays: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    yield b"\x80\x02"
    yield b"ccollections\nOrderedDict\n)R("
    for key, (name, array) in enumerate(arrays.items()):
        yield _text(name)
        yield from _tensor(str(key), array)
    yield b"u."


def _tensor(key: str, array: np.ndarray) -> Iterator[bytes]:
    """`_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad=False, hooks=OrderedDict())`."""
    yield b"ctorch._utils\n_rebuild_tensor_v2\n(("
    storage = _STORAGES[array.dtype.newbyteorder("<").str]
    yield _text("storage") + f"ctorch\n{storage}\n".encode() + _text(key) + _text("cpu") + _integer(array.size) + b"tQ"
    strides = [step // array.itemsize for step in array.strides]
    yield _integer(0) + _sizes(array.shape) + _sizes(strides)
    yield b"\x89ccollections\nOrderedDict\n)RtR"


def _sizes(sizes) -> bytes:
    return b"(" + b"".join(map(_integer, sizes)) + b"t"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data
