"""What the training recipes share: from a config to an open experiment, and from that to a trained network.

A recipe calls `open_experiment`, says what an epoch and a step are, and hands all of it to `train`.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dmosnet_jax.core.config import REFUSED, TOLD, changes, dataset_names, joined
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.parallel import check_batch, make_mesh, print_once
from dmosnet_jax.data.autoaugment import AutoAugment
from dmosnet_jax.data.loading import ImageCache
from dmosnet_jax.data.pipeline import Batches, train_batches
from dmosnet_jax.data.splits import Rows
from dmosnet_jax.evaluation.extract import Extractor
from dmosnet_jax.export import opening
from dmosnet_jax.export.opening import describe_run, open_weights
from dmosnet_jax.models import Model
from dmosnet_jax.recipes import scoring, targets
from dmosnet_jax.recipes.splits import chosen_rows, evaluated
from dmosnet_jax.recipes.weights import HEAD, as_trained, build_for, settings_of, start_from
from dmosnet_jax.train import loop, optim
from dmosnet_jax.train import state as train_state
from dmosnet_jax.train.checkpoints import Checkpoints, latest_meta
from dmosnet_jax.train.loop import Schedule
from dmosnet_jax.train.metrics import write_json
from dmosnet_jax.train.state import RunState, TrainState
from dmosnet_jax.train.steps import Step, compile_step


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config bound to its data, devices and network; nothing is trained yet.

    Attributes:
        config: with everything filled in that the weights decide.
        workdir: of the run.
        images: the training images.
        mesh: the devices.
        weights: what the network starts from, or a description of the run that goes on; None: drawn.
        model: the network.
        schedule: lengths and intervals.
        optimiser: with its learning rate.
        extractor: features of images, compiled once.
        cache: decoded training images, where they fit.
    """

    config: Any
    workdir: pathlib.Path
    images: Rows
    mesh: Mesh
    weights: opening.Opened | None
    model: Model
    schedule: Schedule
    optimiser: optax.GradientTransformation
    extractor: Extractor
    cache: ImageCache | None

    def meta(self, **loop_values: Any) -> dict[str, Any]:
        """What a checkpoint keeps beside the arrays; see `RunState`."""
        return {
            "model": settings_of(self.model),
            "config": _plain(self.config),
            "loop": loop_values,
            "lengths": self.lengths(),
        }

    def lengths(self) -> dict[str, int]:
        """What must stay as it is over a run, or its epochs would shift."""
        found = {"steps_per_epoch": self.schedule.steps_per_epoch, "images": len(self.images.pids)}
        rows = chosen_rows(self.images)
        return found if rows is None else {**found, "subset": rows}

    def stream(self, plan: np.ndarray, *, epoch: int, start: int, labels: np.ndarray | None) -> Batches:
        """Training batches of an epoch's plan from step `start` on."""
        share = self.config.augment.autoaugment
        return train_batches(
            self.images,
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


def open_experiment(config: Any, workdir: pathlib.Path, images: Rows, *, num_classes: int) -> Experiment:
    """Opens what a training run needs.

    Args:
        config: of the run.
        workdir: of the run; where it has begun, the network is that of its checkpoint, since the weights that it
            started from may be gone.
        images: the training images.
        num_classes: size of the classifier, 0 for none.

    Raises:
        ConfigError: settings that do not fit the data or the devices.
        DataError: weights missing or damaged.
    """
    begun = latest_meta(workdir)
    weights: opening.Opened | None = None
    if begun is not None:
        weights = describe_run(workdir, begun)
    elif config.pretrained:
        weights = open_weights(config.pretrained)
    config = as_trained(config, weights)
    mesh = make_mesh()
    check_batch(config.batch_size, mesh)
    model = build_for(config, weights, num_classes=num_classes, free=HEAD if begun is None else opening.PARTS)
    schedule = _schedule(config, images)
    rate = optim.learning_rate(
        config.optim,
        steps_per_epoch=schedule.steps_per_epoch,
        total_steps=schedule.total_steps,
        batch_size=config.batch_size,
    )
    return Experiment(
        config,
        workdir,
        images,
        mesh,
        weights,
        model,
        schedule,
        optim.make_optimiser(config.optim, rate),
        scoring.make_extractor(config, model, mesh),
        scoring.image_cache(config, images),
    )


def _schedule(config: Any, images: Rows) -> Schedule:
    steps = config.train.steps_per_epoch or len(images.pids) // config.batch_size
    if steps < 1:
        raise ConfigError(
            f"batch_size={config.batch_size} is larger than the {len(images.pids)} training images of {images.name}: "
            "lower batch_size"
        )
    return Schedule(
        steps_per_epoch=steps,
        epochs=config.train.epochs,
        log_every=config.train.log_every_steps,
        checkpoint_every=config.train.checkpoint_every_steps,
        eval_every_epochs=config.train.eval_every_epochs,
    )


BeginEpoch = Callable[[RunState, int, int], tuple[RunState, Batches, Mapping[str, float]]]
Prepare = Callable[[TrainState, Mapping[str, Any] | None], tuple[TrainState, Mapping[str, Any]]]


def train(experiment: Experiment, step: Step, begin_epoch: BeginEpoch, *, prepare: Prepare | None = None) -> dict:
    """Trains from the newest checkpoint, or from the start, to the end; returns the contents of `results.json`.

    Args:
        experiment: what is trained.
        step: the pure training step.
        begin_epoch: see `loop.Recipe`.
        prepare: completes a state with what is the recipe's own, as arrays or as shapes to restore into: from the state
            and the host values of a checkpoint, None for a fresh run, to the state and the host values.

    Raises:
        DataError: the workdir holds another run.
        StoppedError: a signal came; the state is saved.
    """
    workdir, mesh = experiment.workdir, experiment.mesh
    workdir.mkdir(parents=True, exist_ok=True)
    score = _Scoring(experiment)
    with locked(workdir), contextlib.closing(Checkpoints(workdir, keep=experiment.config.train.keep)) as store:
        run = _begin_or_go_on(experiment, store, prepare or (lambda state, kept: (state, {})))
        if jax.process_index() == 0:
            write_json(workdir / "config.json", _plain(experiment.config))
        recipe = loop.Recipe(compile_step(step, run.state, mesh), begin_epoch, score, experiment.images.filenames)
        run = loop.train(
            run,
            recipe,
            experiment.schedule,
            store,
            mesh=mesh,
            workdir=workdir,
            batch_size=experiment.config.batch_size,
        )
        store.wait()
        print_once(f"trained {int(run.state.step)} steps; checkpoints in {workdir / 'checkpoints'}")
        return score.publish(run)


def _begin_or_go_on(experiment: Experiment, store: Checkpoints, prepare: Prepare) -> RunState:
    """The run in its newest checkpoint, or a fresh one."""
    model, optimiser, schedule = experiment.model, experiment.optimiser, experiment.schedule
    step = store.latest()
    if step is not None:
        meta = store.meta(step)
        _check_same_run(experiment, meta, step)
        state, kept = prepare(train_state.shapes(*model.shapes(), optimiser), meta["loop"])
        state = store.restore(state, step, experiment.mesh)
        print_once(f"goes on from step {step} of {schedule.total_steps} in {experiment.workdir}")
        return RunState(state, experiment.meta(**kept))
    key = jax.random.key(experiment.config.seed)
    if experiment.weights is None:
        params, stats = model.init(key)
    else:
        params, stats, fresh = start_from(experiment.weights, model, key)
        print_once(f"starts from {experiment.weights.path}" + (f"; drawn afresh: {', '.join(fresh)}" if fresh else ""))
    state = train_state.create(params, stats, optimiser, seed=experiment.config.seed, mesh=experiment.mesh)
    print_once(
        f"{model.name}: {sum(x.size for x in jax.tree.leaves(params)):,} parameters, {len(experiment.images.pids):,} "
        f"images, {schedule.epochs} epochs of {schedule.steps_per_epoch} steps of {experiment.config.batch_size}, "
        f"devices: {experiment.mesh.size} {experiment.mesh.devices.flat[0].device_kind}"
    )
    if not evaluated(experiment.config):
        print_once(f"{experiment.images.name} has no query and gallery: the run is not scored")
    state, kept = prepare(state, None)
    return RunState(state, experiment.meta(**kept))


def _check_same_run(experiment: Experiment, meta: Mapping[str, Any], step: int) -> None:
    """Refuses to continue a run under settings that would make it another one, and tells what else has changed."""
    now, then = _plain(settings_of(experiment.model)), meta.get("model", {})
    changed = [
        f"model.{k}={now[k]!r} (was {then[k]!r})" for k in now if k in then and k != "dtype" and now[k] != then[k]
    ]
    config, before = _plain(experiment.config), dict(meta.get("config", {}))
    for fields in (config, before):
        # A tuple of names is the same as names joined by +.
        fields.setdefault("with_val", False)
        fields["dataset"] = joined(dataset_names(fields["dataset"])) if fields.get("dataset") else None
    found = changes(before, config)
    lengths, were = experiment.lengths(), meta.get("lengths", {})
    changed += found[REFUSED]
    changed += [f"{k}={lengths[k]} (was {were[k]})" for k in lengths if k in were and were[k] != lengths[k]]
    if changed:
        raise DataError(
            f"{experiment.workdir}: its checkpoint at step {step} is of another run: {'; '.join(changed)}; give "
            "another --workdir or the earlier settings"
        )
    if found[TOLD]:
        print_once(f"goes on with {', '.join(found[TOLD])}")


class _Scoring:
    """Scores a run on the data sets of its config that have queries; the data are read once."""

    def __init__(self, experiment: Experiment):
        self._experiment, self._names = experiment, evaluated(experiment.config)
        self._targets: targets.Targets | None = None
        self._last: dict[str, scoring.Scores] | None = None

    def __call__(self, run: RunState, epoch: int) -> Mapping[str, float] | None:
        """See `loop.Recipe.evaluate`."""
        if not self._names:
            return None
        if self._targets is None:
            experiment = self._experiment
            self._targets = targets.Targets(
                experiment.config, experiment.model, experiment.mesh, self._names, extractor=experiment.extractor
            )
            self._targets.keep_images()
        self._last = self._targets(run.state.params, run.state.stats)
        print_once(f"epoch {epoch}: {targets.summary(self._last)}")
        return targets.metrics(self._last)

    def publish(self, run: RunState) -> dict[str, Any]:
        """Writes the last scores into the workdir; empty where there is nothing to score on."""
        if not self._names:
            return {}
        experiment = self._experiment
        if self._last is None:
            # The last epoch was finished by an earlier process.
            self(run, experiment.schedule.epochs)
        assert self._last is not None
        extra = {"step": int(run.state.step), "with_val": bool(experiment.config.get("with_val"))}
        return targets.publish(
            self._last, experiment.workdir, experiment.config, model=experiment.model.name, extra=extra
        )


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
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
