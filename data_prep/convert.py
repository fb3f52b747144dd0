"""Converts a raw data set into TFRecord for training and evaluation.

    python -m data_prep.convert --dataset=market1501 --source=Market-1501-v15.09.15.zip --data_dir=data
    python -m data_prep.convert --dataset=synthetic --data_dir=data

write `data/market1501/1.0.0/` and `data/synthetic/1.0.0/`. The source is what the authors of the data set give out: its
folder, or its zip file; the images keep their encoded bytes. `synthetic` is rendered, `folder` is your own data (see
`data_prep/builders/folder.py`). A conversion that fails or is interrupted leaves nothing behind.
"""

import contextlib
import dataclasses
import importlib
import io
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from data_prep import command
from data_prep.check.rules import identities
from data_prep.sources.base import reason
from data_prep.synthetic import pedestrians
from data_prep.synthetic.pedestrians import Scene
from data_prep.write.shards import DATASET as UNFINISHED
from data_prep.write.staging import publish, staging, sweep, upload
from data_prep.write.summary import Summary
from dmosnet_jax.core import files
from dmosnet_jax.core.command import guarded
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data import records, shards

if TYPE_CHECKING:
    from data_prep.builders.base import ReidBuilder

DATASETS = (
    "market1501",
    "dukemtmc",
    "cuhk03_detected",
    "cuhk03_labeled",
    "msmt17",
    "luperson",
    "folder",
    "synthetic",
)
RENDERED = "synthetic"
# Too large for one process and one go.
SHARDED = "luperson"

_FLAGS = command.own_flags()
flags.DEFINE_string("dataset", None, f"Name of the data set: {', '.join(DATASETS)}.", _FLAGS)
flags.DEFINE_string(
    "source",
    None,
    "Folder or zip file of the raw data set; for CUHK03 also cuhk-03.mat, for folder also a CSV file. For synthetic: a "
    "new folder, to keep the rendered images in, or one rendered before.",
    _FLAGS,
)
flags.DEFINE_string("data_dir", None, "Folder for converted data sets, or its URL (gs://, ...).", _FLAGS)
flags.DEFINE_bool("overwrite", False, "Convert again what is there already.", _FLAGS)
flags.DEFINE_enum(
    "camera_policy",
    None,
    ["given", "none"],
    "folder: whether the images have cameras; none lets every image count as its own camera (default given).",
    _FLAGS,
)
flags.DEFINE_float(
    "test_fraction",
    None,
    "folder: share of the identities that are tested on, where nothing says the split (default 0.5).",
    flag_values=_FLAGS,
)
flags.DEFINE_enum(
    "names",
    None,
    ["auto", "numbers", "paths"],
    "luperson: what file names are: CC_CC_VVVV_MMMMMMMM.jpg, as in published lists, or paths. auto takes numbers where "
    "the images have them or are complete (default auto).",
    _FLAGS,
)
flags.DEFINE_float("shard_mib", None, "luperson: size of a shard in MiB (default 256).", flag_values=_FLAGS)
flags.DEFINE_integer(
    "workers", None, "luperson: processes that convert (default 0: one for each core).", flag_values=_FLAGS
)
flags.DEFINE_string(
    "beam_options",
    None,
    "luperson: convert by Apache Beam, with its options in one string: '--runner=DataflowRunner --project=P'.",
    _FLAGS,
)
# Options of `ReidBuilder.read_source`, for the data sets that have them.
SOURCE_OPTIONS = ("camera_policy", "test_fraction", "names", "shard_mib", "workers", "beam_options")
_OPTIONS = {option.name: option for option in dataclasses.fields(Scene)}
for _name, _option in _OPTIONS.items():
    _text = f"synthetic: {_option.metadata['help']} (default {str(_option.default).strip('()')})."
    if _name == "image_size":
        flags.DEFINE_list(_name, None, _text, _FLAGS)
    else:
        flags.DEFINE_integer(_name, None, _text, flag_values=_FLAGS)


def convert(
    dataset: str,
    data_dir: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    scene: Scene | None = None,
    overwrite: bool = False,
    warn: Callable[[str], None] = lambda _: None,
) -> Summary | None:
    """Converts a data set to `data_dir/<dataset>/<version>`, whole or not at all.

    The arguments are those of the command line; see its flags.

    Args:
      dataset: one of `DATASETS`.
      data_dir: folder for converted data sets, or its URL.
      source: folder or zip file of the raw data set; not needed for `synthetic`.
      options: those of `SOURCE_OPTIONS` that the data set has.
      scene: what to render, for `synthetic`.
      overwrite: replace a data set that is there already.
      warn: called with what `lint` finds: before anything is written with what labels and names tell, and with what
        the images tell when they have been read.

    Returns:
      The summary; None when the data set was there already.

    Raises:
      ConfigError: unknown data set, options that do not go together, or TensorFlow is not installed.
      DataError: the source is missing or damaged, or `data_dir` cannot be written.
    """
    check_dataset(dataset)
    if dataset != RENDERED and scene is not None:
        raise ConfigError(f"dataset={dataset} is not rendered: leave out {', '.join(_OPTIONS)}")
    if dataset != RENDERED and source is None:
        raise ConfigError(f"dataset={dataset} needs source=PATH: the folder or zip file of the raw data set")
    builder_class = builder_class_of(dataset)
    check_options(dataset, options or {})
    target = files.join(files.tidy(data_dir), dataset, str(builder_class.VERSION))
    if not overwrite and _is_converted(target):
        if not files.is_remote(data_dir):
            unfinished = UNFINISHED if dataset == SHARDED else ""
            sweep(pathlib.Path(files.tidy(data_dir)).absolute(), dataset, unfinished)
        return None
    begin = time.monotonic()
    if dataset == SHARDED:
        from data_prep.builders import luperson

        assert source is not None
        return luperson.convert(data_dir, source, options=options or {}, warn=warn)
    if files.is_remote(data_dir):
        with tempfile.TemporaryDirectory() as folder:
            summary = convert(dataset, folder, source=source, options=options, scene=scene, warn=warn)
            assert summary is not None
            upload(str(summary.folder), target)
        return dataclasses.replace(summary, folder=target, seconds=time.monotonic() - begin)
    with staging(pathlib.Path(files.tidy(data_dir)).absolute(), dataset) as stage:
        if dataset == RENDERED:
            source = _rendered(source, scene, stage)
        builder = builder_class(source=source, options=options, data_dir=str(stage))
        for finding in builder.findings():
            warn(finding.text)
        _build(builder, stage.parent)
        for finding in builder.image_findings():
            warn(finding.text)
        publish(pathlib.Path(builder.data_dir), pathlib.Path(target).absolute())
    return _summary(builder, target, time.monotonic() - begin)


def _summary(builder: "ReidBuilder", target: str, seconds: float) -> Summary:
    opened, listing = builder.open()
    parts, rules = listing.parts(opened), builder.RULES
    return Summary(
        folder=pathlib.Path(target).absolute(),
        splits={p.split: (len(p), len(identities(p.pids, rules)), len(set(p.camids.tolist()))) for p in parts},
        junk=listing.junk if rules.reserved_ids else None,
        distractors=sum(int((part.pids == 0).sum()) for part in parts),
        seconds=seconds,
        notes=builder.remarks(),
    )


def _is_converted(target: str) -> bool:
    try:
        return files.is_file(files.join(target, records.INFO_FILE))
    except OSError as error:
        raise DataError(f"{target}: cannot be read ({error.strerror}): check the name and the credentials") from error


def check_dataset(dataset: str) -> None:
    """Raises ConfigError where there is no data set of that name."""
    if dataset not in DATASETS:
        raise ConfigError(f"dataset={dataset} is unknown: use one of {', '.join(DATASETS)}")


def check_options(dataset: str, options: Mapping[str, Any]) -> None:
    """Raises ConfigError where the data set has no such options."""
    unknown = [name for name in options if name not in builder_class_of(dataset).OPTIONS]
    if unknown:
        raise ConfigError(f"dataset={dataset} has no {', '.join(unknown)}: leave it out")


def _rendered(source: str | os.PathLike[str] | None, scene: Scene | None, stage: pathlib.Path) -> pathlib.Path:
    """The folder of the rendered images: `source`, which may have been rendered before, or one on the stage."""
    folder = stage / "raw" if source is None else pathlib.Path(source).expanduser()
    if not folder.exists():
        pedestrians.render(folder, scene or Scene())
    elif scene is not None:
        raise ConfigError(f"source={folder} was rendered before: leave out {', '.join(_OPTIONS)}, or give a new folder")
    return folder


def builder_class_of(dataset: str) -> "type[ReidBuilder]":
    """The builder of a data set.

    Raises:
      ConfigError: TensorFlow is not installed.
    """
    # TensorFlow reports its own affairs on standard error, on import already.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        # Importing it takes seconds and half a gigabyte, and a large data set is written without it.
        if dataset != SHARDED:
            import tensorflow  # noqa: F401
        import tensorflow_datasets

        # Its class has the name of the data set.
        module = importlib.import_module(f"data_prep.builders.{dataset}")
    except ImportError as error:
        text = f"conversion needs more packages ({error}): pip install 'dmosnet_jax[convert]'"
        raise ConfigError(text) from error
    tensorflow_datasets.disable_progress_bar()
    return getattr(module, "".join(map(str.capitalize, dataset.split("_"))))


def _build(builder: "ReidBuilder", root: pathlib.Path) -> None:
    """Writes shards and their indices into the builder's folder, and reads them back."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    try:
        # The messages of TensorFlow Datasets name the stage, which the user does not know.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(
                file_format=records.FILE_FORMAT,
                download_config=tfds.download.DownloadConfig(register_checksums=False),
            )
        for split, items in builder.open()[1].splits.items():
            pids = [shards.load_index(path)["pid"] for path in builder.info.splits[split].filepaths]
            written = [int(pid) for shard in pids for pid in shard]
            if written != [item.pid for item in items]:
                raise DataError(f"{root}: what was written for {split} reads back differently: check the disk")
    except (OSError, tf.errors.OpError) as error:
        raise DataError(f"cannot write to {root} ({reason(error)}): free space, or give another data_dir") from error


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`, program name first.

    Returns:
      The exit status: 0, also when the data set was there already; 1 for bad data; 2 for a bad command.
    """
    return guarded(lambda: _run(argv), interrupted="interrupted: nothing was written")


def _run(argv: Sequence[str]) -> int:
    if command.parse(_FLAGS, argv, __doc__):
        return 0
    for name in ("dataset", "data_dir"):
        if not _FLAGS[name].value:
            raise ConfigError(f"--{name} is missing; see --help")
    summary = convert(
        _FLAGS.dataset,
        _FLAGS.data_dir,
        source=_FLAGS.source or None,
        options=command.given(_FLAGS, SOURCE_OPTIONS),
        scene=_scene(),
        overwrite=_FLAGS.overwrite,
        warn=lambda text: print(f"warning: {text}", file=sys.stderr),
    )
    if summary is None:
        print(f"{_FLAGS.dataset} is in {_FLAGS.data_dir} already; --overwrite converts it again")
    else:
        print(summary)
    return 0


def _scene() -> Scene | None:
    """The options for rendering, None where none is given."""
    given = command.given(_FLAGS, list(_OPTIONS))
    if "image_size" in given:
        try:
            given["image_size"] = tuple(map(int, given["image_size"]))
        except ValueError as error:
            raise ConfigError(f"image_size={','.join(given['image_size'])} must be height,width") from error
    return Scene(**given) if given else None


def start() -> None:
    """Runs this command as the program."""
    command.start(main)


if __name__ == "__main__":
    start()
