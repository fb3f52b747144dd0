"""Training with identities: the paper's fine-tuning (section 4.2)."""

import pathlib
from typing import Any

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data.samplers import identity_epoch
from dmosnet_jax.data.splits import relabel
from dmosnet_jax.recipes.datasets import training_images
from dmosnet_jax.recipes.dry_run import describe
from dmosnet_jax.recipes.training import open_experiment, train
from dmosnet_jax.train.steps import supervised_step


def run(config: Any, workdir: pathlib.Path, *, dry: bool = False) -> dict[str, Any]:
    """Runs the recipe; returns the contents of `results.json`, empty for a data set without queries.

    A `dry` run only prints what the recipe needs.

    Raises:
        ConfigError: settings that do not fit the data or the devices.
        DataError: data or weights missing or damaged, or training images without an identity.
    """
    images = training_images(config)
    if images.pids.min() < 0:
        raise DataError(f"{images.name}: training images without an identity; use the spcl recipe for them")
    labels = relabel(images.pids)

    def plan(epoch, steps):
        """P x K batches of identities."""
        instances, seed = config.sampler.instances, config.seed
        return identity_epoch(
            labels, batch_size=config.batch_size, instances=instances, seed=seed, epoch=epoch, steps=steps
        )

    # Whether the sampler can fill a batch must not wait for the first epoch.
    plan(epoch=0, steps=1)
    experiment = open_experiment(config, workdir, images, num_classes=int(labels.max()) + 1)

    def begin_epoch(run, epoch, offset):
        batches = plan(epoch, experiment.lengths.steps_per_epoch)
        return run, experiment.stream(batches, epoch=epoch, start=offset, labels=labels), {}

    step = supervised_step(experiment.model, experiment.optimiser, experiment.config)
    return (describe if dry else train)(experiment, step, begin_epoch)
