"""Scores of a checkpoint or PyTorch file on one or several data sets."""

import pathlib
from typing import Any

from dmosnet_jax.core.config import dataset_names
from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.export.opening import open_weights
from dmosnet_jax.recipes import targets
from dmosnet_jax.recipes.weights import as_trained, build_for


def run(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs the recipe; returns the contents of `results.json`.

    Raises:
        ConfigError: no checkpoint given.
        DataError: data or checkpoint missing, damaged, or of another model.
    """
    if not config.checkpoint:
        raise ConfigError("checkpoint is not set: give --config.checkpoint=PATH (a run's workdir or a PyTorch file)")
    names = dataset_names(config.dataset)
    weights = open_weights(config.checkpoint)
    config = as_trained(config, weights)
    model = build_for(config, weights)
    params, stats = weights.weights(model)
    scorers = targets.Targets(config, model, make_mesh(), names)
    workdir.mkdir(parents=True, exist_ok=True)
    extra: dict[str, Any] = {"checkpoint": weights.path}
    if weights.with_val is not None:
        extra["with_val"] = weights.with_val
    return targets.publish(scorers(params, stats), workdir, config, model=model.name, extra=extra)
