"""SpCL with a labelled source beside the unlabelled target (Ge et al. 2020, unsupervised domain adaptation).

The classes of the source come first in the hybrid memory, one row each: their centroids, which the batches' images
move. The target's images follow, are clustered before each epoch, and make up half of each batch. Batch norms are
domain-specific; those in the checkpoint's network, its evaluation and its export are the target's.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.data.samplers import SOURCE, alternating
from dmosnet_jax.data.splits import Rows, Subset, relabel
from dmosnet_jax.memory import hybrid
from dmosnet_jax.memory.tables import TableRows
from dmosnet_jax.recipes import feature_pass, spcl
from dmosnet_jax.recipes.datasets import domain_images
from dmosnet_jax.recipes.dry_run import describe
from dmosnet_jax.recipes.training import open_experiment, train
from dmosnet_jax.train import state as train_state
from dmosnet_jax.train.state import RunState, TrainState
from dmosnet_jax.train.steps import spcl_uda_step


def run(config: Any, workdir: pathlib.Path, *, dry: bool = False) -> dict[str, Any]:
    """Runs the recipe; returns the contents of `results.json`, empty for a target without queries.

    A `dry` run only prints what the recipe needs.

    Raises:
        ConfigError: settings that do not fit the data or the devices.
        DataError: data or weights missing or damaged, or a source without identities.
    """
    images, source = domain_images(config)
    experiment = open_experiment(config, workdir, images, num_classes=0)
    epochs = Epochs(experiment, hybrid, {}, source)
    turns = spcl.turns_of(experiment, experiment.config.batch_size // 2)
    step = spcl_uda_step(experiment.model, experiment.optimiser, experiment.config, turns=turns)
    if dry:
        return describe(experiment, step, epochs.begin, **epochs.hooks())
    results = train(experiment, step, epochs.begin, clusters=epochs.shown, **epochs.hooks())
    feature_pass.clear(workdir)
    return results


@dataclasses.dataclass(frozen=True)
class Epochs(spcl.Epochs):
    """What an epoch with a labelled source is.

    Attributes:
        source: images of the source; they are the experiment's first ones.
    """

    source: int

    @functools.cached_property
    def clustered(self) -> Rows:
        """The target's images."""
        return Subset(self.experiment.images, np.arange(self.source, len(self.experiment.images)))

    @functools.cached_property
    def source_labels(self) -> np.ndarray:
        """Class of each image of the source, int32."""
        return relabel(self.experiment.images.pids[: self.source])

    @property
    def fixed(self) -> int:
        """Classes of the source."""
        return int(self.source_labels.max()) + 1

    def prepare(self, state: TrainState, kept: Mapping[str, Any] | None) -> tuple[TrainState, Mapping[str, Any]]:
        """Adds the source's norms, and the memory as shapes."""
        return super().prepare(train_state.with_source(state, self.experiment.optimiser), kept)

    def plan(self, labels: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and target turn about; the `pid` of an image is its row of the memory."""
        half, camids = self.experiment.config.batch_size // 2, self.experiment.images.camids
        known = self.classes(self.source_labels, camids[: self.source], epoch, batch_size=half, stream=SOURCE)
        found = self.classes(labels, self.clustered.camids, epoch, batch_size=half)
        rows = self.fixed + np.arange(len(labels), dtype=np.int32)
        return alternating(known, found + np.int32(self.source)), np.concatenate([self.source_labels, rows])

    def rows(self, run: RunState, epoch: int) -> TableRows:
        """Centroids of the source's classes, and the target's features; later only these are taken anew."""
        experiment, filling = self.experiment, self.filling()
        if epoch:
            assert isinstance(run.state.memory, hybrid.Memory)
            stored = hybrid.stored_features(run.state.memory)
            assert stored is not None
            filling.write(0, stored.fetch(0, self.fixed))
            for start, features in self.extract(run.state, self.clustered, None):
                filling.write(self.fixed + start, features)
            return filling.finish()
        sums = np.zeros((self.fixed, experiment.model.feature_dim), np.float32)
        for start, features in self.extract(run.state, experiment.images, experiment.cache):
            known = features[: max(self.source - start, 0)]
            np.add.at(sums, self.source_labels[start : start + len(known)], known)
            filling.write(self.fixed + max(start - self.source, 0), features[len(known) :])
        filling.write(0, unit_rows_np(sums))
        return filling.finish()
