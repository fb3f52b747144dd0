"""What the builders of all data sets share: the record schema, the check of every image, and the writing."""

import abc
import concurrent.futures
import dataclasses
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from data_prep.raw import RawFiles, open_raw, some
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
      details: what else a user may want to know later, e.g. the layout found; kept as `metadata.json`.
      notes: what a user should look at, one sentence each.
    """

    splits: dict[str, list[Item]]
    junk: int = 0
    details: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Official(NamedTuple):
    """Published size of a split; identities without distractors, None where not published."""

    images: int
    ids: int | None


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
    OFFICIAL: ClassVar[dict[str, Official]] = {}
    # Whether identity -1 means junk and 0 a distractor, as in Market-1501; elsewhere 0 may be a person.
    RESERVED_IDS: ClassVar[bool] = False
    # Whether the same number means the same person in training and test set.
    COMMON_IDS: ClassVar[bool] = True
    # Options of `read_source`, with their defaults.
    OPTIONS: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        *,
        source: str | os.PathLike[str] | None = None,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        """Prepares to build, or to read what was built.

        Args:
          source: folder or file of the raw data set; needed to build.
          options: values for some of `OPTIONS`.
          **kwargs: see `tfds.core.DatasetBuilder`.
        """
        self._source = source
        self._options = dict(options or {})
        self._scanned: tuple[RawFiles, Listing] | None = None
        super().__init__(**kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"source": self._source, "options": self._options}

    @classmethod
    @abc.abstractmethod
    def read_source(cls, source: str | os.PathLike[str], **options: Any) -> tuple[RawFiles, Listing]:
        """Opens the raw data set and sorts its images into splits.

        Args:
          source: what the user downloaded.
          **options: values for some of `OPTIONS`.

        Returns:
          The files, and what they are.

        Raises:
          DataError: it is missing, or not laid out as this data set is.
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
        found = {
            split: (len(items), count_ids((item.pid for item in items), reserved=self.RESERVED_IDS))
            for split, items in self.listing.splits.items()
        }
        return differences(found, self.OFFICIAL)

    def _open(self) -> tuple[RawFiles, Listing]:
        if self._scanned is None:
            if self._source is None:
                raise DataError(
                    f"{self.name} is built from what its authors give out: pass its folder or zip as source"
                )
            files, listing = self.read_source(self._source, **self._options)
            check_names(files.location, listing)
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
            metadata=tfds.core.MetadataDict(),
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
        self.info.metadata.update(listing.details, **({"junk": str(listing.junk)} if self.RESERVED_IDS else {}))
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


class FoldersBuilder(ReidBuilder):
    """Base of the builders of data sets whose images lie in a few folders and are described by their names."""

    FOLDERS: ClassVar[Sequence[str]]

    @classmethod
    @abc.abstractmethod
    def scan(cls, names: Sequence[str]) -> Listing:
        """Sorts the files of the raw data set into splits.

        Args:
          names: paths relative to the root.

        Raises:
          DataError: a file does not belong to such a data set.
        """

    @classmethod
    def read_source(cls, source: str | os.PathLike[str], **options: Any) -> tuple[RawFiles, Listing]:
        """See the base class."""
        files = open_raw(source, cls.FOLDERS)
        return files, cls.scan(files.names)


def count_ids(pids: Iterable[int], *, reserved: bool) -> int:
    """Number of identities; unlabelled images (-1) and, where `reserved`, distractors (0) are not counted."""
    return len(set(pids) - ({0, -1} if reserved else {-1}))


def differences(found: Mapping[str, tuple[int, int]], official: Mapping[str, Official]) -> list[str]:
    """How numbers of images and identities differ from the published ones, one sentence for each number."""
    return [
        f"{split} has {count:,} {what}, the published data set {published:,}"
        for split, numbers in official.items()
        if split in found
        for what, count, published in zip(("images", "identities"), found[split], numbers, strict=True)
        if published is not None and count != published
    ]


def check_names(location: str, listing: Listing) -> None:
    """Refuses file names that no record can hold.

    Raises:
      DataError: some are not UTF-8 text; names them.
    """
    # Python keeps such bytes as surrogates, which nothing encodes.
    found = (item.filename for items in listing.splits.values() for item in items)
    odd = [name for name in found if any("\ud800" <= letter <= "\udfff" for letter in name)]
    if odd:
        shown = some([name.encode(errors="backslashreplace").decode() for name in odd])
        raise DataError(f"source {location}: {len(odd)} file names are not UTF-8 text: rename the files: {shown}")


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
