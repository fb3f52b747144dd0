"""Splits of converted data sets, parts of them and unions: sequences of records with their identities and cameras.

A data set is `DIR/<dataset>/<version>/<dataset>-<split>.tfrecord-XXXXX-of-NNNNN`. Everything here has `len` and gives a
`Record` by its row, so that Grain reads it as any other source: `grain.MapDataset.source(split).shuffle(0).map(...)`.
"""

import abc
import bisect
import dataclasses
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int, Int32, Integer

from dmosnet_jax.core import arguments, files, safe_json
from dmosnet_jax.core.config import joined
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.files import Path
from dmosnet_jax.data import records
from dmosnet_jax.data.shards import RecordSource, where_index_is

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


class Rows(abc.ABC):
    """A split, a part of one, or several, as training and evaluation see them; pickles for worker processes.

    Attributes:
      name: of the data set.
      split: `train`, `query`, `gallery`, `val` or `trainval`.
      pids: identities, int32 [N]; -1 where unlabelled.
      camids: cameras, int32 [N].
    """

    def __init__(self, name: str, split: str, pids: Int[np.ndarray, " n"], camids: Int[np.ndarray, " n"]):
        self.name, self.split, self.pids, self.camids = name, split, pids, camids

    @abc.abstractmethod
    def record(self, index: int, /) -> records.Record:
        """The image's encoded bytes, identity, camera and file name.

        Raises:
          IndexError: there is no such row.
          DataError: the record is damaged, is not one of this format, or has another identity or camera than the index
            of its shard; names shard, record and byte offset.
        """

    def __len__(self) -> int:
        return len(self.pids)

    def __getitem__(self, index: int) -> records.Record:
        """The record of a row, for Grain and other readers of sequences; batching needs arrays, so `map` it first."""
        return self.record(index)

    @property
    def location(self) -> str:
        """A file or URL that records are in: reads of a remote one are slow, but may wait together."""
        return ""

    def read_many(self, indices: Iterable[int]) -> list[records.Record]:
        """The records of several rows, read concurrently where they are remote; see `record` for errors."""
        return files.concurrently(self.record, map(int, indices), self.location)

    def filenames(self, indices: Iterable[int] | None = None) -> list[str]:
        """File names relative to the raw data set, of some images or of all.

        Raises:
          DataError: as `record`.
        """
        rows = map(int, range(len(self)) if indices is None else indices)
        return files.concurrently(lambda row: self.record(row).filename, rows, self.location)


class Split(Rows):
    """One split of a data set, with the identities and cameras of the raw one.

    Junk images (pid -1 in a labelled data set) were dropped when it was converted; distractors (pid 0) are kept in the
    gallery.

    Attributes:
      source: the serialised records.
    """

    def __init__(self, name: str, split: str, source: RecordSource):
        super().__init__(name, split, source.pids, source.camids)
        self.source = source

    @property
    def location(self) -> str:
        """See `Rows.location`."""
        return self.source.paths[0]

    def record(self, index: int, /) -> records.Record:
        """See `Rows.record`."""
        raw = self.source[index]
        path, number, offset = self.source.locate(index)
        where = f"{path}: record {number} at byte {offset}"
        try:
            record = records.parse(raw)
        except DataError as error:
            raise DataError(f"{where}: {error}; convert the data set again") from error
        for label, own, listed in (("pid", record.pid, self.pids), ("camid", record.camid, self.camids)):
            if own != listed[index]:
                raise DataError(
                    f"{where}: its {label} is {own}, in the index {listed[index]}: remove {where_index_is(path)} (it "
                    "is made again), or convert the data set again"
                )
        return record


class Subset(Rows):
    """Some rows of a split, seen as a split.

    Attributes:
      base: the split.
      rows: its rows, int [n], in the order of the subset.
    """

    def __init__(self, base: Rows, rows: Integer[np.ndarray, " n"]):
        rows = arguments.rows(f"rows of {base.name} {base.split}", rows, len(base))
        super().__init__(base.name, base.split, base.pids[rows], base.camids[rows])
        self.base, self.rows = base, rows

    @property
    def location(self) -> str:
        """See `Rows.location`."""
        return self.base.location

    def record(self, index: int, /) -> records.Record:
        """See `Rows.record`."""
        return self.base.record(int(self.rows[index]))


class JointSplit(Rows):
    """Several splits after each other, seen as one: of several data sets, or two of one data set.

    Of several data sets, identities and cameras are numbered from 0 without gaps, those of each data set after those of
    the ones before it, so that none are shared; negative ones (not known) become -1. File names begin with the data
    set's name.

    Attributes:
      name: names of the data sets, joined by `+`.
      parts: the splits, in order.
      same: they are of one data set, whose identities, cameras and names stay as they are.
    """

    def __init__(self, parts: Sequence[Rows], same: bool = False):
        self.parts, self.same = tuple(parts), same
        if not self.parts:
            raise ConfigError("a union needs one split at least")
        name = self.parts[0].name if same else joined([part.name for part in self.parts])
        combined = np.concatenate if same else _numbered
        pids, camids = (combined([getattr(part, column) for part in self.parts]) for column in ("pids", "camids"))
        super().__init__(name, self.parts[0].split, pids, camids)
        self._firsts = [0, *np.cumsum([len(part) for part in self.parts]).tolist()]

    @property
    def location(self) -> str:
        """See `Rows.location`."""
        return next((part.location for part in self.parts if files.is_remote(part.location)), "")

    def record(self, index: int, /) -> records.Record:
        """See `Rows.record`; with the identity, camera and file name of the union."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number = bisect.bisect_right(self._firsts, index) - 1
        part = self.parts[number]
        found = part.record(int(index) - self._firsts[number])
        if self.same:
            return found
        pid, camid = int(self.pids[index]), int(self.camids[index])
        return dataclasses.replace(found, pid=pid, camid=camid, filename=f"{part.name}/{found.filename}")


def _numbered(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Values of each column numbered after those of the columns before it, int32; negative ones become -1."""
    first = 0
    numbered = []
    for column in columns:
        values, number = np.unique(column, return_inverse=True)
        unknown = int(np.count_nonzero(values < 0))
        numbered.append(np.where(column < 0, -1, number - unknown + first))
        first += len(values) - unknown
    return np.concatenate(numbered).astype(np.int32)


def load_split(data_dir: Path, dataset: str, split: str) -> Split:
    """Opens a split of a converted data set, in its highest version.

    Args:
      data_dir: the folder or URL given to the conversion as `--data_dir`.
      dataset: name of the data set.
      split: one of `split_names`.

    Raises:
      ConfigError: the name cannot be one of a data set.
      DataError: the data set is not there (the message gives the command that converts it), has no such split, or a
        shard is missing, cut short or damaged.
    """
    folder = _version_folder(files.tidy(data_dir), dataset)
    lengths = _shard_lengths(folder)
    if split not in lengths:
        info = files.join(folder, records.INFO_FILE)
        raise DataError(f"{info}: there is no split {split!r}, there are {', '.join(sorted(lengths))}")
    shards = len(lengths[split])
    names = [records.shard_name(dataset, split, shard, shards) for shard in range(shards)]
    return Split(dataset, split, RecordSource([files.join(folder, name) for name in names], lengths[split]))


def split_names(data_dir: Path, dataset: str) -> list[str]:
    """Names of the splits that a converted data set has; raises as `load_split`."""
    return sorted(_shard_lengths(_version_folder(files.tidy(data_dir), dataset)))


def relabel(pids: Int[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
    """Numbers identities from 0 without gaps, in ascending order of identity; DataError where they are no numbers."""
    return np.unique(arguments.integers("relabel: pids", pids), return_inverse=True)[1].astype(np.int32)


def conversion_command(dataset: str, data_dir: Path) -> str:
    """The command that makes a data set, for messages."""
    return f"python -m data_prep.convert --dataset={dataset} --source=PATH --data_dir={os.fspath(data_dir)}"


def _version_folder(data_dir: str, dataset: str) -> str:
    if not isinstance(dataset, str) or not _NAME.fullmatch(dataset):
        raise ConfigError(f"dataset={dataset!r} is not a name: use lower-case letters, digits and underscores")
    root = files.join(data_dir, dataset)
    try:
        found = [(entry.name, match) for entry in files.entries(root) if (match := _VERSION.fullmatch(entry.name))]
        # A folder without its description is a conversion that did not finish.
        versions = [
            (tuple(map(int, match.groups())), folder)
            for name, match in found
            if files.is_file(files.join(folder := files.join(root, name), records.INFO_FILE))
        ]
    except OSError as error:
        if files.is_remote(root) and not isinstance(error, FileNotFoundError):
            raise DataError(f"{root}: cannot be read ({error.strerror}): check the name and the credentials") from error
        versions = []
    if not versions:
        raise DataError(f"no data set {dataset} in {data_dir}: make it with {conversion_command(dataset, data_dir)}")
    return max(versions)[1]


def _shard_lengths(folder: str) -> dict[str, list[int]]:
    """Records per shard of every split, as the conversion wrote them down."""
    info, fix = files.join(folder, records.INFO_FILE), "convert the data set again"
    try:
        description = safe_json.read_object(info, fix=fix)
        lengths = {str(entry["name"]): [int(n) for n in entry["shardLengths"]] for entry in description["splits"]}
        file_format = description["fileFormat"]
    except FileNotFoundError as error:
        raise DataError(f"{info}: cannot be read ({error.strerror}): {fix}") from error
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"{info}: is damaged, or of another kind: {fix}") from error
    if not all(_NAME.fullmatch(name) for name in lengths):
        raise DataError(f"{info}: is damaged, or of another kind: {fix}")
    if file_format != records.FILE_FORMAT:
        raise DataError(f"{info}: the data are {file_format!r} files instead of {records.FILE_FORMAT!r}: {fix}")
    return lengths
