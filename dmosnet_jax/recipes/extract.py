"""Features of a user's own images."""

import pathlib
from typing import Any

import jax
import numpy as np

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.data.records import Record
from dmosnet_jax.data.splits import Rows
from dmosnet_jax.recipes.network import open_network, require_paths
from dmosnet_jax.recipes.scoring import make_extractor

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
    root = pathlib.Path(path)
    if root.is_file():
        return ImageFiles(root.parent, (root.name,))
    if not root.is_dir():
        raise DataError(f"{path}: no such folder or image: set --config.images to one")
    found = sorted(
        str(p.relative_to(root))
        for p in root.rglob("*")
        if p.suffix.lower() in SUFFIXES and not p.name.startswith("._") and "__MACOSX" not in p.parts
    )
    if not found:
        raise DataError(f"{path}: holds no image ({', '.join(SUFFIXES)}): set --config.images to a folder that does")
    return ImageFiles(root, tuple(found))


def run(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs the recipe; writes `config.output` and returns its arrays.

    Raises:
        ConfigError: a path is not set.
        DataError: images or checkpoint missing or damaged.
    """
    del workdir
    require_paths(config, "images", "checkpoint", "output")
    images = find_images(config.images)
    network = open_network(config, config.checkpoint)
    features = make_extractor(network.config, network.model, make_mesh())(network.params, network.stats, images)
    arrays = {"features": features, "files": np.asarray(images.files)}
    if jax.process_index() == 0:
        with atomic_write(config.output) as part, part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        print(f"{len(features)} features of {features.shape[1]} values written: {config.output}")
    return arrays
