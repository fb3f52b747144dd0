"""One pass of feature extraction over all training images, resumed where it was interrupted.

Large data sets are extracted in parts, each written whole or not at all to `feature_parts/` in the workdir. A part
belongs to the exact weights, images and settings it was made from; parts of others are removed.
"""

import contextlib
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.core.parallel import from_first, print_once
from dmosnet_jax.core.safe_npz import read_arrays
from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.data.loading import ImageCache
from dmosnet_jax.data.splits import Rows, Subset
from dmosnet_jax.evaluation.extract import Extractor

FOLDER = "feature_parts"
PART = 65_536
# Parts, complete or left unfinished by a killed writer; nothing else in the folder is ever touched.
_NAME = re.compile(r"\.?[0-9a-f]{16}-\d{9}\.npy.*")


def extract(
    extractor: Extractor,
    params: Any,
    stats: Any,
    split: Rows,
    workdir: pathlib.Path,
    *,
    cache: ImageCache | None = None,
    part: int = PART,
    label: str = "memory",
    about: str = "",
) -> Iterator[tuple[int, np.ndarray]]:
    """Unit features of all images, piece by piece, so that a process need not keep those of other processes' devices.

    Args:
        extractor: compiled forward pass.
        params: parameter tree.
        stats: batch statistics tree.
        split: the images.
        workdir: where parts are kept; process 0 writes and reads them.
        cache: decoded images; a set that has one is extracted at once.
        part: images between two writes. A set of no more is extracted at once.
        label: of the progress bar.
        about: what else decides the features, such as the image size and the pixel statistics.

    Yields:
        The first row of a piece, and float32 [n, E], the same on every process.

    Raises:
        DataError: an image can't be read, or a part can't be written.
    """
    count = len(split.pids)
    if count <= part or cache is not None:
        start = 0
        for features in extractor.batches(params, stats, split, label=label, cache=cache):
            yield start, unit_rows_np(features)
            start += len(features)
        return
    folder, prefix = workdir / FOLDER, _fingerprint(params, stats, split, about)
    _remove_parts(folder, but=prefix)
    known = 0
    for start in range(0, count, part):
        rows = np.arange(start, min(start + part, count))
        path = folder / f"{prefix}-{start:09d}.npy"
        piece = _read_part(path, len(rows))
        if piece is None:
            name = f"{label} {start // part + 1}/{-(-count // part)}"
            piece = unit_rows_np(extractor(params, stats, Subset(split, rows), label=name))
            if jax.process_index() == 0:
                with atomic_write(path) as unfinished, unfinished.open("wb") as file:
                    np.save(file, piece, allow_pickle=False)
        else:
            known += len(rows)
        yield start, piece
    if known:
        print_once(f"{known:,} of {count:,} features were there from an interrupted pass")


def clear(workdir: pathlib.Path) -> None:
    """Removes the parts, once a checkpoint holds the memory that they filled."""
    _remove_parts(workdir / FOLDER)
    if jax.process_index() == 0:
        # Not where somebody keeps something else in it.
        with contextlib.suppress(OSError):
            (workdir / FOLDER).rmdir()


def _remove_parts(folder: pathlib.Path, *, but: str | None = None) -> None:
    """Removes the parts, on process 0, but for those of one fingerprint."""
    if jax.process_index() == 0 and folder.is_dir():
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                if _NAME.fullmatch(path.name) and not (but and path.name.startswith(but)):
                    path.unlink(missing_ok=True)


def _read_part(path: pathlib.Path, count: int) -> np.ndarray | None:
    """A part of `count` images, read by process 0 for every process; None where there is none, or a damaged one."""
    piece = None
    if jax.process_index() == 0:
        with contextlib.suppress(DataError):
            piece = next(iter(read_arrays(path).values()), None)
        if piece is not None and (piece.dtype != np.float32 or piece.ndim != 2 or len(piece) != count):
            piece = None
    width = int(from_first(np.int32(0 if piece is None else piece.shape[1])))
    if not width:
        return None
    return from_first(np.zeros((count, width), np.float32) if piece is None else piece)


def _fingerprint(params: Any, stats: Any, split: Rows, about: str) -> str:
    """A checksum of the weights, of the set of images, and of `about`."""
    update: Callable[[bytes, int], int] = zlib.crc32
    check = update(about.encode(), 0)
    for leaf in jax.tree.leaves((params, stats)):
        check = update(np.ascontiguousarray(leaf).tobytes(), check)
    # File names tell images apart; a few are enough to recognise another set of the same size.
    sample = np.linspace(0, len(split.pids) - 1, min(len(split.pids), 64)).astype(int)
    names = "\n".join(split.filenames(sample.tolist()))
    return f"{check:08x}{update(names.encode(), len(split.pids) & 0xFFFFFFFF):08x}"
