"""LUPerson (Fu et al., CVPR 2021): 4.18 million unlabelled crops, converted shard by shard.

    python -m data_prep.convert --dataset=luperson --source=LUP --data_dir=data

The split is `train`, identities are -1, and the camera is the number of the video in the source, from 0. The same
command resumes a conversion that was killed. `sources.luperson` describes the forms of the source. All cores of this
machine write shards, or Apache Beam does with the options of a runner, which needs the source and `data_dir` in shared
storage, and this package on its workers:

    --beam_options='--runner=DataflowRunner --project=P --region=R --temp_location=gs://B/tmp --setup_file=./setup.py'
    --beam_options='--runner=DaskRunner --dask_client_address=tcp://HOST:8786'  # pip install apache-beam[dask]

Where a worker ends, another one does what it had begun; where all have ended, Dask waits for new ones.
"""

import contextlib
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from tensorflow_datasets.core import naming
from tqdm import tqdm

from data_prep.builders.base import Item, Listing, ReidBuilder
from data_prep.check.rules import Official, Rules
from data_prep.sources import luperson
from data_prep.sources.base import Files
from data_prep.write import pool, shards
from data_prep.write.shards import Plan, Result
from data_prep.write.staging import publish, staging, upload
from data_prep.write.summary import Summary
from dmosnet_jax.core import files
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data import records

UNREADABLE_FILE = "unreadable.txt"
NAMES = ("auto", "numbers", "paths")
_MIB = 2**20


class Luperson(ReidBuilder):
    """Builder of `luperson`. `convert` writes what it describes, shard by shard; `tfds build` does it in one go."""

    DESCRIPTION = "LUPerson: unlabelled person crops from 46,260 street videos; identity -1, the camera is the video."
    HOMEPAGE = "https://github.com/DengpanFu/LUPerson"
    CITATION = "Fu et al., Unsupervised Pre-training for Person Re-identification, CVPR 2021"
    RULES: ClassVar = Rules(official={records.TRAIN: Official(luperson.IMAGES, None)}, is_labelled=False)
    OPTIONS: ClassVar = {"names": "auto", "shard_mib": 256, "workers": 0, "beam_options": ""}

    @classmethod
    def read_source(
        cls, source: str | os.PathLike[str], *, names: str = "auto", **options: Any
    ) -> tuple[Files, Listing]:
        """See the base class; the other options do not matter here."""
        del options
        found = luperson.find(source)
        left_out = luperson.LeftOut()
        images = list(found.images(left_out))
        numbered = shards.use_numbers(found, len(images), all(image.number for image in images), names)
        named = {str(image.number) if numbered else image.ref: image.ref for image in images}
        items = [Item(name, -1, image.video) for name, image in zip(named, images, strict=True)]
        notes = tuple(filter(None, [str(left_out)]))
        splits = {records.TRAIN: items} if items else {}
        return _Files(found, named), Listing(splits, details={"layout": found.kind}, notes=notes)


class _Files:
    """The images by the names that they get."""

    def __init__(self, source: luperson.Source, refs: dict[str, str]):
        self.location, self.names = source.location, list(refs)
        self._refs = refs
        self._read = luperson.reader(source.kind, source.root)

    def read(self, name: str) -> bytes:
        """The content of a file."""
        return self._read(self._refs[name])


def convert(
    data_dir: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    options: Mapping[str, Any],
    warn: Callable[[str], None],
) -> Summary:
    """Converts LUPerson, or resumes its conversion; a data set that is there already is replaced at the end.

    Args:
      data_dir: folder or URL for converted data sets.
      source: see `sources.luperson`.
      options: values for some of `Luperson.OPTIONS`: `names`, what file names are (see `shards.make_plan`);
        `shard_mib`, size of a shard; `workers`, processes of this machine (0: one for each core); `beam_options`.
      warn: called with warnings, before images are read.

    Raises:
      ConfigError: an option has no such value.
      DataError: the source is missing or damaged, more than 0.1% of the images are unreadable, or `data_dir` cannot be
        written.
    """
    begin = time.monotonic()
    settings = dict(Luperson.OPTIONS) | dict(options)
    if settings["names"] not in NAMES:
        raise ConfigError(f"names={settings['names']!r} is unknown: use one of {', '.join(NAMES)}")
    if not 0 < settings["shard_mib"] < math.inf:
        raise ConfigError(f"shard_mib={settings['shard_mib']} must be a number greater than 0")
    if settings["workers"] < 0:
        raise ConfigError(f"workers={settings['workers']} must be 0, for all cores, or a number of processes")
    write = _writer(settings)
    found = luperson.find(source)
    with tqdm(desc="listing", unit=" images", disable=None, leave=False) as bar:
        size = int(settings["shard_mib"] * _MIB)
        left_out = luperson.LeftOut()
        plan, parts = shards.make_plan(
            found, "luperson", size, settings["names"], lambda n: bar.update(n - bar.n), left_out
        )
    for text in filter(None, (*_remarks(plan, settings["names"]), str(left_out))):
        warn(text)
    root = files.tidy(data_dir)
    with _stage(root) as stage:
        try:
            results = shards.install(stage, plan, parts)
        except OSError as error:
            raise DataError(f"cannot write to {root} ({error.strerror}): free space, or give another one") from error
        del parts
        kept = sum(plan.images[number] for number in results)
        if kept:
            warn(f"goes on with a conversion that was stopped: {kept:,} of {plan.total:,} images are converted already")
        todo = [number for number in range(len(plan.images)) if number not in results]
        try:
            with contextlib.closing(write(stage, plan, todo)) as written:
                for number, result in written:
                    results[number] = result
                    _check_unreadable(stage, plan, results)
        except _TooManyError:
            raise
        except (DataError, KeyboardInterrupt) as error:
            again = f"{str(error) or 'interrupted'}; finished shards are kept, the same command goes on"
            raise (DataError if isinstance(error, DataError) else KeyboardInterrupt)(again) from error
        folder = _finish(root, stage, plan, results)
    return _summary(folder, plan, results, kept, time.monotonic() - begin)


def _writer(settings: Mapping[str, Any]) -> Callable[[str, Plan, list[int]], Any]:
    """The function that writes shards: with processes of this machine, or with Beam where it has options."""
    if not settings["beam_options"]:
        return lambda stage, plan, todo: pool.run(stage, plan, todo, settings["workers"])
    # Not before it is needed: Beam takes seconds to import.
    try:
        from data_prep.write import beam
    except ImportError as error:
        raise ConfigError(f"beam_options need more packages ({error}): pip install 'dmosnet_jax[convert]'") from error
    beam.parse_options(settings["beam_options"])
    return lambda stage, plan, todo: beam.run(stage, todo, settings["beam_options"])


def _remarks(plan: Plan, names: str) -> Iterator[str]:
    official = luperson.IMAGES
    if plan.total != official:
        yield f"train has {plan.total:,} images, the published data set {official:,}"
        if plan.kind == luperson.TREE and names == "numbers":
            yield "images are numbered by their places among those that are there: published lists may mean others"
    if plan.kind == luperson.TREE and names == "auto" and plan.names == "paths":
        yield (
            "file names are paths, and not the numbers of published lists, which are places in the complete data set: "
            "names=numbers gives them all the same"
        )


@contextlib.contextmanager
def _stage(root: str) -> Iterator[str]:
    """The folder of an unfinished conversion; removed when it has succeeded."""
    if files.is_remote(root):
        stage = files.join(root, ".luperson.incomplete")
        yield stage
        files.remove(stage)
        return
    with staging(pathlib.Path(root).absolute(), "luperson", keep=True) as folder:
        yield str(folder)


class _TooManyError(DataError):
    """More images are unreadable than allowed."""


def _check_unreadable(stage: str, plan: Plan, results: dict[int, Result]) -> None:
    if sum(len(result.skipped) for result in results.values()) <= plan.allowed:
        return
    listed = files.join(stage, UNREADABLE_FILE)
    skipped = _write_unreadable(listed, results)
    done = sum(result.images + len(result.skipped) for result in results.values())
    raise _TooManyError(
        f"{skipped:,} of the first {done:,} images are unreadable, more than 0.1% of all {plan.total:,}: copy them "
        f"again; they are listed in {listed}"
    )


def _write_unreadable(path: str, results: dict[int, Result]) -> int:
    rows = [entry for _, result in sorted(results.items()) for entry in result.skipped]
    files.write(path, "".join(f"{entry.ref}\t{entry.reason}\n" for entry in rows).encode(errors="surrogateescape"))
    return len(rows)


def _finish(root: str, stage: str, plan: Plan, results: dict[int, Result]) -> str:
    """Writes the description of the data set, moves it to its final folder, and returns that."""
    folder = files.join(stage, shards.DATASET)
    ordered = [results[number] for number in range(len(plan.images))]
    skipped = sum(len(result.skipped) for result in ordered)
    if not any(result.images for result in ordered):
        raise DataError(f"source {plan.root} has no readable image: copy LUPerson again")
    try:
        # A worker on another machine may have been killed, and its shards written by others.
        shards.remove_unfinished(stage)
        if skipped:
            _write_unreadable(files.join(folder, UNREADABLE_FILE), results)
        for name, content in _description(plan, ordered).items():
            files.write(files.join(folder, name), content)
        target = files.join(root, "luperson", str(Luperson.VERSION))
        if files.is_remote(root):
            upload(folder, target)
        else:
            publish(pathlib.Path(folder), pathlib.Path(target).absolute())
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
        notes.append(f"{skipped:,} unreadable images left out, listed in {files.join(folder, UNREADABLE_FILE)}")
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
