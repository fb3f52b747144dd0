"""What a training run will need, printed before it is started: devices, settings, shapes, memory, disk, steps, time.

The step is compiled and run a few times on the first images of the data set, with a state of zeros: what does not fit
fails here, and the time is measured. Nothing is written.
"""

import pathlib
import shutil
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from dmosnet_jax.core.errors import UserError
from dmosnet_jax.core.parallel import print_once, to_devices
from dmosnet_jax.core.progress import compiling
from dmosnet_jax.data.splits import Subset
from dmosnet_jax.recipes.training import BeginEpoch, Experiment, Prepare
from dmosnet_jax.train import state as train_state
from dmosnet_jax.train.state import TrainState
from dmosnet_jax.train.steps import Step, compile_step

_TIMED_STEPS = 3
_GIB = 2**30
_BY_GROUPS = ", or --config.spcl.groups_at_once=1"


def describe(
    experiment: Experiment,
    step: Step,
    begin_epoch: BeginEpoch,
    *,
    prepare: Prepare | None = None,
    **hooks: Any,
) -> dict[str, Any]:
    """Prints what `training.train` of the same arguments would need; returns no results.

    Raises:
        UserError: a step does not fit into the devices' memory, or clustering not into the host's.
        DataError: an image can't be read.
    """
    del begin_epoch, hooks
    config, mesh = experiment.config, experiment.mesh
    print_once(f"{config}")
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    print_once(f"devices: {mesh.size} ({', '.join(kinds)}) of {jax.process_count()} processes")
    shapes = train_state.shapes(*experiment.model.shapes(), experiment.optimiser)
    if prepare is not None:
        shapes, _ = prepare(shapes, None)
    places = train_state.shardings(shapes, mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
    size, share = config.batch_size, config.batch_size // mesh.size
    print_once(
        f"network: {experiment.model.name}, {parameters:,} parameters; images uint8 "
        f"[{size}, {', '.join(map(str, experiment.model.image_size))}, 3], {share} on each device; "
        f"{len(experiment.images):,} images"
    )
    host_seconds, batch = _read(experiment)
    try:
        scratch, device_seconds = _run(step, shapes, places, to_devices(batch, mesh), experiment)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        groups = "spcl" in config and experiment.model.bn_group_size and config.spcl.groups_at_once is None
        raise UserError(
            f"a step of batch_size={size} does not fit into the memory of {mesh.size} devices: lower batch_size, use "
            f"more devices, or --config.model.dtype=bfloat16{_BY_GROUPS if groups else ''}"
        ) from error
    kept = sum(_bytes_on_a_device(*pair) for pair in _pairs(shapes, places))
    tables = sum(_bytes_on_a_device(*pair) for pair in _pairs(shapes.memory, places.memory))
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    of = f" of {limit / _GIB:.2f}" if limit else ""
    print_once(
        f"memory of each device: state {kept / _GIB:.2f} GiB (memory tables {tables / _GIB:.2f}), a step's scratch "
        f"{scratch / _GIB:.2f}: {(kept + scratch) / _GIB:.2f}{of} GiB"
    )
    if config.data.placement == "device":
        pixels = len(experiment.images) * 3 * int(np.prod(experiment.model.image_size))
        print_once(f"images on the devices, beside that: {pixels / _GIB:.2f} GiB in all")
    saved = shapes if shapes.memory is None else shapes.replace(memory=shapes.memory.compacted())
    checkpoint = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))
    cache = 0 if experiment.cache is None else experiment.cache.images.nbytes
    print_once(
        f"host memory of each process: decoded images {cache / _GIB:.2f} GiB, a checkpoint under way "
        f"{checkpoint / jax.process_count() / _GIB:.2f} GiB"
    )
    most = config.train.keep + 2
    print_once(
        f"disk: a checkpoint of {checkpoint / _GIB:.2f} GiB, at most {most} at once: {most * checkpoint / _GIB:.2f} "
        f"GiB in {experiment.workdir}, where {_free(experiment.workdir) / _GIB:.2f} GiB are free"
    )
    _print_time(experiment, device_seconds, host_seconds, clusters=shapes.memory is not None)
    return {}


def _read(experiment: Experiment) -> tuple[float, dict[str, np.ndarray]]:
    """Seconds for the host to make a batch, and one."""
    size, count = experiment.config.batch_size, len(experiment.images)
    plan = (np.arange((_TIMED_STEPS + 1) * size, dtype=np.int32) % count).reshape(-1, size)
    stream = experiment.stream(plan, epoch=0, start=0, labels=np.zeros(count, np.int32))
    batch = next(stream)
    since = time.perf_counter()
    count = sum(1 for _ in stream)
    seconds = (time.perf_counter() - since) / count
    if "image" not in batch:
        # The devices have the images; a step takes its batch from them.
        batch = {**batch, "image": np.zeros((len(batch["index"]), *experiment.model.image_size, 3), np.uint8)}
    return seconds, batch


def _run(
    step: Step, shapes: TrainState, places: TrainState, batch: dict[str, jax.Array], experiment: Experiment
) -> tuple[int, float]:
    """Bytes of a step's scratch on each device, and seconds of a step."""
    zeros = jax.jit(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), out_shardings=places)
    state = zeros()
    compiled: Any = compile_step(step, state, experiment.mesh)
    with compiling("the training step"):
        compiled = compiled.lower(state, batch).compile()
    analysis, seconds = compiled.memory_analysis(), []
    for _ in range(_TIMED_STEPS + 1):
        since = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - since)
    return getattr(analysis, "temp_size_in_bytes", 0), statistics.median(seconds[1:])


def _pairs(tree: Any, places: Any) -> list[tuple[Any, NamedSharding]]:
    return list(zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True))


def _bytes_on_a_device(leaf: Any, place: NamedSharding) -> int:
    return int(np.prod(place.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize


def _free(folder: pathlib.Path) -> int:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _print_time(experiment: Experiment, device: float, host: float, *, clusters: bool) -> None:
    lengths = experiment.lengths
    total = lengths.total_steps * max(device, host)
    text = (
        f"time: {lengths.epochs} epochs of {lengths.steps_per_epoch:,} steps, {lengths.total_steps:,} in all; "
        f"{1000 * device:.1f} ms a step on the devices, {1000 * host:.1f} ms for the host to read and decode its "
        f"images: about {_duration(total)}"
    )
    if clusters:
        seconds = _extraction(experiment) * len(experiment.images)
        text += f", and {_duration(seconds)} for each extraction of all features; clustering"
    else:
        text += "; evaluation"
    print_once(f"{text} is not counted")


def _extraction(experiment: Experiment) -> float:
    """Seconds to extract the features of an image."""
    count = min(len(experiment.images), 2 * experiment.config.eval.batch_size)
    first = Subset(experiment.images, np.arange(count))
    params, stats = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), experiment.model.shapes())
    experiment.extractor(params, stats, first, label="dry run")
    since = time.perf_counter()
    experiment.extractor(params, stats, first, label="dry run")
    return (time.perf_counter() - since) / count


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
