"""Splits of a converted data set: `DIR/<dataset>/<version>/<dataset>-<split>.tfrecord-XXXXX-of-NNNNN`."""

import dataclasses
import json
import os
import re
from collections.abc import Iterable

import numpy as np

from dmosnet_jax.core import files
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data import records
from dmosnet_jax.data.sources import INDEX_SUFFIX, Path, RecordSource

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set; pickles for worker processes.

    Junk images (pid -1 in a labelled data set) were dropped when it was converted; distractors (pid 0) are kept in the
    gallery.

    Attributes:
      name: of the data set.
      split: `train`, `query` or `gallery`.
      source: the serialised records.
      pids: identities as in the raw data set, int32 [N]; -1 where unlabelled.
      camids: cameras as in the raw data set, int32 [N].
    """

    name: str
    split: str
    source: RecordSource
    pids: np.ndarray
    camids: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def record(self, index: int, /) -> records.Record:
        """The image's encoded bytes, identity, camera and file name.

        Raises:
          DataError: the record is damaged, is not one of this format, or has another identity or camera than the index
            of its shard; names shard, record and byte offset.
        """
        raw = self.source[index]
        try:
            record = records.parse(raw)
        except DataError as error:
            raise DataError(f"{self.source.where(index)}: {error}; convert the data set again") from error
        for label, own, listed in (("pid", record.pid, self.pids), ("camid", record.camid, self.camids)):
            if own != listed[index]:
                sidecar = self.source.shard(index) + INDEX_SUFFIX
                raise DataError(
                    f"{self.source.where(index)}: its {label} is {own}, in the index {listed[index]}: remove {sidecar} "
                    "(it is made again), or convert the data set again"
                )
        return record

    def filenames(self, indices: Iterable[int] | None = None) -> list[str]:
        """File names relative to the raw data set, of some images or of all.

        Raises:
          DataError: as `record`.
        """
        return [self.record(int(index)).filename for index in (range(len(self)) if indices is None else indices)]


def load_split(data_dir: Path, dataset: str, split: str) -> Split:
    """Opens a split of a converted data set, in its highest version.

    Args:
      data_dir: the folder or URL given to the conversion as `--data_dir`.
      dataset: name of the data set.
      split: `train`, `query` or `gallery`.

    Returns:
      The split.

    Raises:
      ConfigError: the name cannot be one of a data set.
      DataError: the data set is not there (the message gives the command that converts it), has no such split, or a
        shard is missing, cut short or damaged.
    """
    folder = _version_folder(files.tidy(data_dir), dataset)
    lengths = _shard_lengths(files.join(folder, records.INFO_FILE), split)
    names = [records.shard_name(dataset, split, shard, len(lengths)) for shard in range(len(lengths))]
    source = RecordSource([files.join(folder, name) for name in names], lengths)
    return Split(name=dataset, split=split, source=source, pids=source.pids, camids=source.camids)


def split_names(data_dir: Path, dataset: str) -> list[str]:
    """Names of the splits that a converted data set has.

    Raises:
      ConfigError: as `load_split`.
      DataError: as `load_split`.
    """
    folder = _version_folder(files.tidy(data_dir), dataset)
    return sorted(_all_lengths(files.join(folder, records.INFO_FILE)))


def relabel(pids: np.ndarray) -> np.ndarray:
    """Numbers identities from 0 without gaps, in ascending order of identity.

    Args:
      pids: int [N].

    Returns:
      int32 [N], values 0..C-1 for C identities.
    """
    return np.unique(pids, return_inverse=True)[1].astype(np.int32)


def conversion_command(dataset: str, data_dir: Path) -> str:
    """The command that makes a data set, for messages."""
    return f"python -m data_prep.convert --dataset={dataset} --source=PATH --data_dir={os.fspath(data_dir)}"


def _version_folder(data_dir: str, dataset: str) -> str:
    if not _NAME.fullmatch(dataset):
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


def _shard_lengths(info: str, split: str) -> list[int]:
    """Records per shard of a split, as the conversion wrote them down."""
    lengths = _all_lengths(info)
    if split not in lengths:
        raise DataError(f"{info}: there is no split {split!r}, there are {', '.join(sorted(lengths))}")
    return lengths[split]


def _all_lengths(info: str) -> dict[str, list[int]]:
    """Records per shard of every split."""
    fix = "convert the data set again"
    try:
        description = json.loads(files.read(info).decode())
        lengths = {entry["name"]: [int(n) for n in entry["shardLengths"]] for entry in description["splits"]}
        file_format = description["fileFormat"]
    except OSError as error:
        raise DataError(f"{info}: cannot be read ({error.strerror}): {fix}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{info}: is damaged, or of another kind: {fix}") from error
    if file_format != records.FILE_FORMAT:
        raise DataError(f"{info}: the data are {file_format!r} files instead of {records.FILE_FORMAT!r}: {fix}")
    return lengths
