"""What the builders of all data sets share: the record schema, the check of every image, and the writing."""

import abc
import concurrent.futures
import dataclasses
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from data_prep.raw import RawFiles, open_raw
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import records, transforms

_CHUNK = 64


class Item(NamedTuple):
    """One image to convert: its path relative to the root of the raw data set, identity and camera."""

    filename: str
    pid: int
    camid: int


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a raw data set holds.

    Attributes:
      splits: the images of each split, in the order of the records.
      junk: images left out because their identity is -1.
    """

    splits: dict[str, list[Item]]
    junk: int = 0


class Official(NamedTuple):
    """Published size of a split; identities without distractors."""

    images: int
    ids: int


class ReidBuilder(tfds.core.GeneratorBasedBuilder):
    """Base of the builders. Images keep their encoded bytes and the order of their listing.

    Every image is decoded before the first one is written: a damaged one stops the conversion.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "Original bytes, identity, camera and file name of every image."}
    DESCRIPTION: ClassVar[str]
    HOMEPAGE: ClassVar[str | None] = None
    CITATION: ClassVar[str | None] = None
    ENCODING: ClassVar[str] = "jpeg"
    FOLDERS: ClassVar[Sequence[str]]
    OFFICIAL: ClassVar[dict[str, Official]] = {}

    def __init__(self, *, source: str | os.PathLike[str] | None = None, **kwargs: Any):
        """Prepares to build, or to read what was built.

        Args:
          source: folder or zip file of the raw data set; needed to build.
          **kwargs: see `tfds.core.DatasetBuilder`.
        """
        self._source = source
        self._scanned: tuple[RawFiles, Listing] | None = None
        super().__init__(**kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"source": self._source}

    @classmethod
    @abc.abstractmethod
    def scan(cls, names: Sequence[str]) -> Listing:
        """Sorts the files of the raw data set into splits.

        Args:
          names: paths relative to the root.

        Raises:
          DataError: a file does not belong to such a data set.
        """

    @property
    def listing(self) -> Listing:
        """What the raw data set holds.

        Raises:
          DataError: it is missing, or not laid out as this data set is.
        """
        return self._open()[1]

    def differences(self) -> list[str]:
        """How the raw data set differs from the published one, one sentence for each number."""
        found = {split: (len(items), count_ids(items)) for split, items in self.listing.splits.items()}
        return [
            f"{split} has {count:,} {what}, the published data set {official:,}"
            for split, numbers in self.OFFICIAL.items()
            for what, count, official in zip(("images", "identities"), found[split], numbers, strict=True)
            if count != official
        ]

    def _open(self) -> tuple[RawFiles, Listing]:
        if self._scanned is None:
            if self._source is None:
                raise DataError(
                    f"{self.name} is built from what its authors give out: pass its folder or zip as source"
                )
            files = open_raw(self._source, self.FOLDERS)
            listing = self.scan(files.names)
            empty = [split for split, items in listing.splits.items() if not items]
            if empty:
                raise DataError(f"source {files.location} has no image for {', '.join(empty)}: copy the data set again")
            self._scanned = files, listing
        return self._scanned

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            records.IMAGE: tfds.features.Image(shape=(None, None, 3), encoding_format=self.ENCODING),
            records.PID: np.int64,
            records.CAMID: np.int64,
            records.FILENAME: tfds.features.Text(),
        }
        return _LocalInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict(features),
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            # Records in the order of the files: row numbers mean the same for everybody who converts.
            disable_shuffling=True,
        )

    def _example_writer(self) -> tfds.core.ExampleWriter:
        return _RepeatableWriter(self.info.file_format)

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # Nothing is downloaded.
        files, listing = self._open()
        check_images(files, [item.filename for items in listing.splits.values() for item in items])
        total = sum(map(len, listing.splits.values()))
        bar = tqdm(total=total, desc="writing", unit=" images", disable=None, leave=False)
        return {split: self._generate_examples(files, items, bar) for split, items in listing.splits.items()}

    def _generate_examples(
        self, files: RawFiles, items: Iterable[Item], bar: tqdm
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for row, item in enumerate(items):
            try:
                image = files.read(item.filename)
            except DataError as error:
                raise DataError(f"{item.filename} in {files.location} cannot be read any more: {error}") from error
            yield (
                row,
                {
                    # Given as a file, the image is stored as it is; an array would be encoded again.
                    records.IMAGE: io.BytesIO(image),
                    records.PID: item.pid,
                    records.CAMID: item.camid,
                    records.FILENAME: item.filename,
                },
            )
            bar.update()


class _LocalInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Does not look for these data sets in Google's bucket, for which a temporary folder would be made and left."""


class _RepeatableWriter(tfds.core.ExampleWriter):
    """Writes the features of a record in one order; protobuf's own differs from process to process."""

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        """See the base class."""
        parse = tf_example_pb2.Example.FromString
        return super().write(path, ((key, parse(raw).SerializeToString(deterministic=True)) for key, raw in examples))


def count_ids(items: Iterable[Item]) -> int:
    """Number of identities, distractors (0) and unlabelled images (-1) not counted."""
    return len({item.pid for item in items} - {0, -1})


def check_images(files: RawFiles, names: Sequence[str]) -> None:
    """Reads and decodes every image, in threads.

    Raises:
      DataError: some cannot be; the message lists each of them with the reason.
    """
    chunks = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    bad: list[str] = []
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    try:
        with tqdm(total=len(names), desc="checking", unit=" images", disable=None, leave=False) as bar:
            for chunk, problems in zip(chunks, pool.map(lambda chunk: _problems(files, chunk), chunks), strict=True):
                bad += problems
                bar.update(len(chunk))
    finally:
        # Leaving by Ctrl-C must not wait for the rest.
        pool.shutdown(cancel_futures=True)
    if bad:
        raise DataError(
            f"{len(bad)} of {len(names)} images in {files.location} cannot be read; copy them again: {'; '.join(bad)}"
        )


def _problems(files: RawFiles, names: Sequence[str]) -> list[str]:
    problems = []
    for name in names:
        try:
            transforms.decode(files.read(name))
        except DataError as error:
            problems.append(f"{name} ({error})")
    return problems
