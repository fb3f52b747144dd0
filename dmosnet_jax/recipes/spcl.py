"""Self-paced contrastive learning without labels (Ge et al. 2020), the paper's pre-training.

Every epoch clusters the memory, makes pseudo-labels of clusters and un-clustered images, and contrasts batches with the
memory. The memory is filled once, from the network that training starts from; `spcl.reextract` fills it anew before
each clustering. With `spcl.memory` "cluster" or "cluster_hardest" it holds centroids instead (Cluster Contrast, Dai et
al. 2021): features are extracted before each epoch, and images outside of clusters are left out.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from jax import lax

from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.data.samplers import class_epoch
from dmosnet_jax.memory import cluster, hybrid
from dmosnet_jax.recipes import feature_pass, pseudo_labels
from dmosnet_jax.recipes.training import TrainingRun
from dmosnet_jax.recipes.weights import settings_of
from dmosnet_jax.train.state import TrainState
from dmosnet_jax.train.steps import Batch, Metrics, Step, spcl_step

# Values of `spcl.memory`: the module of the memory, and settings of its own.
_MEMORIES: dict[str, tuple[ModuleType, dict[str, Any]]] = {
    "image": (hybrid, {}),
    "cluster": (cluster, {"hardest": False}),
    "cluster_hardest": (cluster, {"hardest": True}),
}


@dataclasses.dataclass(frozen=True)
class HostValues:
    """What a checkpoint keeps beside the arrays.

    Attributes:
        memory: `spcl.memory` of the run.
        capacity: classes that the memory's tables were made for, None for as many as images.
        indep_threshold: independence threshold of the first epoch, which all later ones keep; None before it.
    """

    memory: str = "image"
    capacity: int | None = None
    indep_threshold: float | None = None


class SpclRun(TrainingRun):
    """SpCL over the training split; identities, where there are any, only tell how good the clusters are."""

    def __init__(self, config: Any, workdir: pathlib.Path):
        super().__init__(config, workdir)
        self.memory, self.memory_settings = _MEMORIES[config.spcl.memory]
        self.kept = HostValues(config.spcl.memory, config.spcl.max_classes)

    def num_classes(self) -> int:
        """No classifier."""
        return 0

    def default_steps_per_epoch(self) -> int:
        """Batches that hold every image once."""
        return len(self.split.pids) // self.config.batch_size

    def prepare(self, state: TrainState, meta: Mapping[str, Any] | None) -> TrainState:
        """Adds the memory as shapes: a checkpoint is restored into them, or the first epoch fills them."""
        images, settings = len(self.split.pids), self.config.spcl
        pseudo_labels.announce(images, self.model.feature_dim, settings)
        if meta is not None:
            # Tables as they were: the next epoch makes them of the size that is asked for now.
            self.kept = HostValues(**meta)
            if self.kept.memory != settings.memory:
                raise ConfigError(
                    f"spcl.memory={settings.memory!r} (was {self.kept.memory!r} in this run): give another --workdir "
                    "or the earlier setting"
                )
        memory = self.memory.shapes(
            images,
            self.model.feature_dim,
            momentum=settings.momentum,
            temperature=settings.temperature,
            capacity=self.kept.capacity,
            mesh=self.mesh,
            **self.memory_settings,
        )
        return state.replace(memory=memory)

    def make_step(self) -> Step:
        """Contrast with the memory."""
        step = spcl_step(self.model, self.optimiser, self.config, memory=self.memory)
        return refreshing(step, self.memory, self.config.spcl.refresh_every_steps, self.schedule.steps_per_epoch)

    def loop_values(self) -> dict[str, Any]:
        """See `HostValues`."""
        return dataclasses.asdict(self.kept)

    def begin_epoch(self, state: TrainState, epoch: int, offset: int) -> tuple[TrainState, Any, Mapping[str, float]]:
        """Clusters the memory and plans the epoch; in the middle of one, takes the pseudo-labels from the memory."""
        notes: dict[str, float] = {}
        if offset:
            assert state.memory is not None
            labels = np.asarray(state.memory.labels)[: state.memory.num_rows]
            feature_pass.clear(self.workdir)
        else:
            state, labels, notes = self._cluster(state, epoch)
        plan = class_epoch(
            labels,
            self._cameras(),
            batch_size=self.config.batch_size,
            instances=self.config.sampler.instances,
            seed=self.config.seed,
            epoch=epoch,
            steps=self.schedule.steps_per_epoch,
        )
        return state, self.stream(plan, epoch=epoch, start=offset, labels=labels), notes

    def run(self) -> dict[str, Any]:
        """Trains from the newest checkpoint, or from the start, to the end; returns the final results."""
        results = super().run()
        feature_pass.clear(self.workdir)
        return results

    def _cameras(self) -> np.ndarray | None:
        """Cameras that the sampler prefers to change, None where they do not count."""
        camids = self.split.camids
        return camids if self.config.sampler.cameras and len(np.unique(camids)) > 1 else None

    def _extract(self, state: TrainState) -> np.ndarray:
        about = repr((settings_of(self.model), tuple(self.config.pixel_mean), tuple(self.config.pixel_std)))
        return feature_pass.extract(
            self.extractor, state.params, state.stats, self.split, self.workdir, cache=self.cache, about=about
        )

    def _cluster(self, state: TrainState, epoch: int) -> tuple[TrainState, np.ndarray, dict[str, float]]:
        """New pseudo-labels: the state with its memory set to them, the labels, and what to log."""
        since, settings = time.perf_counter(), self.config.spcl
        notes = self.memory.diagnostics(state.memory) if epoch else {}
        stored = self.memory.stored_features(state.memory) if epoch and not settings.reextract else None
        if stored is None:
            features = extracted = self._extract(state)
        else:
            features, extracted = stored, None
            feature_pass.clear(self.workdir)
        eps = pseudo_labels.radius(settings, epoch, self.schedule.epochs)
        found = pseudo_labels.find(
            features, settings, eps=eps, threshold=self.kept.indep_threshold, mesh=self.mesh, workdir=self.workdir
        )
        labels, capacity = self.memory.class_labels(found), settings.max_classes or len(features)
        try:
            memory = self.memory.set_labels(state.memory, labels, features=extracted, capacity=capacity)
        except ConfigError as error:
            raise ConfigError(f"{error}: --config.spcl.max_classes={settings.max_classes} is too low") from error
        self.kept = HostValues(settings.memory, settings.max_classes, found.indep_threshold)
        notes |= pseudo_labels.report(
            found, labels, self.split.pids, self.split.camids, epoch=epoch, eps=eps, since=since
        )
        return state.replace(memory=memory), labels, notes


def refreshing(step: Step, memory: ModuleType, every: int, steps_per_epoch: int) -> Step:
    """The step, before which class sums are rebuilt from time to time: rounding does not collect over long epochs.

    Args:
        step: a pure step.
        memory: module of the state's memory.
        every: steps between two rebuilds, 0 for none. An epoch starts with new sums anyway.
        steps_per_epoch: where epochs start.
    """
    if not every:
        return step

    def refresh_and_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        due = (state.step % every == 0) & (state.step % steps_per_epoch != 0)
        return step(state.replace(memory=lax.cond(due, memory.refresh, lambda kept: kept, state.memory)), batch)

    return refresh_and_step


def run(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs the recipe; returns the contents of `results.json`, empty for a data set without queries."""
    return SpclRun(config, workdir).run()
