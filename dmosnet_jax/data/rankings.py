"""Files that order the images of a data set, best first: score files of ours, and lists of names from anywhere.

A score file is an `.npz` of `scores` float32 [N], one for each record in the order of the TFRecord shards, and
`identity`, a fingerprint of the data set. A list of names is a text file (one a line), the same gzipped, an `.npz` or
`.npy` of strings, or a pickle, which is read as data: nothing in it is ever run.
"""

import gzip
import hashlib
import io
import os
import pathlib
import zlib
from collections.abc import Iterable, Sequence
from typing import IO, Any

import numpy as np
from jaxtyping import Float, Float32, Int64

from dmosnet_jax.core import arguments, files
from dmosnet_jax.core.errors import DataError, printable
from dmosnet_jax.core.safe_npz import MAX_BYTES, MAX_RATIO, SLACK, read_arrays
from dmosnet_jax.core.safe_pickle import read_plain
from dmosnet_jax.data.splits import Split

# A gzipped text file beyond so many names.
GZIP_FROM = 100_000
_GZIP, _ZIP, _NPY, _PICKLE = b"\x1f\x8b", b"PK\x03\x04", b"\x93NUMPY", b"\x80"
# How lists and dicts begin in protocols 0 and 1, which have no mark of their own.
_OLD_PICKLES = (b"(lp0\n", b"(lp1\n", b"(dp0\n", b"(dp1\n", b"]q\x00", b"}q\x00")
_PICKLE_SUFFIXES = (".pkl", ".pickle", ".p")
_FIX = "give a score file of the cfs recipe, or a list of names (text, .txt.gz, .npz or .pkl)"


def identity(split: Split) -> str:
    """A fingerprint of a split's records and their order, without reading them.

    It is made of the lengths in bytes, identities and cameras of all records, so it does not depend on how they are cut
    into shards.
    """
    digest = hashlib.sha256(f"{split.name}\n{split.split}\n{len(split.pids)}\n".encode())
    for column in (np.asarray(split.source.lengths, "<i8"), split.pids.astype("<i4"), split.camids.astype("<i4")):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def write_scores(file: IO[bytes], scores: Float32[np.ndarray, " n"], split: Split) -> None:
    """Writes the score file of a split's records; higher scores are better.

    Raises:
        DataError: they are not one finite number for each record.
    """
    scores = arguments.numbers("scores", scores, shape="images")
    if scores.shape != split.pids.shape or not np.isfinite(scores).all():
        raise DataError(f"scores {scores.shape} of {split.name} {split.split} are not {len(split):,} finite numbers")
    of = {"identity": identity(split), "dataset": split.name, "split": split.split}
    np.savez(file, scores=scores.astype(np.float32), **of)  # type: ignore[arg-type]


def write_names(path: str | os.PathLike[str], names: Iterable[str], *, compress: bool) -> None:
    """Writes names as UTF-8 text, one a line; compressed files of equal names are equal."""
    with open(path, "wb") as raw:
        # Neither time nor name goes into the header.
        packed = gzip.GzipFile("", "wb", 6, raw, mtime=0) if compress else None
        file: Any = packed or raw
        buffered = io.BufferedWriter(file, 1 << 20)
        for name in names:
            buffered.write(name.replace("\r", " ").replace("\n", " ").encode() + b"\n")
        buffered.flush()
        if packed is not None:
            packed.close()


def order(scores: Float[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Rows, best first; equal scores keep the order of the records."""
    return np.argsort(-arguments.numbers("scores", scores, shape="images"), kind="stable")


def read_ranking(path: str | os.PathLike[str], split: Split) -> Int64[np.ndarray, " n"] | list[str]:
    """Reads a score file or a list of names.

    Args:
        path: the file; its kind is told by its first bytes, a pickle's also by its suffix.
        split: the data set that is to be ordered.

    Returns:
        Of a score file the rows, best first; of a list its names.

    Raises:
        DataError: the file can't be read, is damaged or refused, or is a score file of another data set.
    """
    where = files.tidy(path)
    try:
        with files.open_stream(where) as file:
            start = file.read(512)
    except OSError as error:
        raise DataError(f"{where}: can't be read ({error.strerror}): {_FIX}") from error
    found = None if start.startswith(_GZIP) else files.foreign(start)
    if found:
        raise DataError(f"{where}: {found}")
    suffixes = pathlib.Path(where).suffixes
    if start.startswith(_PICKLE) or (suffixes and suffixes[-1].lower() in _PICKLE_SUFFIXES):
        return _names(read_plain(where), where)
    if start.startswith((_ZIP, _NPY)):
        return _from_arrays(read_arrays(where, max_bytes=MAX_BYTES, fix=_FIX), where, split)
    return _from_text(_unzipped(where) if start.startswith(_GZIP) else files.read(where), where)


def _from_arrays(arrays: dict[str, np.ndarray], where: str, split: Split) -> np.ndarray | list[str]:
    if {"scores", "identity"} <= arrays.keys():
        return order(_own_scores(arrays, where, split))
    texts = {name: array for name, array in arrays.items() if array.ndim == 1 and array.dtype.kind in "US"}
    chosen = texts.get("names", next(iter(texts.values())) if len(texts) == 1 else None)
    if chosen is None:
        held = ", ".join(f"{printable(name, 40)} {array.dtype}{list(array.shape)}" for name, array in arrays.items())
        raise DataError(f"{where}: holds no vector of strings called `names` ({held}): {_FIX}")
    return _names(chosen.tolist(), where)


def _own_scores(arrays: dict[str, np.ndarray], where: str, split: Split) -> np.ndarray:
    scores = arrays["scores"]
    if str(arrays["identity"]) != identity(split):
        of = f"{printable(arrays.get('dataset', '?'), 40)} {printable(arrays.get('split', '?'), 40)}"
        raise DataError(
            f"{where}: these are the scores of the {scores.size:,} images of {of} in another conversion or another "
            f"data set, not of the {len(split.pids):,} images of {split.name} {split.split}: score these with the cfs "
            "recipe, or give the list of names"
        )
    if scores.shape != split.pids.shape or scores.dtype != np.float32 or not np.isfinite(scores).all():
        raise DataError(f"{where}: damaged: its scores are not {len(split.pids):,} finite numbers: {_FIX}")
    return scores


def read_scores(path: str | os.PathLike[str], split: Split) -> Float32[np.ndarray, " n"]:
    """The scores of a score file.

    Raises:
        DataError: it is damaged, or of another data set.
    """
    where = os.fspath(path)
    arrays = read_arrays(where, max_bytes=MAX_BYTES, fix=_FIX)
    if not {"scores", "identity"} <= arrays.keys():
        raise DataError(f"{where}: is not a score file: {_FIX}")
    return _own_scores(arrays, where, split)


def _unzipped(where: str) -> bytes:
    content = io.BytesIO()
    try:
        most = min(MAX_BYTES, SLACK + MAX_RATIO * files.size(where))
        with files.open_stream(where) as packed, gzip.open(packed) as file:
            while (chunk := file.read(1 << 20)) and content.tell() <= most:
                content.write(chunk)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{where}: damaged ({printable(error)}); copy or download the file again") from error
    if content.tell() > most:
        raise DataError(f"{where}: unpacks to more than {most:,} bytes: {_FIX}")
    return content.getvalue()


def _from_text(content: bytes, where: str) -> list[str]:
    if content.startswith(_OLD_PICKLES):
        raise DataError(f"{where}: looks like a pickle: give it the suffix .pkl, or {_FIX}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is neither UTF-8 text nor of another known kind: {_FIX}") from error
    if "\0" in text:
        raise DataError(f"{where}: is not a text file: {_FIX}")
    # A tab ends the name; a score may follow.
    return _names([name for line in text.split("\n") if (name := line.split("\t")[0].strip())], where)


def _names(value: Any, where: str) -> list[str]:
    """Names from what a file held: a sequence of names, or of tuples that begin with one."""
    if isinstance(value, dict):
        value = value.get("names", value.get("keys"))
    if not isinstance(value, list | tuple):
        raise DataError(f"{where}: holds no list of names: {_FIX}")
    names = [_name(entry) for entry in value]
    wrong = next((row for row, name in enumerate(names) if not name), None)
    if wrong is not None:
        raise DataError(f"{where}: entry {wrong} ({printable(value[wrong], 60)}) is not a name: {_FIX}")
    if not names:
        raise DataError(f"{where}: names no image: {_FIX}")
    return [name for name in names if name]


def _name(entry: Any) -> str | None:
    if isinstance(entry, Sequence) and not isinstance(entry, str | bytes) and entry:
        entry = entry[0]
    if isinstance(entry, bytes):
        try:
            return entry.decode()
        except UnicodeDecodeError:
            return None
    return entry if isinstance(entry, str) else None
