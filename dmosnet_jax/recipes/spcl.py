"""Self-paced contrastive learning without labels (Ge et al. 2020), the paper's pre-training.

Every epoch clusters the memory, makes pseudo-labels of clusters and un-clustered images, and contrasts batches with the
memory. The memory is filled once, from the network that training starts from; `spcl.reextract` fills it anew before
each clustering. With `spcl.memory` "cluster" or "cluster_hardest" it holds centroids instead (Cluster Contrast, Dai et
al. 2021): features are extracted before each epoch, and images outside of clusters are left out.
"""

import functools
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.mesh import to_host
from dmosnet_jax.data.samplers import class_epoch
from dmosnet_jax.memory import centroids, hybrid
from dmosnet_jax.memory.capacity import with_capacity
from dmosnet_jax.recipes import feature_pass, pseudo_labels
from dmosnet_jax.recipes.training import TrainingRun
from dmosnet_jax.recipes.weights import settings_of
from dmosnet_jax.train.state import TrainState
from dmosnet_jax.train.steps import Batch, Metrics, Step, spcl_step


class SpclRun(TrainingRun):
    """SpCL over the training split; identities, where there are any, only tell how good the clusters are."""

    _threshold: float | None = None
    _capacity: int | None = None
    _steps_taken = 0

    def num_classes(self) -> int:
        """No classifier."""
        return 0

    def default_steps_per_epoch(self) -> int:
        """Batches that hold every image once."""
        return len(self.split.pids) // self.config.batch_size

    def prepare(self, state: TrainState, meta: Mapping[str, Any] | None) -> TrainState:
        """Adds the memory: features of every image, or on resuming a table of the right size to restore into."""
        images, settings = len(self.split.pids), self.config.spcl
        pseudo_labels.announce(images, self.model.feature_dim, settings)
        self._capacity = settings.max_classes
        if meta is None:
            features = self._extract(state)
        else:
            self._threshold = meta["indep_threshold"]
            # As they were: the next epoch makes tables of the size that is asked for now.
            self._capacity = meta.get("capacity", settings.max_classes)
            self._check_same_memory(meta)
            features = np.zeros((images, self.model.feature_dim), np.float32)
        memory = hybrid.init(
            features,
            # Until the first clustering.
            np.zeros(images, np.int32),
            momentum=settings.momentum,
            temperature=settings.temperature,
            capacity=self._capacity,
            multiple=self._multiple(),
            mesh=self.mesh,
        )
        return state.replace(memory=memory)

    def _check_same_memory(self, meta: Mapping[str, Any]) -> None:
        now, then = self.config.spcl.memory, meta.get("memory", "image")
        if now != then:
            raise ConfigError(
                f"spcl.memory={now!r} (was {then!r} in this run): give another --workdir or the earlier setting"
            )

    def _multiple(self) -> int:
        """Rows that every table length is a multiple of, so that it divides over any number of devices."""
        return math.lcm(hybrid.PADDING, self.mesh.size)

    def make_step(self) -> Step:
        """Contrast with the memory."""
        moves: dict[str, Callable[..., hybrid.Memory]] = {
            "image": hybrid.update,
            "cluster": centroids.update,
            "cluster_hardest": functools.partial(centroids.update, hardest=True),
        }
        return spcl_step(self.model, self.optimiser, self.config, update=moves[self.config.spcl.memory])

    def finish_step(self, step: Step) -> Step:
        """Rebuilds the class sums from time to time, so that rounding does not collect over long epochs."""
        every = self.config.spcl.refresh_every_steps
        if self._has_centroids() or not every:
            return step

        def refreshing(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            # An epoch starts with new sums anyway.
            if self._steps_taken % every == 0 and self._steps_taken % self.schedule.steps_per_epoch:
                assert state.memory is not None
                state = state.replace(memory=hybrid.refresh(state.memory))
            self._steps_taken += 1
            return step(state, batch)

        return refreshing

    def loop_values(self) -> dict[str, Any]:
        """The independence threshold of the first epoch, which all later ones keep, and what the memory is."""
        return {"indep_threshold": self._threshold, "capacity": self._capacity, "memory": self.config.spcl.memory}

    def begin_epoch(self, state: TrainState, epoch: int, offset: int) -> tuple[TrainState, Any, Mapping[str, float]]:
        """Clusters the memory and plans the epoch; in the middle of one, takes the pseudo-labels from the memory."""
        assert state.memory is not None
        self._steps_taken = epoch * self.schedule.steps_per_epoch + offset
        notes: dict[str, float] = {}
        if offset:
            labels = np.asarray(state.memory.labels)[: state.memory.num_rows]
        else:
            state, labels, notes = self._cluster(state, epoch)
        if offset or (epoch and not self._extracts_anew()):
            feature_pass.clear(self.workdir)
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

    def _has_centroids(self) -> bool:
        return self.config.spcl.memory != "image"

    def _extracts_anew(self) -> bool:
        return self.config.spcl.reextract or self._has_centroids()

    def _extract(self, state: TrainState) -> np.ndarray:
        about = repr((settings_of(self.model), tuple(self.config.pixel_mean), tuple(self.config.pixel_std)))
        return feature_pass.extract(
            self.extractor, state.params, state.stats, self.split, self.workdir, cache=self.cache, about=about
        )

    def _cluster(self, state: TrainState, epoch: int) -> tuple[TrainState, np.ndarray, dict[str, float]]:
        """New pseudo-labels: the state with its memory set to them, the labels, and what to log."""
        since, settings, memory = time.perf_counter(), self.config.spcl, state.memory
        assert memory is not None
        drift: dict[str, float] = {}
        if epoch and not self._has_centroids():
            drift = {"class_sum_drift": float(hybrid.drift(memory))}
        if epoch and self._extracts_anew():
            features = self._extract(state)
            memory = hybrid.set_features(memory, features)
        else:
            # The network has not moved since `prepare` filled the memory, or the memory is what is clustered.
            features = to_host(memory.features)[: memory.num_rows]
        eps = pseudo_labels.radius(settings, epoch, self.schedule.epochs)
        found = pseudo_labels.find(
            features, settings, eps=eps, threshold=self._threshold, mesh=self.mesh, workdir=self.workdir
        )
        self._threshold = float(found.indep_threshold)
        labels = found.dbscan if self._has_centroids() else found.labels
        if self._capacity != settings.max_classes:
            memory = with_capacity(memory, settings.max_classes, multiple=self._multiple())
            self._capacity = settings.max_classes
        try:
            if self._has_centroids():
                memory = centroids.begin(memory, features, labels)
            else:
                memory = hybrid.set_labels(memory, labels)
        except ConfigError as error:
            raise ConfigError(f"{error}: --config.spcl.max_classes={settings.max_classes} is too low") from error
        notes = pseudo_labels.report(
            found, labels, self.split.pids, self.split.camids, epoch=epoch, eps=eps, since=since
        )
        return state.replace(memory=memory), labels, notes | drift


def run(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs the recipe; returns the contents of `results.json`, empty for a data set without queries."""
    return SpclRun(config, workdir).run()
