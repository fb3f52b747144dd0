"""Self-paced contrastive learning without labels (Ge et al. 2020), the paper's pre-training.

Every epoch clusters the memory, makes pseudo-labels of clusters and un-clustered images, and contrasts batches with the
memory. The memory is filled once, from the network that training starts from.
"""

import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dmosnet_jax.core.mesh import to_host
from dmosnet_jax.data.samplers import class_epoch
from dmosnet_jax.memory import clustering, hybrid
from dmosnet_jax.recipes.splits import say
from dmosnet_jax.recipes.training import TrainingRun
from dmosnet_jax.train.state import TrainState
from dmosnet_jax.train.steps import Step, spcl_step


class SpclRun(TrainingRun):
    """SpCL over the training split; identities, where there are any, are not looked at."""

    _threshold: float | None = None

    def num_classes(self) -> int:
        """No classifier."""
        return 0

    def default_steps_per_epoch(self) -> int:
        """Batches that hold every image once."""
        return len(self.split.pids) // self.config.batch_size

    def prepare(self, state: TrainState, meta: Mapping[str, Any] | None) -> TrainState:
        """Adds the memory: features of every image, or on resuming a table of the right size to restore into."""
        images = len(self.split.pids)
        if meta is None:
            features = self.extractor(state.params, state.stats, self.split, label="memory", cache=self.cache)
            features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        else:
            self._threshold = meta["indep_threshold"]
            features = np.zeros((images, self.model.feature_dim), np.float32)
        memory = hybrid.init(
            features,
            np.arange(images),
            momentum=self.config.spcl.momentum,
            temperature=self.config.spcl.temperature,
            mesh=self.mesh,
        )
        return state.replace(memory=memory)

    def make_step(self) -> Step:
        """Contrast with the memory."""
        return spcl_step(self.model, self.optimiser, self.config)

    def loop_values(self) -> dict[str, Any]:
        """The independence threshold of the first epoch, which all later ones keep."""
        return {"indep_threshold": self._threshold}

    def begin_epoch(self, state: TrainState, epoch: int, offset: int) -> tuple[TrainState, Any, Mapping[str, float]]:
        """Clusters the memory and plans the epoch; in the middle of one, takes the pseudo-labels from the memory."""
        assert state.memory is not None
        images = state.memory.num_rows
        notes: dict[str, float] = {}
        if offset:
            labels = np.asarray(state.memory.labels)[:images]
        else:
            labels, notes = self._cluster(state.memory, epoch)
            state = state.replace(memory=hybrid.set_labels(state.memory, labels))
        plan = class_epoch(
            labels,
            self.split.camids if self._has_cameras() else None,
            batch_size=self.config.batch_size,
            instances=self.config.sampler.instances,
            seed=self.config.seed,
            epoch=epoch,
            steps=self.schedule.steps_per_epoch,
        )
        return state, self.stream(plan, epoch=epoch, start=offset, labels=labels), notes

    def _has_cameras(self) -> bool:
        return bool(len(np.unique(self.split.camids)) > 1)

    def _cluster(self, memory: hybrid.Memory, epoch: int) -> tuple[np.ndarray, dict[str, float]]:
        since = time.perf_counter()
        settings = self.config.spcl
        found = clustering.cluster(
            to_host(memory.features)[: memory.num_rows],
            k1=settings.k1,
            k2=settings.k2,
            eps=settings.eps,
            eps_gap=settings.eps_gap,
            min_samples=settings.min_samples,
            indep_threshold=self._threshold,
        )
        labels, threshold = _same_everywhere(found.labels, float(found.indep_threshold))
        self._threshold = threshold
        seconds = time.perf_counter() - since
        stages = ", ".join(f"{name} {value:.1f}" for name, value in found.seconds.items())
        say(
            f"epoch {epoch + 1}: {found.num_clusters} clusters, {found.num_unclustered} un-clustered images, largest "
            f"cluster {found.largest_cluster}, threshold {self._threshold:.4f}, {seconds:.1f} s ({stages})"
        )
        return labels, {
            "clusters": found.num_clusters,
            "unclustered": found.num_unclustered,
            "largest_cluster": found.largest_cluster,
            "indep_threshold": self._threshold,
            **{f"seconds_{name}": value for name, value in found.seconds.items()},
        }


def _same_everywhere(labels: np.ndarray, threshold: float) -> tuple[np.ndarray, float]:
    """Process 0's result: hosts that differ in a last bit must not train on different labels."""
    if jax.process_count() == 1:
        return labels, threshold
    from jax.experimental import multihost_utils

    labels, exact = multihost_utils.broadcast_one_to_all((labels, np.float32(threshold)))
    return np.asarray(labels), float(exact)


def run(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs the recipe; returns the contents of `results.json`, empty for a data set without queries."""
    return SpclRun(config, workdir).run()
