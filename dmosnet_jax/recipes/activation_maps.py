"""Activation maps of a user's own images, of one network or of two beside each other."""

import os
import pathlib
from typing import Any

import jax
import numpy as np

from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.data import transforms
from dmosnet_jax.evaluation.activation import activation_maps, last_map, write_panel
from dmosnet_jax.evaluation.extract import BatchProgram
from dmosnet_jax.models.attention import watching, weights_at
from dmosnet_jax.recipes.extract import ImageFiles, find_images
from dmosnet_jax.recipes.network import Network, open_network, require_paths
from dmosnet_jax.train.metrics import progress_bar


def run(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs the recipe; writes `config.output` and returns the arrays of `maps.npz`.

    Raises:
        ConfigError: a path is not set, or `attention_at` is not a place in the image.
        DataError: images or checkpoint missing or damaged.
    """
    del workdir
    require_paths(config, "images", "checkpoint", "output")
    place = tuple(config.attention_at)
    if len(place) != 2 or not all(0 <= share < 1 for share in place):
        raise ConfigError(f"attention_at={place} must be shares of height and width, 0 to below 1, as (0.5, 0.5)")
    images = find_images(config.images)
    networks = [open_network(config, path) for path in (config.checkpoint, config.compare) if path]
    found = [_maps(network, images, place) for network in networks]
    output = pathlib.Path(config.output)
    files = np.asarray(images.files)
    arrays = [{"maps": np.stack([each["maps"] for each in rows]), "files": files} for rows in found]
    if jax.process_index() == 0:
        _draw(output, images, networks[0], found, place)
        for name, content in zip(("maps.npz", "compared.npz"), arrays, strict=False):
            with atomic_write(output / name) as part, part.open("wb") as file:
                np.savez(file, **content)  # type: ignore[arg-type]
        print(f"activation maps of {len(images)} images written: {output}{os.sep}")
    return arrays[0]


def _maps(network: Network, images: ImageFiles, place: tuple[float, float]) -> list[dict[str, np.ndarray]]:
    """Of each image `maps` [h, w] and, where the network has attention, `attention` [heads, h', w'] of the place."""
    model, config = network.model, network.config

    def program(weights, images):
        with watching() as watched:
            last = last_map(model, weights, images, mean=config.pixel_mean, std=config.pixel_std)
        attention = {"attention": weights_at(watched[-1], place)} if watched else {}
        return {"maps": activation_maps(last), **attention}

    batches = BatchProgram(
        program,
        make_mesh(),
        image_size=model.image_size,
        interpolation=config.data.interpolation,
        batch_size=config.eval.batch_size,
        threads=config.data.threads,
        workers=config.data.workers,
    )
    found: list[dict[str, np.ndarray]] = []
    with progress_bar(len(images), label="maps") as bar:
        for batch in batches((network.params, network.stats), images):
            count = len(batch["maps"])
            found += [{name: values[row] for name, values in batch.items()} for row in range(count)]
            bar.update(count)
    return found


def _draw(
    output: pathlib.Path,
    images: ImageFiles,
    network: Network,
    found: list[list[dict[str, np.ndarray]]],
    place: tuple[float, float],
) -> None:
    """The pictures, as the network sees the images."""
    size, interpolation = network.model.image_size, network.config.data.interpolation
    with progress_bar(len(images), label="pictures") as bar:
        for row, file in enumerate(images.files):
            image = transforms.load(images.record(row).image, size, interpolation)
            rows = [maps[row] for maps in found]
            write_panel(output / f"{file}.png", image, [each["maps"] for each in rows])
            attention = next((each["attention"] for each in rows if "attention" in each), None)
            if attention is not None:
                write_panel(output / f"{file}.attention.png", image, list(attention), mark=place)
            bar.update(1)
