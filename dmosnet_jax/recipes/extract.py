"""Features of a user's own images."""

import collections
import concurrent.futures
import os
import pathlib
from typing import Any

import jax
import numpy as np

from dmosnet_jax.core import files
from dmosnet_jax.core.errors import ConfigError, DataError, first, printable
from dmosnet_jax.core.parallel import make_mesh, print_once
from dmosnet_jax.data import transforms
from dmosnet_jax.data.records import Record
from dmosnet_jax.data.splits import Rows
from dmosnet_jax.recipes.network import open_network, require_paths
from dmosnet_jax.recipes.scoring import make_extractor
from dmosnet_jax.train.metrics import progress_bar

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp")
OUTPUT = ".npz"
_SHOWN = 5


class ImageFiles(Rows):
    """Image files seen as a split, with `files` relative to `root`; neither identities nor cameras are known."""

    fix = "replace or remove the file, or set --config.skip_broken=True to leave such files out"

    def __init__(self, root: pathlib.Path, names: tuple[str, ...], left_out: tuple[str, ...] = ()):
        unknown = np.full(len(names), -1, np.int32)
        super().__init__("images", "", unknown, unknown)
        self.root, self.files, self.left_out = root, names, left_out

    def record(self, index: int, /) -> Record:
        """The file's bytes.

        Raises:
            DataError: it can't be read.
        """
        path = self.root / self.files[index]
        try:
            return Record(
                image=files.read(path, most=files.MAX_IMAGE_BYTES), pid=-1, camid=-1, filename=self.files[index]
            )
        except OSError as error:
            raise DataError(
                f"{path}: can't be read ({error.strerror}); check that it exists and is readable"
            ) from error


def find_images(path: str) -> ImageFiles:
    """The images that a path means, sorted by name.

    Args:
        path: a folder, searched to any depth, or one image. Hidden files and folders are what systems leave behind.

    Returns:
        The images, with the names of the other files as `left_out`.

    Raises:
        DataError: nothing there, or no image.
    """
    root = pathlib.Path(files.tidy(path))
    if root.is_file():
        return ImageFiles(root.parent, (root.name,))
    if not root.is_dir():
        raise DataError(f"{path}: no such folder or image: set --config.images to one")
    found, other = [], []
    for folder, folders, names in os.walk(root):
        # Links to folders are not followed.
        other += [os.path.relpath(os.path.join(folder, name), root) for name in folders if _is_link(folder, name)]
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        for name in names:
            shown = os.path.relpath(os.path.join(folder, name), root)
            if pathlib.Path(name).suffix.lower() not in SUFFIXES:
                other += [] if name.startswith(".") else [shown]
            elif not name.startswith("."):
                found.append(shown)
    if not found:
        held = f"; it holds {_kinds(other)}" if other else ""
        known = ", ".join(SUFFIXES)
        raise DataError(f"{path}: holds no image ({known}){held}: set --config.images to a folder that does")
    return ImageFiles(root, tuple(sorted(found)), tuple(sorted(other)))


def _is_link(folder: str, name: str) -> bool:
    return os.path.islink(os.path.join(folder, name)) and not name.startswith(".")


def _kinds(names: list[str] | tuple[str, ...]) -> str:
    """How many files there are of each suffix, and the first names."""
    counts = collections.Counter(pathlib.Path(name).suffix.lower() or "no suffix" for name in names)
    kinds = [f"{count:,} {printable(suffix, 20)}" for suffix, count in counts.most_common()]
    shown = [printable(name) for name in names]
    return f"{first(kinds, join=', ', most=_SHOWN)}, e.g. {first(shown, join=', ', most=_SHOWN)}"


def without_broken(images: ImageFiles, threads: int) -> ImageFiles:
    """The images that can be decoded; the others are counted and named."""

    def problem(row: int) -> str | None:
        try:
            transforms.decode(images.record(row).image)
        except DataError as error:
            return f"{printable(images.files[row])} ({printable(error)})"
        return None

    with (
        concurrent.futures.ThreadPoolExecutor(max(threads, 1)) as pool,
        progress_bar(len(images), label="check") as bar,
    ):
        problems = []
        for found in pool.map(problem, range(len(images))):
            problems.append(found)
            bar.update()
    broken = [text for text in problems if text]
    kept = tuple(name for name, text in zip(images.files, problems, strict=True) if text is None)
    if not kept:
        raise DataError(f"{images.root}: none of its {len(images):,} images can be read: {first(broken, most=_SHOWN)}")
    if broken:
        print_once(f"left out: {len(broken):,} of {len(images):,} images can't be read: {first(broken, most=20)}")
    return ImageFiles(images.root, kept, images.left_out)


def run(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs the recipe; writes `config.output` and returns its arrays.

    Raises:
        ConfigError: a path is not set, or the output is of another kind.
        DataError: images or checkpoint missing or damaged, or the output exists.
    """
    del workdir
    require_paths(config, "images", "checkpoint", "output")
    if pathlib.Path(config.output).suffix != OUTPUT:
        raise ConfigError(f"output={config.output!r}: features are written as {OUTPUT}: give a name with this suffix")
    files.refuse_existing(config.output, overwrite=config.overwrite)
    images = find_images(config.images)
    if images.left_out:
        print_once(f"left out: {len(images.left_out):,} files are no images by name: {_kinds(images.left_out)}")
    network = open_network(config, config.checkpoint)
    if config.skip_broken:
        images = without_broken(images, config.data.threads)
    features = make_extractor(network.config, network.model, make_mesh())(network.params, network.stats, images)
    arrays = {"features": features, "files": np.asarray(images.files)}
    if jax.process_index() == 0:
        with files.atomic_write(config.output) as part, part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        print_once(f"{len(features)} features of {features.shape[1]} values written: {printable(config.output, 500)}")
    return arrays
