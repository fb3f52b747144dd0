"""Scores of a checkpoint or PyTorch file on a data set."""

import pathlib
from typing import Any

from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.mesh import make_mesh
from dmosnet_jax.export.opening import open_weights
from dmosnet_jax.recipes import scoring
from dmosnet_jax.recipes.weights import as_trained, build_for


def run(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs the recipe; returns the contents of `results.json`.

    Raises:
        ConfigError: no checkpoint given.
        DataError: data or checkpoint missing, damaged, or of another model.
    """
    if not config.checkpoint:
        raise ConfigError("checkpoint is not set: give --config.checkpoint=PATH (a run's workdir or a PyTorch file)")
    weights = open_weights(config.checkpoint)
    config = as_trained(config, weights)
    model = build_for(config, weights)
    params, stats = weights.weights(model)
    scorer = scoring.Scorer(config, model, make_mesh())
    workdir.mkdir(parents=True, exist_ok=True)
    extra = {"checkpoint": weights.path, "model": model.name, "dataset": config.dataset}
    title = f"{model.name} on {config.dataset}"
    return scoring.publish(scorer(params, stats), workdir, config, title=title, extra=extra)
