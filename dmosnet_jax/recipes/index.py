"""A gallery of a user's own images, made or grown."""

import pathlib
import re
from typing import Any

import jax
import numpy as np

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.parallel import make_mesh, print_once
from dmosnet_jax.evaluation.gallery import Gallery
from dmosnet_jax.export.weights import fingerprint
from dmosnet_jax.recipes.extract import ImageFiles, find_images, without_broken
from dmosnet_jax.recipes.network import Network, open_network, require_paths
from dmosnet_jax.recipes.scoring import make_extractor


def run(config: Any, workdir: pathlib.Path) -> Gallery:
    """Runs the recipe; nothing is written to the workdir.

    Raises:
        ConfigError: a path is not set, or the pattern of cameras is none.
        DataError: images or checkpoint missing or damaged, or the gallery is other weights' or can't be written.
    """
    del workdir
    require_paths(config, "images", "checkpoint", "output")
    pattern = _camera_pattern(config.camera_pattern)
    images = find_images(config.images)
    network = open_network(config, config.checkpoint)
    gallery = _open(config, network)
    images = _new(images, gallery)
    if config.skip_broken:
        images = without_broken(images, config.data.threads)
    features = make_extractor(network.config, network.model, make_mesh())(network.params, network.stats, images)
    cameras = [_camera(pattern, name) for name in images.files]
    if jax.process_index() == 0:
        gallery.append(features, images.files, cameras=cameras, root=str(images.root.absolute()))
        print(f"{len(images)} images added, {len(gallery)} in the gallery: {config.output}")
    return gallery


def fingerprint_of(network: Network) -> str:
    """What decides the features of a network with a config's input."""
    config = network.config
    inputs: Any = {"mean": config.pixel_mean, "std": config.pixel_std, "interpolation": config.data.interpolation}
    return fingerprint(network.model, network.params, network.stats, **inputs)


def _open(config: Any, network: Network) -> Gallery:
    """The gallery, new where there is none.

    Raises:
        DataError: it was made by other weights, or with another dtype.
    """
    mark = fingerprint_of(network)
    if not pathlib.Path(config.output).exists():
        options = {"feature_dim": network.model.feature_dim, "dtype": config.dtype}
        return Gallery.create(
            config.output, fingerprint=mark, checkpoint=str(pathlib.Path(config.checkpoint).absolute()), **options
        )
    gallery = Gallery.open(config.output)
    gallery.check(mark, config.checkpoint)
    if gallery.dtype != config.dtype:
        raise DataError(f"{config.output}: has features of {gallery.dtype}: give --config.dtype={gallery.dtype}")
    return gallery


def _new(images: ImageFiles, gallery: Gallery) -> ImageFiles:
    """Those images that the gallery has not, by folder and name.

    Raises:
        DataError: it has all of them.
    """
    root = str(images.root.absolute())
    known = {name for name, own in zip(gallery.files, gallery.roots, strict=True) if own == root}
    left = tuple(name for name in images.files if name not in known)
    if not left:
        raise DataError(f"{images.root}: all {len(images)} images are in the gallery already; nothing to add")
    if len(left) < len(images):
        print_once(f"{len(images) - len(left)} images are in the gallery already")
    return ImageFiles(images.root, left, images.left_out)


def _camera_pattern(text: str) -> re.Pattern[str] | None:
    if not text:
        return None
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ConfigError(f"camera_pattern={text!r} is no regular expression ({error}); e.g. _c(\\d+)") from error
    if not pattern.groups:
        raise ConfigError(f"camera_pattern={text!r} has no group for the camera's number; e.g. _c(\\d+)")
    return pattern


def _camera(pattern: re.Pattern[str] | None, name: str) -> int:
    found = pattern.search(name) if pattern else None
    number = found.group(1) if found else None
    return int(number) if number and number.isdecimal() and int(number) <= np.iinfo(np.int32).max else -1
