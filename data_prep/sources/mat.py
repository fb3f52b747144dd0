"""The two `.mat` files of CUHK03, read as untrusted data.

`cuhk-03.mat` is HDF5 (MATLAB 7.3): `detected` and `labeled` are cells of references to five camera pairs, each a cell
of references [10, people] to images stored as [3, width, height]; the first five columns are from one camera, the
others from the second, and an empty place is an array of another shape. The file of the new protocol is MATLAB 5: rows
`filelist`, `labels`, `camId` and the 1-based `train_idx`, `query_idx`, `gallery_idx`.
"""

import dataclasses
import io
import math
import struct
import weakref
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int64
from PIL import Image

from data_prep.sources.base import reason
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import records

_FIX = "download the file again"
# Ten images of each person, five of each camera.
_SLOTS = 10
_VIEW = 5
_MAX_PAIRS = 100
_MAX_PEOPLE = 100_000
_MAX_SIDE = 8_192
_MAX_PIXELS = 2**24
# Of the protocol, unpacked; the official ones have 2 MB.
_MAX_PROTOCOL = 2**23
# Kinds of elements of MATLAB 5 files, and classes of their arrays.
_COMPRESSED, _MATRIX = 15, 14
_CELL, _TEXT, _NUMBERS = 1, 4, range(6, 16)
_TYPES = {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
_ENCODINGS = {1: "ascii", 2: "ascii", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le"}


class MatImages:
    """The images of one kind of `cuhk-03.mat` as PNG files, see `base.Files`; names as the protocol's `filelist`."""

    def __init__(self, file: BinaryIO, kind: str, location: str):
        """Lists the `detected` or `labeled` images of the file, which is closed with this object.

        Raises:
          DataError: it is no `cuhk-03.mat`.
        """
        import h5py

        self.location = location
        self._references: dict[str, Any] = {}
        # Nobody else holds the file, which is read for as long as this object is used.
        weakref.finalize(self, file.close)
        try:
            self._file = h5py.File(file, "r")
        # HDF5 reports damage by errors of many kinds.
        except Exception as error:
            raise DataError(f"source {location} is no whole cuhk-03.mat ({reason(error)}): {_FIX}") from error
        try:
            self._list(kind)
        except DataError as error:
            raise DataError(f"source {location}: {error}: {_FIX}") from error
        except Exception as error:
            raise DataError(f"source {location} is no whole cuhk-03.mat ({reason(error)}): {_FIX}") from error
        self.names = sorted(self._references)

    def _list(self, kind: str) -> None:
        import h5py

        if not isinstance(self._file.get(kind, getlink=True), h5py.HardLink):
            raise DataError(f"cuhk-03.mat has no cell {kind!r}")
        for pair, pair_reference in enumerate(self._cell(self._file[kind], kind, _MAX_PAIRS).ravel(), 1):
            people = self._cell(self._file[pair_reference], f"pair {pair} of {kind}", _SLOTS * _MAX_PEOPLE)
            if people.ndim != 2 or people.shape[0] != _SLOTS:
                raise DataError(f"pair {pair} of {kind} has shape {people.shape} instead of ({_SLOTS}, people)")
            for (slot, person), reference in np.ndenumerate(people):
                name = f"{pair}_{person + 1:03d}_{1 + slot // _VIEW}_{slot + 1:02d}.png"
                if reference and len(self._file[reference].shape) == 3:
                    self._references[f"{kind}/{name}"] = reference

    @staticmethod
    def _cell(dataset: Any, what: str, most: int) -> np.ndarray:
        """The references in a cell array."""
        import h5py

        if not isinstance(dataset, h5py.Dataset) or h5py.check_ref_dtype(dataset.dtype) is not h5py.Reference:
            raise DataError(f"{what} is no cell array")
        if dataset.size > most:
            raise DataError(f"{what} is refused: it claims {dataset.size:,} entries")
        _refuse_harmful(dataset, what)
        return dataset[()]

    def read(self, name: str) -> bytes:
        """The image as a PNG file of exactly its pixels.

        Raises:
          DataError: it is damaged, or no image of a usual size.
        """
        try:
            dataset = self._file[self._references[name]]
            shape = dataset.shape
            if dataset.dtype != np.uint8 or shape[0] != 3 or min(shape) < 1:
                raise DataError(f"it is {dataset.dtype}{list(shape)} instead of uint8[3, width, height]")
            # Before it is read: compressed, some kilobytes can claim to be any number of pixels.
            if max(shape) > _MAX_SIDE or shape[1] * shape[2] > _MAX_PIXELS:
                raise DataError(f"it claims {shape[1]:,} x {shape[2]:,} pixels")
            _refuse_harmful(dataset, "it")
            pixels = np.ascontiguousarray(dataset[()].T)
        except DataError:
            raise
        except Exception as error:
            raise DataError(reason(error)) from error
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        return buffer.getvalue()


def _refuse_harmful(dataset: Any, what: str) -> None:
    """HDF5 can keep the values of a data set in any other file, and unpacks whole chunks, larger than the data set."""
    if dataset.external or dataset.is_virtual:
        raise DataError(f"{what} is refused: its values are in another file")
    if dataset.chunks and math.prod(dataset.chunks) * dataset.dtype.itemsize > 3 * _MAX_PIXELS:
        raise DataError(f"{what} is refused: it claims chunks of {dataset.chunks}")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A file of the new protocol.

    Attributes:
      names: of the images.
      pids: identities.
      camids: 1 or 2.
      splits: rows (from 0) of `train`, `query` and `gallery`.
    """

    names: list[str]
    pids: Int64[np.ndarray, " n"]
    camids: Int64[np.ndarray, " n"]
    splits: dict[str, Int64[np.ndarray, " rows"]]


def read_protocol(data: bytes) -> Protocol:
    """Reads `cuhk03_new_protocol_config_*.mat`.

    Raises:
      DataError: it is no such file.
    """
    fields = {records.TRAIN: "train_idx", records.QUERY: "query_idx", records.GALLERY: "gallery_idx"}
    content = _read_matlab5(data)
    missing = [name for name in ("filelist", "labels", "camId", *fields.values()) if name not in content]
    if missing:
        raise DataError(f"it has no {', '.join(missing)}")
    try:
        names = [str(name) for name in content["filelist"]]
        with np.errstate(invalid="ignore"):
            pids, camids = (np.asarray(content[name], np.int64) for name in ("labels", "camId"))
            splits = {split: np.asarray(content[name], np.int64) - 1 for split, name in fields.items()}
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"its arrays are of other kinds ({reason(error)})") from error
    if not len(names) == len(pids) == len(camids):
        raise DataError(f"it has {len(names)} names, {len(pids)} labels and {len(camids)} cameras")
    if len(names) and (min(pids.min(), camids.min()) < 0 or max(pids.max(), camids.max()) >= 2**31):
        raise DataError("its labels or cameras are out of range")
    for split, rows in splits.items():
        if len(rows) and (rows.min() < 0 or rows.max() >= len(names)):
            raise DataError(f"its {fields[split]} points outside of the {len(names)} names")
    return Protocol(names, pids, camids, splits)


def _read_matlab5(data: bytes) -> dict[str, Any]:
    """The variables of a MATLAB 5 file, flat: numbers as an array, text, and cells as a list of these.

    Nothing is believed of the sizes that an array claims: it has the entries that its bytes hold.
    Source: MathWorks, MAT-File Format.
    """
    if data[124:128] != b"\x00\x01IM":
        raise DataError("it is no whole MATLAB 5 file")
    variables, total = {}, 0
    try:
        for kind, content in _elements(data[128:]):
            if kind == _COMPRESSED:
                unpacked = zlib.decompressobj().decompress(content, _MAX_PROTOCOL + 1 - total)
                total += len(unpacked)
                if total > _MAX_PROTOCOL:
                    raise DataError(f"it unpacks to more than {_MAX_PROTOCOL:,} bytes")
                kind, content = next(_elements(unpacked))
            if kind == _MATRIX:
                name, value = _array(content)
                variables[name] = value
    except (zlib.error, ValueError, IndexError, KeyError, StopIteration) as error:
        raise DataError(f"it is no whole MATLAB 5 file: {reason(error)}") from error
    return variables


def _array(content: bytes, in_cell: bool = False) -> tuple[str, Any]:
    """Name and value of an array: its flags, dimensions and name, then what it holds."""
    if not content:
        return "", np.zeros(0)
    (_, flags), _, (_, name), *values = _elements(content)
    if flags[0] == _CELL:
        if in_cell:
            raise ValueError("it holds cells in cells")
        value: Any = [_array(cell, in_cell=True)[1] for _, cell in values]
    elif flags[0] == _TEXT:
        value = "".join(part.decode(_ENCODINGS[kind]) for kind, part in values)
    elif flags[0] in _NUMBERS and values:
        value = np.frombuffer(values[0][1], _TYPES[values[0][0]])
    else:
        value = None  # structures and other things that a protocol has not
    return name.decode(), value


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and content of the elements that follow one another."""
    position = 0
    while position < len(data):
        if position + 8 > len(data):
            raise ValueError("it ends within an element")
        kind, size = struct.unpack_from("<II", data, position)
        start, step = position + 8, size
        if kind >> 16:  # small: the size in the upper half, up to four bytes beside it
            kind, size = kind & 0xFFFF, kind >> 16
            start, step = position + 4, 0
        if start + size > len(data):
            raise ValueError("it ends within an element")
        yield kind, data[start : start + size]
        # Elements begin at multiples of eight bytes, except after compressed ones.
        position += 8 + (step if kind == _COMPRESSED else -(-step // 8) * 8)
