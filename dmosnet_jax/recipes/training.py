"""What the training recipes share: model and weights, optimiser, resume, loop, final scores."""

import abc
import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.mesh import check_batch, make_mesh
from dmosnet_jax.core.selection import dataset_names, joined
from dmosnet_jax.core.settings import REFUSED, TOLD, changes
from dmosnet_jax.data.autoaugment import AutoAugment
from dmosnet_jax.data.pipeline import TrainStream
from dmosnet_jax.data.splits import Rows
from dmosnet_jax.export import opening
from dmosnet_jax.export.opening import describe_run, open_weights
from dmosnet_jax.models import Model
from dmosnet_jax.recipes import scoring, targets
from dmosnet_jax.recipes.splits import chosen_rows, evaluated, say, training_images
from dmosnet_jax.recipes.weights import HEAD, as_trained, build_for, settings_of, start_from
from dmosnet_jax.train import optim
from dmosnet_jax.train import state as train_state
from dmosnet_jax.train.checkpoints import Checkpoints, latest_meta
from dmosnet_jax.train.loop import Loop, Schedule
from dmosnet_jax.train.metrics import write_json
from dmosnet_jax.train.state import TrainState
from dmosnet_jax.train.steps import Step, compile_step


class TrainingRun(abc.ABC):
    """A training recipe bound to a config and a workdir; subclasses say what an epoch and a step are."""

    def __init__(self, config: Any, workdir: pathlib.Path):
        """Opens the data, builds the model and the optimiser; nothing is trained yet.

        Raises:
            ConfigError: settings that do not fit the data or the devices.
            DataError: data or weights missing or damaged.
        """
        self.workdir = workdir
        # A run that goes on has its network from its checkpoint: the weights that it started from may be gone.
        begun = latest_meta(workdir)
        self.weights: opening.Opened | None = None
        if begun is not None:
            self.weights = describe_run(workdir, begun)
        elif config.pretrained:
            self.weights = open_weights(config.pretrained)
        free = HEAD if begun is None else opening.PARTS
        self.config = config = as_trained(config, self.weights)
        self.split: Rows = training_images(config)
        self.mesh: Mesh = make_mesh()
        check_batch(config.batch_size, self.mesh)
        self.model: Model = build_for(config, self.weights, num_classes=self.num_classes(), free=free)
        self.schedule = self._make_schedule()
        rate = optim.learning_rate(
            config.optim,
            steps_per_epoch=self.schedule.steps_per_epoch,
            total_steps=self.schedule.total_steps,
            batch_size=config.batch_size,
        )
        self.optimiser = optim.make_optimiser(config.optim, rate)
        self.extractor = scoring.make_extractor(config, self.model, self.mesh)
        self.cache = scoring.image_cache(config, self.split)
        self._targets: targets.Targets | None = None
        self._last_scores: dict[str, scoring.Scores] | None = None

    # What a recipe adds.

    @abc.abstractmethod
    def num_classes(self) -> int:
        """Classifier size, 0 for none."""

    @abc.abstractmethod
    def default_steps_per_epoch(self) -> int:
        """Steps of an epoch where the config does not say."""

    @abc.abstractmethod
    def prepare(self, state: TrainState, meta: Mapping[str, Any] | None) -> TrainState:
        """Completes a fresh state (`meta` None), or takes host values from a checkpoint's before it is restored."""

    @abc.abstractmethod
    def make_step(self) -> Step:
        """The pure training step."""

    @abc.abstractmethod
    def begin_epoch(self, state: TrainState, epoch: int, offset: int) -> tuple[TrainState, Any, Mapping[str, float]]:
        """See `loop.Recipe`."""

    def finish_step(self, step: Step) -> Step:
        """What is called for each batch, given the compiled step."""
        return step

    def loop_values(self) -> dict[str, Any]:
        """Host values that a checkpoint must keep."""
        return {}

    # What the loop asks for.

    def meta(self) -> dict[str, Any]:
        """See `loop.Recipe`."""
        return {
            "model": settings_of(self.model),
            "config": _plain(self.config),
            "loop": self.loop_values(),
            "lengths": self._fixed_lengths(),
        }

    def _fixed_lengths(self) -> dict[str, int]:
        """What must stay as it is over a run, or its epochs would shift."""
        lengths = {"steps_per_epoch": self.schedule.steps_per_epoch, "images": len(self.split.pids)}
        rows = chosen_rows(self.split)
        return lengths if rows is None else {**lengths, "subset": rows}

    def files(self, indices: np.ndarray) -> list[str]:
        """See `loop.Recipe`."""
        return self.split.filenames(indices)

    def evaluate(self, state: TrainState, epoch: int) -> Mapping[str, float] | None:
        """See `loop.Recipe`; data sets without a query split are not scored."""
        names = evaluated(self.config)
        if not names:
            return None
        if self._targets is None:
            self._targets = targets.Targets(self.config, self.model, self.mesh, names, extractor=self.extractor)
            self._targets.keep_images()
        self._last_scores = self._targets(state.params, state.stats)
        say(f"epoch {epoch}: {targets.summary(self._last_scores)}")
        return targets.metrics(self._last_scores)

    def stream(self, plan: np.ndarray, *, epoch: int, start: int, labels: np.ndarray | None) -> TrainStream:
        """Training batches of an epoch's plan from step `start` on."""
        share = self.config.augment.autoaugment
        return TrainStream(
            self.split,
            plan,
            image_size=self.model.image_size,
            interpolation=self.config.data.interpolation,
            threads=self.config.data.threads,
            workers=0 if self.cache is not None else self.config.data.workers,
            start=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            labels=labels,
            cache=self.cache,
            policy=AutoAugment(share, self.config.seed, epoch) if share else None,
        )

    # The run.

    def run(self) -> dict[str, Any]:
        """Trains from the newest checkpoint, or from the start, to the end; returns the final results."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        with alone(self.workdir):
            return self._finish(self._train())

    def _train(self) -> TrainState:
        store = Checkpoints(self.workdir, keep=self.config.train.keep)
        try:
            state = self._initial_state(store)
            if jax.process_index() == 0:
                write_json(self.workdir / "config.json", _plain(self.config))
            loop = Loop(
                self,
                self.finish_step(compile_step(self.make_step(), state, self.mesh)),
                self.schedule,
                mesh=self.mesh,
                workdir=self.workdir,
                checkpoints=store,
                batch_size=self.config.batch_size,
            )
            return loop.run(state)
        finally:
            store.close()

    def _initial_state(self, store: Checkpoints) -> TrainState:
        latest = store.latest()
        if latest is not None:
            return self._resume(store, latest)
        key = jax.random.key(self.config.seed)
        if self.weights is None:
            params, stats = self.model.init(key)
        else:
            params, stats, fresh = start_from(self.weights, self.model, key)
            say(f"starts from {self.weights.path}" + (f"; drawn afresh: {', '.join(fresh)}" if fresh else ""))
        state = train_state.create(params, stats, self.optimiser, seed=self.config.seed, mesh=self.mesh)
        say(f"{self.model.name}: {sum(x.size for x in jax.tree.leaves(params)):,} parameters, {self._lengths()}")
        if not evaluated(self.config):
            say(f"{self.split.name} has no query and gallery: the run is not scored")
        return self.prepare(state, None)

    def _resume(self, store: Checkpoints, step: int) -> TrainState:
        meta = store.meta(step)
        self._check_same_run(meta, step)
        params, stats = self.model.shapes()
        state = train_state.shapes(params, stats, self.optimiser)
        state = store.restore(self.prepare(state, meta["loop"]), step, self.mesh)
        say(f"goes on from step {step} of {self.schedule.total_steps} in {self.workdir}")
        return state

    def _check_same_run(self, meta: Mapping[str, Any], step: int) -> None:
        """Refuses to continue a run under settings that would make it another one."""
        now, then = _plain(settings_of(self.model)), meta.get("model", {})
        changed = [
            f"model.{k}={now[k]!r} (was {then[k]!r})" for k in now if k in then and k != "dtype" and now[k] != then[k]
        ]
        config, before = _plain(self.config), meta.get("config", {})
        for fields in (config, before):
            # A tuple of names is the same as names joined by +.
            fields.setdefault("with_val", False)
            fields["dataset"] = joined(dataset_names(fields["dataset"])) if fields.get("dataset") else None
        differences = changes(before, config)
        changed += differences[REFUSED]
        lengths = meta.get("lengths", {})
        found = self._fixed_lengths()
        changed += [f"{k}={found[k]} (was {lengths[k]})" for k in found if k in lengths and lengths[k] != found[k]]
        if changed:
            raise DataError(
                f"{self.workdir}: its checkpoint at step {step} is of another run: {'; '.join(changed)}; give another "
                "--workdir or the earlier settings"
            )
        if differences[TOLD]:
            say(f"goes on with {', '.join(differences[TOLD])}")

    def _finish(self, state: TrainState) -> dict[str, Any]:
        say(f"trained {int(state.step)} steps; checkpoints in {self.workdir / 'checkpoints'}")
        if not evaluated(self.config):
            return {}
        if self._last_scores is None:
            # The last epoch was finished by an earlier process.
            self.evaluate(state, self.schedule.epochs)
        assert self._last_scores is not None
        extra = {"step": int(state.step), "with_val": bool(self.config.get("with_val"))}
        return targets.publish(self._last_scores, self.workdir, self.config, model=self.model.name, extra=extra)

    def _make_schedule(self) -> Schedule:
        train = self.config.train
        steps = train.steps_per_epoch or self.default_steps_per_epoch()
        if steps < 1:
            raise ConfigError(
                f"batch_size={self.config.batch_size} is larger than the {len(self.split.pids)} training images of "
                f"{self.split.name}: lower batch_size"
            )
        return Schedule(
            steps_per_epoch=steps,
            epochs=train.epochs,
            log_every=train.log_every_steps,
            checkpoint_every=train.checkpoint_every_steps,
            eval_every_epochs=train.eval_every_epochs,
        )

    def _lengths(self) -> str:
        return (
            f"{len(self.split.pids):,} images, {self.schedule.epochs} epochs of {self.schedule.steps_per_epoch} steps "
            f"of {self.config.batch_size}, devices: {self.mesh.size} {self.mesh.devices.flat[0].device_kind}"
        )


@contextlib.contextmanager
def alone(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir for this run; the system lets go when the process ends, however that happens.

    Raises:
        ConfigError: another process works there.
    """
    folder = os.open(workdir, os.O_RDONLY)
    try:
        if jax.process_index() == 0:
            _lock(folder, workdir)
        yield
    finally:
        os.close(folder)


def _lock(folder: int, workdir: pathlib.Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"{workdir}: another process works there: wait for it, or give another --workdir") from error
    except OSError:
        # Some network file systems have no locks; there it is up to the user.
        return


def _plain(value: Any) -> Any:
    """A config as JSON values: tuples become lists, as they come back from a checkpoint."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
