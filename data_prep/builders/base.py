"""What the builders of all data sets share: the features of a record, the check of every image, and the writing."""

import abc
import dataclasses
import io
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from data_prep.check.images import Contents, Part, inspect
from data_prep.check.rules import Finding, Rules, check, check_splits
from data_prep.sources.base import Files, some
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import records


class Item(NamedTuple):
    """One image to convert: its path relative to the root of the raw data set, identity and camera."""

    filename: str
    pid: int
    camid: int


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a raw data set holds.

    Attributes:
      splits: the images of each split that has some, in the order of the records.
      junk: images left out because their identity is -1.
      details: kept as `metadata.json`, e.g. the layout found.
      notes: warnings, one sentence each.
      known: files that are no images of a split and are accounted for: junk, lists, tables.
    """

    splits: dict[str, list[Item]]
    junk: int = 0
    details: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    known: frozenset[str] = frozenset()

    def parts(self, files: Files) -> list[Part]:
        """The splits as the checks want them."""
        return [_part(split, items, files) for split, items in self.splits.items()]


class ReidBuilder(tfds.core.GeneratorBasedBuilder):
    """Base of the builders. Images keep their encoded bytes and the order of their listing.

    Every image is decoded before the first one is written: a damaged one stops the conversion.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "Original bytes, identity, camera and file name of every image."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "manual_dir is the folder that the authors of the data set give out, "
        "or a folder that holds their zip file and nothing else."
    )
    DESCRIPTION: ClassVar[str]
    HOMEPAGE: ClassVar[str | None] = None
    CITATION: ClassVar[str | None] = None
    ENCODING: ClassVar[str] = "jpeg"
    RULES: ClassVar[Rules] = Rules()
    # Whether all files of a source belong to the data set; of published ones, those in its folders do.
    IS_WHOLE: ClassVar[bool] = False
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
          source: folder or file of the raw data set; where it is not given, it is TensorFlow Datasets' `manual_dir`.
          options: values for some of `OPTIONS`.
          **kwargs: see `tfds.core.DatasetBuilder`.
        """
        self._source = source
        self._options = dict(options or {})
        self._opened: tuple[Files, Listing] | None = None
        self._contents: dict[str, Contents] | None = None
        super().__init__(**kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"source": self._source, "options": self._options}

    @classmethod
    @abc.abstractmethod
    def read_source(cls, source: str | os.PathLike[str], **options: Any) -> tuple[Files, Listing]:
        """Opens the raw data set and sorts its images into splits; `options` are some of `OPTIONS`.

        Raises:
          DataError: it is missing, or not laid out as this data set is.
        """

    def open(self, manual_dir: pathlib.Path | None = None) -> tuple[Files, Listing]:
        """Opens `manual_dir` or else the source, at the first call; see `read_source`.

        Raises:
          DataError: there is none, it is not laid out as this data set is, or it has only a half of a test set.
        """
        if self._opened is None:
            source = self._source if manual_dir is None else manual_dir
            if source is None:
                raise DataError(
                    f"{self.name} is built from what its authors give out: give its folder or zip as source"
                )
            files, listing = self.read_source(source, **self._options)
            check_listing(files, listing)
            for finding in check_splits(listing.splits):
                if finding.is_error:
                    raise DataError(f"source {files.location}: {finding.text}")
            self._opened = files, listing
        return self._opened

    def findings(self) -> list[Finding]:
        """Findings that need no image to be read."""
        files, listing = self.open()
        notes = [*listing.notes, *left_out(files, listing, is_whole=self.IS_WHOLE, within=True)]
        return [*check(listing.parts(files), {}, self.RULES), *(Finding(False, note) for note in notes)]

    def image_findings(self) -> list[Finding]:
        """What `findings` cannot know: findings about the images that were read while the data set was built."""
        files, listing = self.open()
        if self._contents is None:
            return []
        parts = listing.parts(files)
        known = set(check(parts, {}, self.RULES))
        return [finding for finding in check(parts, self._contents, self.RULES) if finding not in known]

    def remarks(self) -> tuple[str, ...]:
        """Facts that are no findings: the files beside the data set that are not part of it."""
        files, listing = self.open()
        return tuple(left_out(files, listing, is_whole=self.IS_WHOLE, within=False))

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
            supervised_keys=(records.IMAGE, records.PID),
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            metadata=tfds.core.MetadataDict(),
            # Records stay in the order of the files, so that a row number means the same image for everybody.
            disable_shuffling=True,
        )

    def _example_writer(self) -> tfds.core.ExampleWriter:
        return _RepeatableWriter(self.info.file_format)

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        files, listing = self.open(_zip_or_folder(dl_manager.manual_dir) if self._source is None else None)
        junk = {"junk": str(listing.junk)} if self.RULES.reserved_ids else {}
        self.info.metadata.update(listing.details, **junk)
        self._contents = check_images(files, listing)
        total = sum(map(len, listing.splits.values()))
        bar = tqdm(total=total, desc="writing", unit=" images", disable=None, leave=False)
        return {split: self._generate_examples(files, items, bar) for split, items in listing.splits.items()}

    def _generate_examples(
        self, files: Files, items: Iterable[Item], bar: tqdm
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
        """Does nothing: these data sets are not in Google's bucket, and looking there leaves a temporary folder."""


class _RepeatableWriter(tfds.core.ExampleWriter):
    """Writes the features of a record in a fixed order; protobuf's own differs from process to process."""

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        """See the base class."""
        parse = tf_example_pb2.Example.FromString
        return super().write(path, ((key, parse(raw).SerializeToString(deterministic=True)) for key, raw in examples))


def _zip_or_folder(manual_dir: Any) -> pathlib.Path:
    """The zip that is all that a folder holds, or the folder."""
    inside = list(pathlib.Path(manual_dir).iterdir())
    return inside[0] if len(inside) == 1 and inside[0].suffix == ".zip" else pathlib.Path(manual_dir)


def _part(split: str, items: list[Item], files: Files) -> Part:
    return Part(
        split=split,
        pids=np.array([item.pid for item in items], np.int64),
        camids=np.array([item.camid for item in items], np.int64),
        name=lambda row: items[row].filename,
        read=lambda row: files.read(items[row].filename),
    )


def check_listing(files: Files, listing: Listing) -> None:
    """Refuses a source without images, and file names that no record can hold.

    Raises:
      DataError: there are none, or names are not UTF-8 text.
    """
    found = [item.filename for items in listing.splits.values() for item in items]
    if not found:
        raise DataError(f"source {files.location} has no image to train or to evaluate on: copy the data set again")
    # Python keeps such bytes as surrogates, which nothing encodes.
    odd = [name for name in found if any("\ud800" <= letter <= "\udfff" for letter in name)]
    if odd:
        raise DataError(
            f"source {files.location}: {len(odd)} file names are not UTF-8 text: rename the files: {some(odd)}"
        )


def left_out(files: Files, listing: Listing, *, is_whole: bool, within: bool) -> list[str]:
    """A sentence about the files of a source that are no part of the data set; none where there are no such.

    Args:
      files: the source.
      listing: what of it is used.
      is_whole: whether all of its files belong to the data set.
      within: of those in the folders of the data set, which should be part of it; else of those beside it.
    """
    used = {item.filename for items in listing.splits.values() for item in items} | listing.known
    tops = {name.split("/")[0] for name in used}
    groups: dict[str, list[str]] = {}
    for name in files.names:
        if name not in used and (is_whole or name.split("/")[0] in tops) == within:
            folder, _, file = name.rpartition("/")
            groups.setdefault(folder.split("/")[0] if folder else file, []).append(name)
    if not groups:
        return []
    total = sum(map(len, groups.values()))
    named = [
        group if names == [group] else f"{len(names):,} in {group} (e.g. {names[0]})" for group, names in groups.items()
    ]
    where = "in the folders of the data set are left out" if within else "are no part of the data set and left out"
    return [f"{total:,} files {where}: {some(named, 8)}"]


def check_images(files: Files, listing: Listing) -> dict[str, Contents]:
    """Reads and decodes every image, and returns what they are.

    Raises:
      DataError: some cannot be; the message lists them with the reasons.
    """
    parts = listing.parts(files)
    contents = inspect(parts)
    bad = [f"{part.name(row)} ({why})" for part in parts for row, why in sorted(contents[part.split].problems.items())]
    if bad:
        total = sum(map(len, parts))
        raise DataError(
            f"{len(bad)} of {total} images in {files.location} cannot be read; copy them again: {some(bad)}"
        )
    return contents
