"""NumPy's files (`.npz`, `.npy`) from anywhere: only numbers and text, within a bound of memory.

`np.load` believes what a file says of its sizes: a zip entry compressed by bzip2 unpacks to gigabytes whatever it
declares, and an array of any declared shape is allocated before its bytes are looked for.
"""

import io
import math
import struct
import tokenize
import zipfile
import zlib
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from dmosnet_jax.core import files
from dmosnet_jax.core.errors import DataError, printable
from dmosnet_jax.core.files import Path

# LUPerson's 4.18 million names have about 200 MB, or 320 as NumPy's text.
MAX_BYTES = 2**32
# A file that unpacks to more than `SLACK` bytes may not unpack to more than so many times its own: lists of names get
# ten to thirty times smaller, and bombs a thousand times.
MAX_RATIO = 100
SLACK = 2**26
_READ_HEADER = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
# What zipfile, zlib and NumPy raise for damaged, encrypted and unknown content.
_DAMAGED = (
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    RuntimeError,
    OverflowError,
    MemoryError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


class _TooLargeError(Exception):
    pass


def read_arrays(
    path: Path, *, max_bytes: int = MAX_BYTES, fix: str = "copy or make the file again"
) -> dict[str, np.ndarray]:
    """Reads an `.npz` or `.npy` file.

    Args:
      path: the file, or its URL; its kind is told by its first bytes.
      max_bytes: an `.npz` that claims to unpack to more, or to many times its size, is refused before it is unpacked.
      fix: what the user is to do about a damaged file, for the message.

    Returns:
      Arrays of numbers or text by name, read-only; the one of an `.npy` file is called `names`.

    Raises:
      DataError: it cannot be read, is damaged or of another kind, or claims to unpack to more than it may.
    """
    try:
        if files.is_remote(path):
            return _read(io.BytesIO(files.read(path)), max_bytes)
        with files.open_stream(path) as file:
            return _read(file, max_bytes)
    except _TooLargeError as error:
        raise DataError(f"{path}: unpacks to more than {error.args[0]:,} bytes: {fix}") from error
    except (OSError, *_DAMAGED) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{path}: damaged, or of another kind ({printable(reason)}): {fix}") from error


def _read(file: BinaryIO, max_bytes: int) -> dict[str, np.ndarray]:
    start = file.read(len(npy.MAGIC_PREFIX))
    file.seek(0)
    if start == npy.MAGIC_PREFIX:
        return {"names": _array(file.read())}
    file.seek(0, io.SEEK_END)
    most = min(max_bytes, SLACK + MAX_RATIO * file.tell())
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        # zipfile gives no more of an entry than it claims, of these two kinds alone.
        if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
            raise ValueError("compressed in a way that NumPy does not use")
        if sum(entry.file_size for entry in entries) > most:
            raise _TooLargeError(most)
        return {entry.filename.removesuffix(".npy"): _array(_unpacked(archive, entry)) for entry in entries}


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as stream:
        # Not at once: zipfile adds up the pieces of a long read by copying all of them for each.
        content = io.BytesIO()
        while chunk := stream.read(1 << 20):
            content.write(chunk)
        return content.getvalue()


def _array(data: bytes) -> np.ndarray:
    """The array in the content of an `.npy` file, as a view of it."""
    stream = io.BytesIO(data)
    read_header = _READ_HEADER.get(npy.read_magic(stream))
    if read_header is None:
        raise ValueError("an unknown version of NumPy's format")
    shape, is_fortran, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    count = math.prod(shape)
    # Elements may have no bytes, and then any number of them would fit.
    if count * dtype.itemsize != len(data) - stream.tell() or count > len(data):
        raise ValueError(f"an array of shape {shape} does not fit into its {len(data):,} bytes")
    return np.ndarray(shape, dtype, data, stream.tell(), order="F" if is_fortran else "C")
