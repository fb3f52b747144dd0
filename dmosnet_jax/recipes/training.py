"""What the training recipes share: from a config to an open experiment, and from that to a trained network.

A recipe calls `open_experiment`, defines what an epoch and a step are, and passes all of it to `train`.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dmosnet_jax.core.config import REFUSED, TOLD, changes, dataset_names, joined, read
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.files import make_folder
from dmosnet_jax.core.parallel import check_batch, make_mesh, print_once
from dmosnet_jax.core.progress import announced
from dmosnet_jax.data import placement
from dmosnet_jax.data.autoaugment import AutoAugment
from dmosnet_jax.data.loading import ImageCache
from dmosnet_jax.data.pipeline import Batches, train_batches
from dmosnet_jax.data.splits import Rows
from dmosnet_jax.evaluation.extract import Extractor
from dmosnet_jax.evaluation.report import Clusters
from dmosnet_jax.export.weights import MODEL_OPTIONS, Weights, describe_run, open_weights
from dmosnet_jax.models import Model
from dmosnet_jax.recipes import scoring
from dmosnet_jax.recipes.datasets import datasets_with_queries, subset_checksum
from dmosnet_jax.recipes.network import HEAD, build_model, fill_input, settings_of
from dmosnet_jax.train import loop, optim
from dmosnet_jax.train import state as train_state
from dmosnet_jax.train.checkpoints import Checkpoints, OtherShapesError, latest_meta
from dmosnet_jax.train.loop import Lengths
from dmosnet_jax.train.metrics import progress_bar, write_json
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
        weights: what the network starts from, or a description of the resumed run; None: a fresh network.
        model: the network.
        lengths: lengths and intervals of the run.
        optimiser: with its learning rate.
        extractor: features of images, compiled once.
        cache: decoded training images, where they fit.
    """

    config: Any
    workdir: pathlib.Path
    images: Rows
    mesh: Mesh
    weights: Weights | None
    model: Model
    lengths: Lengths
    optimiser: optax.GradientTransformation
    extractor: Extractor
    cache: ImageCache | None

    def meta(self, **loop_values: Any) -> dict[str, Any]:
        """What a checkpoint keeps beside the arrays; see `RunState`."""
        return {
            "model": settings_of(self.model),
            "config": as_json(self.config),
            "loop": loop_values,
            "lengths": self.fixed_lengths(),
        }

    def fixed_lengths(self) -> dict[str, int]:
        """What must not change when a run is resumed, or its epochs would shift."""
        found = {"steps_per_epoch": self.lengths.steps_per_epoch, "images": len(self.images.pids)}
        rows = subset_checksum(self.images)
        return found if rows is None else {**found, "subset": rows}

    def stream(self, plan: np.ndarray, *, epoch: int, start: int, labels: np.ndarray | None) -> Batches:
        """Training batches of an epoch's plan from step `start` on; without images where the devices have them."""
        if self.config.data.placement == "device":
            return placement.plan_batches(
                self.images,
                plan,
                start=start,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                labels=labels,
            )
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

    def place(self, step: Step) -> Step:
        """A compiled step that finds the batch's images on the devices, where the config wants them there."""
        if self.config.data.placement != "device":
            return step
        cache = self.cache or ImageCache(len(self.images), self.model.image_size)
        data = self.config.data
        with progress_bar(len(self.images), label="images") as bar:
            for count in placement.fill(cache, self.images, interpolation=data.interpolation, threads=data.threads):
                bar.update(count)
        images = placement.DeviceImages(cache, self.mesh)
        return lambda state, batch: step(state, {**batch, "image": images(batch["index"])})


def open_experiment(config: Any, workdir: pathlib.Path, images: Rows, *, num_classes: int) -> Experiment:
    """Opens what a training run needs.

    Args:
        config: of the run.
        workdir: of the run; a resumed run takes its network from its checkpoint, since the weights that it started
            from may be gone.
        images: the training images.
        num_classes: size of the classifier, 0 for none.

    Raises:
        ConfigError: settings that do not fit the data or the devices.
        DataError: weights missing or damaged.
    """
    meta = latest_meta(workdir)
    weights = None
    if meta is not None:
        weights = describe_run(workdir, meta)
    elif config.pretrained:
        weights = open_weights(config.pretrained)
    config = fill_input(config, weights)
    mesh = make_mesh()
    check_batch(config.batch_size, mesh)
    if config.data.placement == "device":
        placement.check_room(images, tuple(config.image_size), mesh)
    model = build_model(config, weights, num_classes=num_classes, may_differ=HEAD if meta is None else MODEL_OPTIONS)
    lengths = _lengths(config, images)
    rate = optim.learning_rate(
        config.optim,
        steps_per_epoch=lengths.steps_per_epoch,
        total_steps=lengths.total_steps,
        batch_size=config.batch_size,
    )
    return Experiment(
        config,
        workdir,
        images,
        mesh,
        weights,
        model,
        lengths,
        optim.make_optimiser(config.optim, rate),
        scoring.make_extractor(config, model, mesh),
        scoring.image_cache(config, images),
    )


def _lengths(config: Any, images: Rows) -> Lengths:
    steps = config.train.steps_per_epoch or len(images.pids) // config.batch_size
    if steps < 1:
        raise ConfigError(
            f"batch_size={config.batch_size} is larger than the {len(images.pids)} training images of {images.name}: "
            "lower batch_size"
        )
    return Lengths(
        steps_per_epoch=steps,
        epochs=config.train.epochs,
        log_every=config.train.log_every_steps,
        checkpoint_every=config.train.checkpoint_every_steps,
        eval_every_epochs=config.train.eval_every_epochs,
        checkpoint_minutes=config.train.checkpoint_every_minutes,
        # Where class sums are rebuilt they need not be saved; agreeing on the time waits for a step, as logging does.
        checkpoint_multiple=read(config, "spcl.refresh_every_steps") or config.train.log_every_steps,
    )


BeginEpoch = Callable[[RunState, int, int], tuple[RunState, Batches, Mapping[str, float]]]
Prepare = Callable[[TrainState, Mapping[str, Any] | None], tuple[TrainState, Mapping[str, Any]]]


def train(
    experiment: Experiment,
    step: Step,
    begin_epoch: BeginEpoch,
    *,
    prepare: Prepare | None = None,
    clusters: Callable[[], Clusters | None] = lambda: None,
    **hooks: Any,
) -> dict:
    """Trains from the newest checkpoint, or from the start, to the end; returns the contents of `results.json`.

    It ends with a report, also where no data set has queries.

    Args:
        experiment: what is trained.
        step: the pure training step.
        begin_epoch: see `loop.Recipe`.
        prepare: (state, host values of the checkpoint or None for a fresh run) -> (state, host values): adds what is
            the recipe's own to the state, as arrays or as shapes to restore into.
        clusters: what the report says of the last epoch's clusters, for process 0.
        **hooks: `before_step`, `end_epoch`, `compact` and `begins_with` of `loop.Recipe`.

    Raises:
        DataError: the workdir holds another run.
        StoppedError: a signal came; the state is saved.
    """
    workdir, mesh, config = experiment.workdir, experiment.mesh, experiment.config
    make_folder(workdir)
    names = datasets_with_queries(config)
    scorer = scoring.Scorer(config, experiment.model, mesh, names, extractor=experiment.extractor, keep_images=True)
    latest: dict[str, scoring.Scores] = {}

    def evaluate(run: RunState, epoch: int) -> Mapping[str, float] | None:
        if not names:
            return None
        latest.update(scorer(run.state.params, run.state.stats))
        print_once(f"epoch {epoch}: {scoring.summary(latest)}")
        return scoring.metrics(latest)

    with locked(workdir), contextlib.closing(Checkpoints(workdir, keep=config.train.keep)) as store:
        run = _start_or_resume(experiment, store, prepare or (lambda state, kept: (state, {})))
        if jax.process_index() == 0:
            write_json(workdir / "config.json", as_json(config))
        compiled = experiment.place(announced(compile_step(step, run.state, mesh), "the training step"))
        files, scored = experiment.images.filenames, bool(names)
        recipe = loop.Recipe(compiled, begin_epoch, evaluate, files, scored=scored, **hooks)
        run = loop.train(
            run, recipe, experiment.lengths, store, mesh=mesh, workdir=workdir, batch_size=config.batch_size
        )
        store.wait()
        print_once(f"trained {int(run.state.step)} steps; checkpoints in {workdir / 'checkpoints'}")
        if not names:
            scoring.publish_run(workdir, config, model=experiment.model, clusters=clusters)
            return {}
        if not latest:
            # An earlier process finished the last epoch.
            evaluate(run, int(run.state.step) // experiment.lengths.steps_per_epoch)
        extra = {"step": int(run.state.step), "with_val": bool(config.get("with_val"))}
        weights = run.state.params, run.state.stats
        return scoring.publish(
            latest, workdir, config, model=experiment.model, weights=weights, extra=extra, clusters=clusters
        )


def _start_or_resume(experiment: Experiment, store: Checkpoints, prepare: Prepare) -> RunState:
    """The run in its newest checkpoint, or a fresh one."""
    model, optimiser, lengths = experiment.model, experiment.optimiser, experiment.lengths
    step = store.latest()
    if step is not None:
        meta = store.meta(step)
        told = _check_same_run(experiment, meta, step)
        state, kept = prepare(train_state.shapes(*model.shapes(), optimiser), meta["loop"])
        try:
            state = store.restore(state, step, experiment.mesh)
        except OtherShapesError as error:
            changed = f"since then have changed {', '.join(told)}: give the earlier values; " if told else ""
            raise DataError(f"{experiment.workdir}: the run can't go on: {changed}{error}") from error
        print_once(f"goes on from step {step} of {lengths.total_steps} in {experiment.workdir}")
        return RunState(state, experiment.meta(**kept))
    key = jax.random.key(experiment.config.seed)
    if experiment.weights is None:
        params, stats = model.init(key)
    else:
        params, stats, fresh = experiment.weights.start(model, key)
        print_once(f"starts from {experiment.weights.path}" + (f"; drawn afresh: {', '.join(fresh)}" if fresh else ""))
    state = train_state.create(params, stats, optimiser, seed=experiment.config.seed, mesh=experiment.mesh)
    print_once(
        f"{model.name}: {sum(x.size for x in jax.tree.leaves(params)):,} parameters, {len(experiment.images.pids):,} "
        f"images, {lengths.epochs} epochs of {lengths.steps_per_epoch} steps of {experiment.config.batch_size}, "
        f"devices: {experiment.mesh.size} {experiment.mesh.devices.flat[0].device_kind}"
    )
    if not datasets_with_queries(experiment.config):
        print_once(f"{experiment.images.name} has no query and gallery: the run is not scored")
    state, kept = prepare(state, None)
    return RunState(state, experiment.meta(**kept))


def _check_same_run(experiment: Experiment, meta: Mapping[str, Any], step: int) -> list[str]:
    """Refuses to resume a run under settings that would make it another one; prints and returns what else changed."""
    now, then = as_json(settings_of(experiment.model)), meta.get("model", {})
    changed = [
        f"model.{k}={now[k]!r} (was {then[k]!r})" for k in now if k in then and k != "dtype" and now[k] != then[k]
    ]
    config, before = as_json(experiment.config), dict(meta.get("config", {}))
    for fields in (config, before):
        # A tuple of names is the same as names joined by +.
        fields.setdefault("with_val", False)
        for name in ("dataset", "source"):
            fields[name] = joined(dataset_names(fields[name])) if fields.get(name) else None
    found = changes(before, config)
    lengths, were = experiment.fixed_lengths(), meta.get("lengths", {})
    changed += found[REFUSED]
    changed += [f"{k}={lengths[k]} (was {were[k]})" for k in lengths if k in were and were[k] != lengths[k]]
    if changed:
        raise DataError(
            f"{experiment.workdir}: its checkpoint at step {step} is of another run: {'; '.join(changed)}; give "
            "another --workdir or the earlier settings"
        )
    if found[TOLD]:
        print_once(f"goes on with {', '.join(found[TOLD])}")
    return found[TOLD]


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Locks the workdir for this run; the system releases the lock when the process ends, however it ends.

    Raises:
        ConfigError: another process works there.
    """
    folder = os.open(workdir, os.O_RDONLY)
    try:
        if jax.process_index() == 0:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise ConfigError(f"{workdir}: another process works there: wait for it, or give another --workdir") from error
    except OSError:
        # Some network file systems have no locks; there it is up to the user.
        pass
    try:
        yield
    finally:
        os.close(folder)


def as_json(value: Any) -> dict[str, Any]:
    """A config or other settings as JSON values: tuples become lists, as they come back from a checkpoint."""
    return json.loads(json.dumps(value.to_dict() if hasattr(value, "to_dict") else value))
