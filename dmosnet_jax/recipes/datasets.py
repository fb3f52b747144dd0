"""The images that a config names: one data set, a part of one, or the union of several."""

import zlib
from collections.abc import Sequence
from typing import Any

from dmosnet_jax.core.config import dataset_names
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.parallel import print_once
from dmosnet_jax.data import subset
from dmosnet_jax.data.records import GALLERY, QUERY, TRAIN, TRAINVAL, VAL
from dmosnet_jax.data.splits import JointSplit, Rows, Split, Subset, load_split, split_names
from dmosnet_jax.train.metrics import progress_bar

# Names read between two updates of the progress bar.
_NAMES_AT_ONCE = 1000


def training_images(config: Any) -> Rows:
    """The training images of a config: `dataset`, and of it the part that `data.subset` chooses.

    Raises:
        ConfigError: the data sets' names are wrong.
        DataError: a data set or the subset's file is missing, damaged, or of another data set.
    """
    names = dataset_names(config.dataset)
    parts = _training_splits(config, names)
    if len(parts) > 1:
        return _union(parts)
    if config.data.subset is None:
        return parts[0]
    whole = parts[0]
    if not isinstance(whole, Split):
        raise ConfigError("data.subset selects from train, not from train and val together: set with_val=False")
    _, path, share = config.data.subset
    chosen, about = subset.choose(whole, path, share, names=lambda: read_names(whole))
    print_once(about)
    return chosen


def domain_images(config: Any) -> tuple[JointSplit, int]:
    """The training images of a labelled source, `source`, and after them those of a target, `dataset`.

    Returns:
        The images, and how many of them are the source's.

    Raises:
        ConfigError: the data sets' names are wrong.
        DataError: a data set is missing or damaged, or images of the source have no identity.
    """
    sources, targets = dataset_names(config.source), dataset_names(config.dataset)
    parts = _training_splits(config, (*sources, *targets))
    for part in parts[: len(sources)]:
        if part.pids.min() < 0:
            raise DataError(f"{part.name}: training images without an identity; they cannot be a labelled source")
    return _union(parts), sum(len(part) for part in parts[: len(sources)])


def _training_splits(config: Any, names: Sequence[str]) -> list[Rows]:
    parts = [_training_split(config, name) for name in names]
    if config.get("with_val") and all(isinstance(part, Split) and part.split == TRAIN for part in parts):
        raise DataError(f"with_val=True, but {' and '.join(names)} has no images for validation: leave it False")
    return parts


def _union(parts: Sequence[Rows]) -> JointSplit:
    union = JointSplit(tuple(parts))
    print_once(
        f"{union.name}: " + " + ".join(f"{len(part):,}" for part in parts) + f" = {len(union):,} training images"
    )
    return union


def _training_split(config: Any, name: str) -> Rows:
    """`train` of a data set, and `val` too where the config says so."""
    present = split_names(config.data_dir, name)
    if config.get("with_val"):
        if TRAINVAL in present:
            return load_split(config.data_dir, name, TRAINVAL)
        if VAL in present:
            return JointSplit(tuple(load_split(config.data_dir, name, split) for split in (TRAIN, VAL)), same=True)
    elif TRAINVAL in present and TRAIN not in present:
        raise DataError(
            f"{name} in {config.data_dir} was made from a copy that does not tell training from validation images: "
            "set with_val=True to train on both"
        )
    return load_split(config.data_dir, name, TRAIN)


def subset_checksum(images: Rows) -> int | None:
    """A checksum of the rows that a subset holds, to recognise it; None for a whole split."""
    return zlib.crc32(images.rows.astype("<i4").tobytes()) if isinstance(images, Subset) else None


def read_names(split: Split) -> list[str]:
    """All file names of a split, with a progress bar."""
    names: list[str] = []
    with progress_bar(len(split), label=f"names of {split.name}", unit="names") as bar:
        for start in range(0, len(split), _NAMES_AT_ONCE):
            found = split.filenames(range(start, min(start + _NAMES_AT_ONCE, len(split))))
            names += found
            bar.update(len(found))
    return names


def datasets_with_queries(config: Any) -> list[str]:
    """Those of a config's data sets that have queries and a gallery.

    Raises:
        DataError: a data set is not there.
    """
    names = dataset_names(config.dataset)
    return [name for name in names if {QUERY, GALLERY} <= set(split_names(config.data_dir, name))]
