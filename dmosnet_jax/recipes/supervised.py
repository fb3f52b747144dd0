"""Training with identities: the paper's fine-tuning (section 4.2)."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data.samplers import identity_epoch
from dmosnet_jax.data.splits import relabel
from dmosnet_jax.recipes.training import TrainingRun
from dmosnet_jax.train.state import TrainState
from dmosnet_jax.train.steps import Step, supervised_step


class SupervisedRun(TrainingRun):
    """P x K batches of identities; an epoch is one pass of the identity sampler."""

    def num_classes(self) -> int:
        """Identities of the training split."""
        if self.split.pids.min() < 0:
            raise DataError(f"{self.split.name}: training images without an identity; use the spcl recipe for them")
        self._labels = relabel(self.split.pids)
        # Whether the sampler can fill a batch must not wait for the first epoch.
        self._plan(epoch=0, steps=1)
        return int(self._labels.max()) + 1

    def default_steps_per_epoch(self) -> int:
        """Batches that one pass over the images fills."""
        return len(self.split.pids) // self.config.batch_size

    def prepare(self, state: TrainState, meta: Mapping[str, Any] | None) -> TrainState:
        """Nothing to add."""
        del meta
        return state

    def make_step(self) -> Step:
        """Cross-entropy and triplet."""
        return supervised_step(self.model, self.optimiser, self.config)

    def begin_epoch(self, state: TrainState, epoch: int, offset: int) -> tuple[TrainState, Any, Mapping[str, float]]:
        """The epoch's batches."""
        plan = self._plan(epoch, self.schedule.steps_per_epoch)
        return state, self.stream(plan, epoch=epoch, start=offset, labels=self._labels), {}

    def _plan(self, epoch: int, steps: int) -> np.ndarray:
        return identity_epoch(
            self._labels,
            self.split.camids,
            batch_size=self.config.batch_size,
            instances=self.config.sampler.instances,
            seed=self.config.seed,
            epoch=epoch,
            steps=steps,
        )


def run(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs the recipe; returns the contents of `results.json`."""
    return SupervisedRun(config, workdir).run()
