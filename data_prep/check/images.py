"""Reads every image of a data set once: its content, its size, and whether it can be decoded."""

import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt64
from tqdm import tqdm

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import transforms

_CHUNK = 128


class OtherLabelsError(DataError):
    """A record whose labels are not those of the index."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One split of a data set, raw or converted.

    Attributes:
      split: its name.
      pids: identities; -1 where unlabelled.
      camids: cameras.
      name: file name of a row.
      read: encoded image of a row; raises `DataError`, of a converted data set also `OtherLabelsError`.
    """

    split: str
    pids: Int[np.ndarray, " n"]
    camids: Int[np.ndarray, " n"]
    name: Callable[[int], str]
    read: Callable[[int], bytes]

    def __len__(self) -> int:
        return len(self.pids)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What the images of a split are.

    Attributes:
      digests: of the encoded bytes; 0 where they cannot be read.
      heights: in pixels of the image as training decodes it, 0 where it cannot be.
      widths: likewise.
      sizes: in bytes.
      problems: why images cannot be used, by row.
      other_labels: where labels differ from the index, by row: shard, record and both values.
    """

    digests: UInt64[np.ndarray, " n"]
    heights: Int32[np.ndarray, " n"]
    widths: Int32[np.ndarray, " n"]
    sizes: Int64[np.ndarray, " n"]
    problems: dict[int, str]
    other_labels: dict[int, str] = dataclasses.field(default_factory=dict)


def inspect(parts: Sequence[Part]) -> dict[str, Contents]:
    """Reads and decodes all images of some splits, in threads; by name of the split."""
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    try:
        with tqdm(total=sum(map(len, parts)), desc="reading", unit=" images", disable=None, leave=False) as bar:
            return {part.split: _inspect(part, pool, bar) for part in parts}
    finally:
        # After Ctrl-C, the remaining images are not read.
        pool.shutdown(cancel_futures=True)


def _inspect(part: Part, pool: concurrent.futures.Executor, bar: tqdm) -> Contents:
    n = len(part)
    contents = Contents(
        digests=np.zeros(n, np.uint64),
        heights=np.zeros(n, np.int32),
        widths=np.zeros(n, np.int32),
        sizes=np.zeros(n, np.int64),
        problems={},
    )

    def look(start: int) -> int:
        stop = min(start + _CHUNK, n)
        for row in range(start, stop):
            try:
                data = part.read(row)
                contents.sizes[row] = len(data)
                contents.digests[row] = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) or 1
                contents.heights[row], contents.widths[row] = transforms.decode(data).shape[:2]
            except OtherLabelsError as error:
                contents.other_labels[row] = str(error)
            except DataError as error:
                contents.problems[row] = str(error)
        return stop - start

    for count in pool.map(look, range(0, n, _CHUNK)):
        bar.update(count)
    return contents


def duplicates(contents: dict[str, Contents]) -> list[list[tuple[str, int]]]:
    """Groups of images of equal content, each image as (split, row), in the order of splits and rows."""
    digests = np.concatenate([np.zeros(0, np.uint64), *(content.digests for content in contents.values())])
    values, counts = np.unique(digests, return_counts=True)
    repeated = set(values[(counts > 1) & (values != 0)].tolist())
    groups: dict[int, list[tuple[str, int]]] = {}
    for split, content in contents.items():
        for row, digest in enumerate(content.digests.tolist()):
            if digest in repeated:
                groups.setdefault(digest, []).append((split, row))
    return list(groups.values())
