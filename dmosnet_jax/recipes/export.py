"""Weights of any kind as a PyTorch file or as a folder of their own."""

import pathlib
from typing import Any

from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.parallel import print_once
from dmosnet_jax.export import conversion, opening


def run(config: Any, workdir: pathlib.Path) -> None:
    """Runs the recipe; nothing is written to the workdir.

    Raises:
        ConfigError: no checkpoint or output given, the network is not told, or the layout has no such network.
        DataError: the checkpoint can't be read or is another network's, or the output can't be written.
    """
    del workdir
    for field in ("checkpoint", "output"):
        if not config[field]:
            raise ConfigError(f"{field} is not set: give --config.{field}=PATH")
    options = {part: config.model.get(part) for part in opening.PARTS}
    if options["attention"] is not None:
        options["attention"] = tuple(int(bool(flag)) for flag in options["attention"])
    model = conversion.convert(
        config.checkpoint,
        config.output,
        layout=config.layout or None,
        keep_classifier=config.keep_classifier,
        origin=config.source,
        licence=config.licence,
        image_size=config.image_size,
        interpolation=config.data.interpolation or None,
        **options,
    )
    print_once(f"{model.name}: {config.checkpoint} written to {config.output}")
