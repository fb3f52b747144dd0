"""Features of a user's own images."""

import pathlib
from typing import Any

import jax
import numpy as np

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.data.records import Record
from dmosnet_jax.data.splits import Rows
from dmosnet_jax.export.opening import open_weights
from dmosnet_jax.recipes import scoring
from dmosnet_jax.recipes.weights import as_trained, build_for

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class ImageFiles(Rows):
    """Image files seen as a split, with `files` relative to `root`; neither identities nor cameras are known."""

    def __init__(self, root: pathlib.Path, files: tuple[str, ...]):
        unknown = np.full(len(files), -1, np.int32)
        super().__init__("images", "", unknown, unknown)
        self.root, self.files = root, files

    def record(self, index: int, /) -> Record:
        """The file's bytes.

        Raises:
            DataError: it can't be read.
        """
        path = self.root / self.files[index]
        try:
            return Record(image=path.read_bytes(), pid=-1, camid=-1, filename=self.files[index])
        except OSError as error:
            raise DataError(
                f"{path}: can't be read ({error.strerror}); check that it exists and is readable"
            ) from error


def find_images(path: str) -> ImageFiles:
    """The images that a path means, sorted by name.

    Args:
        path: a folder, searched to any depth, or one image.

    Raises:
        DataError: nothing there, or no image.
    """
    place = pathlib.Path(path)
    if place.is_file():
        return ImageFiles(place.parent, (place.name,))
    if not place.is_dir():
        raise DataError(f"{path}: no such folder or image: set --config.images to one")
    found = sorted(
        str(p.relative_to(place))
        for p in place.rglob("*")
        if p.suffix.lower() in SUFFIXES and not p.name.startswith("._") and "__MACOSX" not in p.parts
    )
    if not found:
        raise DataError(f"{path}: holds no image ({', '.join(SUFFIXES)}): set --config.images to a folder that does")
    return ImageFiles(place, tuple(found))


def run(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs the recipe; writes `config.output` and returns its arrays.

    Raises:
        ConfigError: a path is not set.
        DataError: images or checkpoint missing or damaged.
    """
    del workdir
    for field in ("images", "checkpoint", "output"):
        if not config[field]:
            raise ConfigError(f"{field} is not set: give --config.{field}=PATH")
    images = find_images(config.images)
    weights = open_weights(config.checkpoint)
    config = as_trained(config, weights)
    model = build_for(config, weights)
    params, stats = weights.weights(model)
    features = scoring.make_extractor(config, model, make_mesh())(params, stats, images)
    arrays = {"features": features, "files": np.asarray(images.files)}
    if jax.process_index() == 0:
        with atomic_write(config.output) as part, part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        print(f"{len(features)} features of {features.shape[1]} values written: {config.output}")
    return arrays
