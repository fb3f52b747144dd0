"""LUPerson (Fu et al., CVPR 2021): 4.18 million unlabelled crops, converted shard by shard by Apache Beam.

    python -m data_prep.convert --dataset=luperson --source=LUP --data_dir=data

The split is `train`, identities are -1, and the camera is the number of the video in the source, from 0. The same
command goes on where a conversion was killed. Forms of the source are told in `luperson_source`. Beam runs on all
cores of this machine, or where its options say, given what the runner needs (the source and `data_dir` in a shared
place, this package on its workers):

    --beam_options='--runner=DataflowRunner --project=P --region=R --temp_location=gs://B/tmp --setup_file=./setup.py'
"""

import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from tensorflow_datasets.core import naming
from tqdm import tqdm

from data_prep import luperson_source, shards
from data_prep.builder import Item, Listing, Official, ReidBuilder
from data_prep.raw import RawFiles
from data_prep.shards import Plan, Result
from data_prep.staging import publish, staging, upload
from data_prep.summary import Summary
from dmosnet_jax.core import files as places
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data import records

UNREADABLE_FILE = "unreadable.txt"
NAMES = ("auto", "numbers", "paths")
_MIB = 2**20


class Luperson(ReidBuilder):
    """Builder of `luperson`; `convert` writes what it describes."""

    DESCRIPTION = "LUPerson: unlabelled person crops from 46,260 street videos; identity -1, the camera is the video."
    HOMEPAGE = "https://github.com/DengpanFu/LUPerson"
    CITATION = "Fu et al., Unsupervised Pre-training for Person Re-identification, CVPR 2021"
    OFFICIAL: ClassVar = {records.TRAIN: Official(luperson_source.IMAGES, None)}
    OPTIONS: ClassVar = {"names": "auto", "shard_mib": 256, "beam_options": ""}

    @classmethod
    def read_source(
        cls, source: str | os.PathLike[str], *, names: str = "auto", **options: Any
    ) -> tuple[RawFiles, Listing]:
        """See the base class; `shard_mib` and `beam_options` do not matter here."""
        del options
        found = luperson_source.find(source)
        images = list(found.images())
        numbered = all(image.number for image in images) and _use_numbers(found.kind, len(images), names)
        files = _Files(found, {image.number if numbered else image.ref: image.ref for image in images})
        items = [Item(name, -1, image.video) for name, image in zip(files.names, images, strict=True)]
        return files, Listing({records.TRAIN: items}, details={"layout": found.kind})


class _Files:
    """The images by the names that they get."""

    def __init__(self, source: luperson_source.Source, refs: dict[str | None, str]):
        self.location = source.location
        self.names = [str(name) for name in refs]
        self._refs = refs
        self._source = source
        self._read: Callable[[str], bytes] | None = None

    def read(self, name: str) -> bytes:
        """The content of a file."""
        if self._read is None:
            self._read = luperson_source.reader(self._source.kind, self._source.root)
        return self._read(self._refs[name])


def _use_numbers(kind: str, count: int, names: str) -> bool:
    return names == "numbers" or (names == "auto" and (kind != "tree" or count == luperson_source.IMAGES))


def convert(
    data_dir: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    options: Mapping[str, Any],
    warn: Callable[[str], None],
) -> Summary:
    """Converts LUPerson, or goes on with it; a data set that is there already is replaced at the end.

    Args:
      data_dir: folder or URL for converted data sets.
      source: see `luperson_source`.
      options: values for some of `Luperson.OPTIONS`: `names`, what file names are (see `shards.make_plan`);
        `shard_mib`, size of a shard; `beam_options`.
      warn: called with what a user should know, before images are read.

    Returns:
      What was done.

    Raises:
      ConfigError: options that are none.
      DataError: the source is missing or damaged, more than 0.1% of the images are unreadable, or `data_dir` cannot be
        written.
    """
    begin = time.monotonic()
    settings = dict(Luperson.OPTIONS) | dict(options)
    if settings["names"] not in NAMES:
        raise ConfigError(f"names={settings['names']!r} is unknown: use one of {', '.join(NAMES)}")
    if not 0 < settings["shard_mib"] < math.inf:
        raise ConfigError(f"shard_mib={settings['shard_mib']} must be a number greater than 0")
    # Not before it is needed: Beam takes seconds to import.
    try:
        from data_prep import beam_pipeline
    except ImportError as error:
        raise ConfigError(f"conversion needs more packages ({error}): pip install 'dmosnet_jax[convert]'") from error
    beam_options = beam_pipeline.parse_options(settings["beam_options"])
    found = luperson_source.find(source)
    with tqdm(desc="listing", unit=" images", disable=None, leave=False) as bar:
        size = int(settings["shard_mib"] * _MIB)
        plan, parts = shards.make_plan(found, "luperson", size, settings["names"], lambda n: bar.update(n - bar.n))
    for text in _remarks(plan, settings["names"]):
        warn(text)
    root = places.tidy(data_dir)
    with _stage(root) as stage:
        try:
            finished = shards.install(stage, plan, parts)
        except OSError as error:
            raise DataError(f"cannot write to {root} ({error.strerror}): free space, or give another one") from error
        del parts
        kept = sum(plan.images[number] for number in finished)
        if kept:
            warn(f"goes on with a conversion that was stopped: {kept:,} of {plan.total:,} images are converted already")
        try:
            results = beam_pipeline.run(stage, plan, finished, beam_options)
        except beam_pipeline.TooManyUnreadableError as error:
            raise _too_many(stage, plan, error.results) from error
        except (DataError, KeyboardInterrupt) as error:
            text = str(error) or "interrupted"
            again = f"{text}; finished shards are kept, the same command goes on"
            raise (DataError if isinstance(error, DataError) else KeyboardInterrupt)(again) from error
        folder = _finish(root, stage, plan, results)
    return _summary(folder, plan, results, kept, time.monotonic() - begin)


def _remarks(plan: Plan, names: str) -> Iterator[str]:
    official = luperson_source.IMAGES
    if plan.total != official:
        yield f"train has {plan.total:,} images, the published data set {official:,}"
        if plan.kind == "tree" and names == "numbers":
            yield "images are numbered by their places among those that are there: published lists may mean others"
    if plan.kind == "tree" and names == "auto" and plan.names == "paths":
        yield (
            "file names are paths, and not the numbers of published lists, which are places in the complete data set: "
            "names=numbers gives them all the same"
        )


@contextmanager
def _stage(root: str) -> Iterator[str]:
    """Where a conversion goes on; removed when it has succeeded."""
    if places.is_remote(root):
        stage = places.join(root, ".luperson.incomplete")
        yield stage
        places.remove(stage)
        return
    with staging(pathlib.Path(root).absolute(), "luperson", keep=True) as folder:
        yield str(folder)


def _too_many(stage: str, plan: Plan, results: dict[int, Result]) -> DataError:
    listed = places.join(stage, UNREADABLE_FILE)
    skipped = _write_unreadable(listed, results)
    done = sum(result.images + len(result.skipped) for result in results.values())
    return DataError(
        f"{skipped:,} of the first {done:,} images are unreadable, more than 0.1% of all {plan.total:,}: copy them "
        f"again; they are listed in {listed}"
    )


def _write_unreadable(path: str, results: dict[int, Result]) -> int:
    rows = [entry for _, result in sorted(results.items()) for entry in result.skipped]
    places.write(path, "".join(f"{entry.ref}\t{entry.reason}\n" for entry in rows).encode(errors="surrogateescape"))
    return len(rows)


def _finish(root: str, stage: str, plan: Plan, results: dict[int, Result]) -> str:
    """Describes the data set and moves it to its place, which is returned."""
    folder = places.join(stage, shards.DATASET)
    ordered = [results[number] for number in range(len(plan.images))]
    skipped = sum(len(result.skipped) for result in ordered)
    if not any(result.images for result in ordered):
        raise DataError(f"source {plan.root} has no readable image: copy LUPerson again")
    try:
        if skipped:
            _write_unreadable(places.join(folder, UNREADABLE_FILE), results)
        for name, content in _description(plan, ordered).items():
            places.write(places.join(folder, name), content)
        target = places.join(root, "luperson", str(Luperson.VERSION))
        if places.is_remote(root):
            upload(folder, target)
        else:
            publish(pathlib.Path(folder), pathlib.Path(target).absolute(), pathlib.Path(stage))
    except OSError as error:
        raise DataError(f"cannot write to {root} ({error.strerror}): free space, or give another one") from error
    return target


def _summary(folder: str, plan: Plan, results: dict[int, Result], kept: int, seconds: float) -> Summary:
    images = sum(result.images for result in results.values())
    skipped = sum(len(result.skipped) for result in results.values())
    notes = []
    if kept:
        rate = (images - kept) / max(seconds, 1e-9)
        notes.append(f"{kept:,} of them were converted before, {rate:,.0f} images/s without these")
    if skipped:
        notes.append(f"{skipped:,} unreadable images left out, listed in {places.join(folder, UNREADABLE_FILE)}")
    return Summary(folder, {records.TRAIN: (images, 0, plan.videos)}, None, 0, seconds, tuple(notes))


def _description(plan: Plan, results: list[Result]) -> dict[str, bytes]:
    """The files that describe the data set to TensorFlow Datasets."""
    with tempfile.TemporaryDirectory() as folder:
        builder = Luperson(data_dir=folder)
        template = naming.ShardedFileTemplate(
            data_dir=pathlib.Path(builder.data_dir),
            dataset_name=plan.dataset,
            split=records.TRAIN,
            filetype_suffix=records.FILE_FORMAT,
        )
        split = tfds.core.SplitInfo(
            name=records.TRAIN,
            shard_lengths=[result.images for result in results],
            num_bytes=sum(result.shard_bytes for result in results),
            filename_template=template,
        )
        builder.info.set_file_format(records.FILE_FORMAT)
        builder.info.set_splits(tfds.core.splits.SplitDict([split]))
        builder.info.metadata.update({"layout": plan.kind, "names": plan.names, "videos": str(plan.videos)})
        written = pathlib.Path(folder, "written")
        written.mkdir()
        builder.info.write_to_directory(written)
        return {path.name: path.read_bytes() for path in written.iterdir()}
