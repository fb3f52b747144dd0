"""Scores of a checkpoint or PyTorch file on one or several data sets."""

import pathlib
from typing import Any

from dmosnet_jax.core.config import dataset_names
from dmosnet_jax.core.files import make_folder
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.recipes import scoring
from dmosnet_jax.recipes.network import open_network, require_paths


def run(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs the recipe; returns the contents of `results.json`.

    Raises:
        ConfigError: no checkpoint given.
        DataError: data or checkpoint missing, damaged, or of another model.
    """
    require_paths(config, "checkpoint")
    names = dataset_names(config.dataset)
    network = open_network(config, config.checkpoint)
    scorer = scoring.Scorer(network.config, network.model, make_mesh(), names)
    make_folder(workdir)
    scores = scorer(network.params, network.stats)
    weights = network.params, network.stats
    return scoring.publish(scores, workdir, network.config, model=network.model, weights=weights, extra=network.origin)
