"""Self-paced contrastive learning without labels (Ge et al. 2020), the paper's pre-training.

Every epoch clusters the memory, makes pseudo-labels of clusters and un-clustered images, and contrasts batches with the
memory. The memory is filled once, from the network that training starts from; `spcl.reextract` fills it anew before
each clustering. With `spcl.memory` "cluster" or "cluster_hardest" it holds centroids instead (Cluster Contrast, Dai et
al. 2021): features are extracted before each epoch, and images outside of clusters are left out.
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.parallel import agree
from dmosnet_jax.data.loading import ImageCache
from dmosnet_jax.data.pipeline import Batches
from dmosnet_jax.data.samplers import class_epoch
from dmosnet_jax.data.splits import Rows
from dmosnet_jax.evaluation.report import Clusters
from dmosnet_jax.memory import cluster, hybrid
from dmosnet_jax.memory.tables import Filling, TableRows
from dmosnet_jax.recipes import feature_pass, pseudo_labels
from dmosnet_jax.recipes.datasets import training_images
from dmosnet_jax.recipes.dry_run import describe
from dmosnet_jax.recipes.network import settings_of
from dmosnet_jax.recipes.training import Experiment, open_experiment, train
from dmosnet_jax.train.state import RunState, TrainState
from dmosnet_jax.train.steps import spcl_step
from dmosnet_jax.train.turns import Turns

# Values of `spcl.memory`: the module of the memory, and settings of its own.
_MEMORIES: dict[str, tuple[ModuleType, dict[str, Any]]] = {
    "image": (hybrid, {}),
    "cluster": (cluster, {"hardest": False}),
    "cluster_hardest": (cluster, {"hardest": True}),
}


def run(config: Any, workdir: pathlib.Path, *, dry: bool = False) -> dict[str, Any]:
    """Runs the recipe; returns the contents of `results.json`, empty for a data set without queries.

    A `dry` run only prints what the recipe needs.

    Raises:
        ConfigError: settings that do not fit the data or the devices.
        DataError: data or weights missing or damaged.
    """
    experiment = open_experiment(config, workdir, training_images(config), num_classes=0)
    settings = experiment.config.spcl
    memory, own = _MEMORIES[settings.memory]
    epochs = Epochs(experiment, memory, own)
    turns = turns_of(experiment, experiment.config.batch_size)
    step = spcl_step(experiment.model, experiment.optimiser, experiment.config, memory=memory, turns=turns)
    if dry:
        return describe(experiment, step, epochs.begin, **epochs.hooks())
    results = train(experiment, step, epochs.begin, clusters=epochs.shown, **epochs.hooks())
    feature_pass.clear(workdir)
    return results


def turns_of(experiment: Experiment, images: int) -> Turns:
    """The turns that a step's `images` of one domain take.

    Raises:
        ConfigError: `spcl.groups_at_once` does not fit the batch and the devices.
    """
    groups, group = experiment.config.spcl.groups_at_once, experiment.model.bn_group_size
    return Turns.of(groups, group, images, experiment.mesh)


@dataclasses.dataclass(frozen=True)
class HostValues:
    """What a checkpoint keeps beside the arrays.

    Attributes:
        capacity: classes that the memory's tables were made for, None for as many as images.
        indep_threshold: independence threshold of the first epoch, which all later ones keep; None before it.
    """

    capacity: int | None = None
    indep_threshold: float | None = None

    @classmethod
    def saved(cls, kept: Mapping[str, Any]) -> "HostValues":
        """Those of a checkpoint; what only earlier versions kept is left out."""
        return cls(**{field.name: kept[field.name] for field in dataclasses.fields(cls) if field.name in kept})


@dataclasses.dataclass(frozen=True)
class Epochs:
    """What an epoch of SpCL is. Identities, where there are any, only serve to log how good the clusters are.

    Attributes:
        experiment: what is trained.
        memory: module of the memory.
        memory_settings: settings of its own.
    """

    experiment: Experiment
    memory: ModuleType
    memory_settings: Mapping[str, Any]

    @property
    def clustered(self) -> Rows:
        """The images that are clustered; their rows are the memory's last ones."""
        return self.experiment.images

    @property
    def fixed(self) -> int:
        """Classes that are known and stay; each has one row of the memory, before those of images."""
        return 0

    def hooks(self) -> dict[str, Any]:
        """What `training.train` asks of a recipe beside its epochs."""
        own = {"before_step": self.refresh, "end_epoch": self.end, "compact": self.compact}
        return {"prepare": self.prepare, "begins_with": "clustering", **own}

    def end(self, run: RunState) -> Mapping[str, float]:
        """Figures of the memory at the end of an epoch."""
        return self.memory.diagnostics(run.state.memory)

    def compact(self, state: TrainState) -> TrainState:
        """Without class sums, in a state before a step, or an epoch, that rebuilds them anyway.

        Elsewhere they are kept: their rounding would make the run another one.
        """
        if state.memory is None or not (self._starts_epoch(int(state.step)) or self._refreshes(int(state.step))):
            return state
        return state.replace(memory=state.memory.compacted())

    def refresh(self, state: TrainState, number: int) -> TrainState:
        """With class sums rebuilt at intervals, so that rounding does not accumulate over long epochs.

        A program of its own: within a step, in a branch that is seldom taken, its sums over the devices and those of
        the step may wait for each other on CPUs.
        """
        if self._starts_epoch(number) or not self._refreshes(number):
            return state
        return state.replace(memory=self.memory.refresh(state.memory))

    def _starts_epoch(self, number: int) -> bool:
        return number % self.experiment.lengths.steps_per_epoch == 0

    def _refreshes(self, number: int) -> bool:
        every = self.experiment.config.spcl.refresh_every_steps
        return bool(every) and number % every == 0

    def prepare(self, state: TrainState, kept: Mapping[str, Any] | None) -> tuple[TrainState, Mapping[str, Any]]:
        """Adds the memory as shapes: a checkpoint is restored into them, or the first epoch fills them."""
        experiment, settings = self.experiment, self.experiment.config.spcl
        images, dim = len(self.clustered), experiment.model.feature_dim
        pseudo_labels.check_memory(images, dim, settings)
        # Tables of the checkpoint's size; the next epoch makes new ones of the configured size.
        values = HostValues(self._capacity) if kept is None else HostValues.saved(kept)
        memory = self.memory.shapes(
            self.fixed + images,
            dim,
            momentum=settings.momentum,
            temperature=settings.temperature,
            capacity=values.capacity,
            mesh=experiment.mesh,
            **self.memory_settings,
        )
        return state.replace(memory=memory), dataclasses.asdict(values)

    def begin(self, run: RunState, epoch: int, offset: int) -> tuple[RunState, Batches, Mapping[str, float]]:
        """Clusters the memory and plans the epoch; resumed within one, takes the pseudo-labels from the memory."""
        experiment = self.experiment
        notes: dict[str, float] = {}
        if offset:
            memory = run.state.memory
            assert memory is not None
            labels = np.asarray(memory.labels)[self.fixed : memory.num_rows] - self.fixed
            feature_pass.clear(experiment.workdir)
        else:
            run, labels, notes = self._cluster(run, epoch)
        plan, names = self.plan(labels, epoch)
        return run, experiment.stream(plan, epoch=epoch, start=offset, labels=names), notes

    def plan(self, labels: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The images of each batch, int32 [steps, B], and what the batches give as the `pid` of each image."""
        return self.classes(labels, self.clustered.camids, epoch, batch_size=self.experiment.config.batch_size), labels

    def classes(self, labels: np.ndarray, camids: np.ndarray, epoch: int, **options: int) -> np.ndarray:
        """`class_epoch` by the run's settings."""
        config = self.experiment.config
        # Where there is but one camera, or the run ignores them, no positive is better than another.
        cameras = camids if config.sampler.cameras and len(np.unique(camids)) > 1 else None
        lengths = {"instances": config.sampler.instances, "steps": self.experiment.lengths.steps_per_epoch}
        return class_epoch(labels, cameras, seed=config.seed, epoch=epoch, **lengths, **options)

    def rows(self, run: RunState, epoch: int) -> TableRows:
        """The memory's rows from the network as it is now."""
        del epoch
        filling = self.filling()
        for start, features in self.extract(run.state, self.experiment.images, self.experiment.cache):
            filling.write(start, features)
        return filling.finish()

    def filling(self) -> Filling:
        """The memory's rows, none of them there yet."""
        experiment = self.experiment
        return Filling(self.fixed + len(self.clustered), experiment.model.feature_dim, experiment.mesh)

    def extract(self, state: TrainState, images: Rows, cache: ImageCache | None) -> Iterator[tuple[int, np.ndarray]]:
        """Unit features of images, piece by piece; see `feature_pass.extract`."""
        experiment, config = self.experiment, self.experiment.config
        inputs = tuple(config.pixel_mean), tuple(config.pixel_std), config.data.interpolation
        about = repr((settings_of(experiment.model), *inputs, config.eval.runtime))
        return feature_pass.extract(
            experiment.extractor, state.params, state.stats, images, experiment.workdir, cache=cache, about=about
        )

    def shown(self) -> Clusters | None:
        """The last epoch's clusters for the report."""
        return pseudo_labels.kept_clusters(self.experiment.workdir, self.clustered)

    @property
    def _capacity(self) -> int | None:
        most = self.experiment.config.spcl.max_classes
        return None if most is None else self.fixed + most

    def _cluster(self, run: RunState, epoch: int) -> tuple[RunState, np.ndarray, dict[str, float]]:
        """New pseudo-labels: the run with its memory set to them, the labels, and what to log."""
        experiment, settings = self.experiment, self.experiment.config.spcl
        since, memory = time.perf_counter(), run.state.memory
        stored = self.memory.stored_features(memory) if epoch and not settings.reextract else None
        if stored is None:
            rows = fresh = self.rows(run, epoch)
        else:
            rows, fresh = stored, None
            feature_pass.clear(experiment.workdir)
        eps = pseudo_labels.radius(settings, epoch, experiment.lengths.epochs)
        threshold = run.meta["loop"]["indep_threshold"]
        images = dataclasses.replace(rows, start=self.fixed)
        found = pseudo_labels.run_clustering(
            images, settings, eps=eps, threshold=threshold, mesh=experiment.mesh, workdir=experiment.workdir
        )
        labels, capacity = self.memory.class_labels(found), self._capacity or rows.stop
        every = np.concatenate([np.arange(self.fixed, dtype=labels.dtype), labels + self.fixed])
        if epoch == experiment.lengths.epochs - 1:
            features, target = images.on_first, self.clustered
            agree(lambda: pseudo_labels.keep_clusters(experiment.workdir, features, labels, target, epoch=epoch))
        try:
            memory = self.memory.set_labels(memory, every, features=fresh, capacity=capacity)
        except ConfigError as error:
            raise ConfigError(f"{error}: --config.spcl.max_classes={settings.max_classes} is too low") from error
        pids, camids = self.clustered.pids, self.clustered.camids
        notes = pseudo_labels.report(found, labels, pids, camids, epoch=epoch, eps=eps, since=since)
        kept = HostValues(self._capacity, found.indep_threshold)
        return run.replace(state=run.state.replace(memory=memory), **dataclasses.asdict(kept)), labels, notes
