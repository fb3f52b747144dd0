"""Checkpoints: one unit of train state, memory, pseudo-labels and loop state. Training's only way to Orbax.

A checkpoint is a folder `checkpoints/<step>` with the items `model` (parameters and statistics), `train` (step,
optimiser, key, a source domain's norms), `memory` (its tables; those that follow from others may be left out), `meta`
(JSON: model, config, loop state) and, where the state was evaluated, `metrics`. Orbax writes to a temporary folder and
renames it when done; an old one is renamed before it is deleted. So a folder that is named by its step is complete,
whenever the process was killed.
"""

import contextlib
import dataclasses
import logging
import math
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers as managers

from dmosnet_jax.core.errors import DataError, first
from dmosnet_jax.core.parallel import AXIS, replicated
from dmosnet_jax.core.trees import differences
from dmosnet_jax.train import checksums, table_files
from dmosnet_jax.train.state import TrainState, shardings

FOLDER = "checkpoints"
BEST = "best"
_ARRAYS = ("model", "train")
_MEMORY, _META, _METRICS = "memory", "meta", "metrics"
_ITEMS = (*_ARRAYS, _META, _METRICS)
_META_PARTS = ("model", "config", "lengths", "loop")
_TRASH = ".old"
_REMOVE = "remove this folder to go on from an earlier one"
# Libraries take a file of the right name for one of theirs, and stumble over what a damaged one holds.
_UNREADABLE: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    NotImplementedError,
    RecursionError,
)
# Arrays may not unpack to more than `SLACK` bytes and so many times their files: weights hardly get smaller.
MAX_RATIO, SLACK = 100, 2**26


class OtherShapesError(DataError):
    """A checkpoint holds other arrays than the state that it is to be restored to."""


def _split(state: TrainState) -> dict[str, Any]:
    """The state as nested dicts of arrays, free of library types, so that old checkpoints stay readable."""
    leaves = jax.tree.leaves(state.opt_state)
    train = {"step": state.step, "key": state.key, "opt": {str(i): leaf for i, leaf in enumerate(leaves)}}
    if state.source is not None:
        train["source"] = state.source
    return {"model": {"params": state.params, "stats": state.stats}, "train": train}


def _one_copy(array: Any) -> Any:
    """The same array on one device of each process.

    Of an array on all devices Orbax has each of them save a slice; a thousand small ones on eight devices take ten
    seconds so, in which the next step waits.
    """
    if not isinstance(array, jax.Array) or not array.is_fully_replicated:
        return array
    devices: list[Any] = sorted(array.sharding.device_set, key=lambda device: device.id)
    firsts: dict[int, Any] = {}
    for device in devices:
        firsts.setdefault(device.process_index, device)
    if len(firsts) == len(devices):
        return array
    mesh = Mesh(np.asarray(list(firsts.values())), (AXIS,))
    mine = [shard.data for shard in array.addressable_shards if shard.device in firsts.values()]
    return jax.make_array_from_single_device_arrays(array.shape, replicated(mesh), mine)


def _tables(memory: Any) -> dict[str, Any]:
    """A memory's tables by name, without those that are left out."""
    found = {} if memory is None else flax.serialization.to_state_dict(memory)
    return {name: table for name, table in found.items() if table is not None}


def _join(
    like: TrainState, model: Mapping[str, Any], train: Mapping[str, Any], tables: Mapping[str, Any]
) -> TrainState:
    leaves, structure = jax.tree.flatten(like.opt_state)
    opt_state = jax.tree.unflatten(structure, [train["opt"][str(i)] for i in range(len(leaves))])
    memory = None
    if like.memory is not None:
        left_out = dict.fromkeys(_tables(like.memory).keys() - tables.keys())
        memory = like.memory.replace(**tables, **left_out).completed(like.memory)
    return TrainState(
        train["step"], model["params"], model["stats"], opt_state, train["key"], memory, train.get("source")
    )


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["mAP"]


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    # Without these a manager that has not yet saved can't tell what the items of a checkpoint are.
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in _ARRAYS:
        arrays = ocp.StandardCheckpointHandler()
        registry.add(item, ocp.args.StandardSave, arrays)
        registry.add(item, ocp.args.StandardRestore, arrays)
    tables = table_files.Handler()
    registry.add(_MEMORY, table_files.Save, tables)
    registry.add(_MEMORY, table_files.Restore, tables)
    values = ocp.JsonCheckpointHandler()
    registry.add(_META, ocp.args.JsonSave, values)
    registry.add(_META, ocp.args.JsonRestore, values)
    return registry


def _manager(
    folder: pathlib.Path, *, keep: int | None = None, before_commit: Callable[[], None] | None = None
) -> ocp.CheckpointManager:
    """A manager that writes where `keep` is given, and else only reads.

    Raises:
        DataError: a checkpoint's description is damaged.
    """
    # Orbax logs every save and restore step by step, and damaged files in several lines; on a full disk asyncio logs
    # each array that was not written. Ours is the line that counts.
    for name in ("absl", "orbax", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    writable, policy = keep is not None, None
    if keep is not None:
        best = managers.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
        policy = managers.AnyPreservationPolicy([managers.LatestN(keep), best])
    options = ocp.CheckpointManagerOptions(
        create=writable,
        read_only=not writable,
        cleanup_tmp_directories=writable,
        preservation_policy=policy,
        todelete_subdir=_TRASH if writable else None,
        async_options=ocp.AsyncOptions(post_finalization_callback=before_commit),
        # What is kept is the policy's business; without a `best_fn`, scores would not be written beside the arrays.
        best_fn=_score,
    )
    # Opening reads every score.
    for step in _steps(folder):
        _check_files(folder / str(step), [_METRICS])
    with _reading(folder, (ValueError,)):
        return ocp.CheckpointManager(folder.absolute(), options=options, handler_registry=_handlers())


class Checkpoints:
    """Saves and restores the checkpoints of one run; saving goes on in the background."""

    def __init__(self, workdir: str | pathlib.Path, *, keep: int = 3):
        """Opens `workdir/checkpoints`; `keep` latest checkpoints and the best by mAP are kept.

        Raises:
            DataError: a checkpoint's description is damaged.
        """
        self._folder = pathlib.Path(workdir) / FOLDER
        self._saving = -1
        self._manager = _manager(self._folder, keep=keep, before_commit=self._add_checksums)
        self._empty_trash()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None) -> None:
        """Starts to save a state; the arrays are copied off the devices before this returns.

        Args:
            state: the state; its step names the checkpoint. A step that is there already is not saved again.
            meta: JSON values: "model", "config", "loop".
            metrics: evaluation of this state; the best `mAP` is kept for good.

        Raises:
            DataError: this or the previous checkpoint can't be written.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        parts = _split(state)
        items = {name: ocp.args.StandardSave(jax.tree.map(_one_copy, parts[name])) for name in _ARRAYS}
        if state.memory is not None:
            items[_MEMORY] = table_files.Save(_tables(state.memory))
        args = ocp.args.Composite(meta=ocp.args.JsonSave(dict(meta)), **items)
        values = {"mAP": float(metrics["mAP"])} if metrics is not None else None
        self.wait()
        self._saving = step
        with self._writing():
            self._manager.save(step, args=args, metrics=values)

    def _add_checksums(self) -> None:
        # Called by Orbax in the background, on process 0, when all is written and nothing is renamed yet.
        temporary = next(self._folder.glob(f"{self._saving}.*"))
        checksums.write(temporary, _ITEMS, also=[f"{_MEMORY}/{table_files.PARTS}"])

    def _empty_trash(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self._folder / _TRASH, ignore_errors=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self._folder / str(self._saving)}: checkpoint can't be written ({_reason(error)}): check the free "
                "space and the permissions, then run the same command to go on from the one before"
            ) from error

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        return _restore_meta(self._manager, step, self._folder)

    def restore(self, like: TrainState, step: int, mesh: Mesh) -> TrainState:
        """A saved state, sharded over a mesh of any size.

        Args:
            like: a state of the same shapes (arrays or shapes).
            step: the checkpoint's step.
            mesh: the devices.

        Raises:
            DataError: the checkpoint is of another model or optimiser, or damaged.
        """
        where = self._folder / str(step)
        places = shardings(like, mesh)
        wanted, placement = _split(like), _split(places)
        wanted[_MEMORY], placement[_MEMORY] = _tables(like.memory), _tables(places.memory)
        _check_files(where, (*_ARRAYS, _MEMORY))
        targets: dict[str, Any] = {}
        with _reading(where):
            saved: dict[str, Any] = {item: dict(_shapes(self._manager, step, item, where)) for item in _ARRAYS}
            # Earlier versions saved the memory with the optimiser.
            early = saved["train"].pop(_MEMORY, None)
            saved[_MEMORY] = early or table_files.shapes(where / _MEMORY)
            if like.memory is not None and not wanted[_MEMORY].keys() <= saved[_MEMORY].keys():
                wanted[_MEMORY] = _tables(like.memory.compacted())
            for item in wanted:
                pair = wanted[item], saved[item]
                problems = differences(*({_MEMORY: tree} for tree in pair) if item == _MEMORY else pair)
                if problems:
                    raise OtherShapesError(f"{where}: checkpoint of another model or setting: {first(problems)}")
                targets[item] = jax.tree.map(
                    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                    wanted[item],
                    {name: placement[item][name] for name in wanted[item]},
                )
            tables = targets.pop(_MEMORY)
            if early:
                targets["train"][_MEMORY] = tables
            args = {item: ocp.args.StandardRestore(shapes) for item, shapes in targets.items()}
            if tables and not early:
                args[_MEMORY] = table_files.Restore(tables)
            items = self._manager.restore(step, args=ocp.args.Composite(**args))
        tables = items["train"].pop(_MEMORY) if early else items.get(_MEMORY) or {}
        return _join(like, items["model"], items["train"], tables)

    def wait(self) -> None:
        """Blocks until every save is complete.

        Raises:
            DataError: a checkpoint can't be written.
        """
        with self._writing():
            self._manager.wait_until_finished()
        self._empty_trash()

    def close(self) -> None:
        """Completes the saves and frees the background threads."""
        self.wait()
        self._manager.close()


def _reason(error: Exception) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    # What failed stands first, and why at the end.
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"


@contextlib.contextmanager
def _reading(where: pathlib.Path, kinds: tuple[type[Exception], ...] = _UNREADABLE) -> Iterator[None]:
    """Turns what Orbax raises about damaged files into one line."""
    try:
        yield
    except table_files.DamagedTableError as error:
        raise DataError(f"{where}: checkpoint is damaged ({error}); {_REMOVE}") from error
    except kinds as error:
        raise DataError(f"{where}: checkpoint can't be read ({_reason(error)}); {_REMOVE}") from error


def _check_files(where: pathlib.Path, items: Iterable[str]) -> None:
    items = list(items)
    entries = (path for item in items for path in (where / item).rglob("*"))
    # Reading a pipe would wait for ever.
    other = next((path for path in entries if not (path.is_file() or path.is_dir())), None)
    problem = checksums.verify(where, items) if other is None else f"{other.relative_to(where)} is no file"
    if problem is not None:
        raise DataError(f"{where}: checkpoint is damaged ({problem}); {_REMOVE}")


def _restore_meta(manager: ocp.CheckpointManager, step: int, folder: pathlib.Path) -> dict[str, Any]:
    _check_files(folder / str(step), [_META])
    with _reading(folder / str(step)):
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if not isinstance(meta, dict) or not all(isinstance(meta.get(part, {}), dict) for part in _META_PARTS):
            raise ValueError(f"{_META} is no description of a run")
    return meta


def _shapes(manager: ocp.CheckpointManager, step: int, item: str, where: pathlib.Path) -> dict[str, Any]:
    """Nested dict of what has the shapes and dtypes of an item's arrays; each is stored in chunks of about its size."""
    found = manager.item_metadata(step)[item]
    if found is None:
        raise KeyError(f"no item {item!r}")
    tree = getattr(found, "tree", found)
    if not isinstance(tree, dict):
        raise TypeError(f"{item} holds no arrays by name")
    leaves = jax.tree.leaves(tree)
    # A chunk is unpacked whole, however little of it is in the array.
    whole = sum(_size(leaf.shape, leaf.dtype, leaf.storage.chunk_shape) for leaf in leaves)
    if whole > SLACK + 2 * sum(_size(leaf.shape, leaf.dtype) for leaf in leaves):
        _check_claim(where, item, whole)
    return tree


def _size(shape: Iterable[int], dtype: Any, chunk: Iterable[int] | None = None) -> int:
    """Bytes of an array, with all of the chunks that it is stored in."""
    lengths = list(shape)
    if chunk is not None:
        lengths = [-(-length // part) * part for length, part in zip(lengths, chunk, strict=True)]
    return math.prod(map(int, lengths)) * np.dtype(dtype).itemsize


def _check_claim(where: pathlib.Path, item: str, claimed: int) -> None:
    """Raises DataError where an item's arrays are too large for its files."""
    held = sum(path.stat().st_size for path in (where / item).rglob("*") if path.is_file())
    if claimed > SLACK + MAX_RATIO * held:
        raise DataError(
            f"{where / item}: claims to hold arrays of {claimed:,} bytes in files of {held:,}: it is damaged, or made "
            "to fill the memory; give another checkpoint"
        )


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """Weights of a checkpoint and what they belong to.

    Attributes:
        params: NumPy parameters, nested dicts.
        stats: NumPy batch statistics.
        meta: the checkpoint's "model", "config" and "loop" values.
        step: training step.
        path: the checkpoint's folder.
    """

    params: dict[str, Any]
    stats: dict[str, Any]
    meta: dict[str, Any]
    step: int
    path: pathlib.Path


def find(path: str | pathlib.Path) -> tuple[pathlib.Path, int]:
    """The folder of checkpoints and the step that a path means.

    Args:
        path: a run's workdir, its `checkpoints` folder, one `checkpoints/<step>`, or `checkpoints/best` (highest mAP,
            or the latest where none was scored).

    Raises:
        DataError: there is no checkpoint.
    """
    given = pathlib.Path(path)
    wanted: int | str | None = None
    folder = given
    # A workdir may itself be named by a number, or "best".
    if not (given / FOLDER).is_dir() and (given.name.isdigit() or given.name == BEST):
        wanted, folder = (int(given.name) if given.name.isdigit() else BEST), given.parent
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    steps = _steps(folder)
    if not steps:
        raise DataError(f"{given}: no checkpoint here: give a run's workdir, its checkpoints folder or one step of it")
    if wanted == BEST:
        best = _best_step(folder)
        return folder, steps[-1] if best is None else best
    if wanted is None:
        return folder, steps[-1]
    if wanted not in steps:
        raise DataError(f"{given}: no such checkpoint; there are {', '.join(map(str, steps))}")
    return folder, int(wanted)


def _steps(folder: pathlib.Path) -> list[int]:
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def _best_step(folder: pathlib.Path) -> int | None:
    with contextlib.closing(_manager(folder)) as manager:
        scores = {step: manager.metrics(step) for step in manager.all_steps()}
    scored = {step: metrics["mAP"] for step, metrics in scores.items() if metrics}
    return max(scored, key=lambda step: scored[step]) if scored else None


def latest_meta(workdir: str | pathlib.Path) -> dict[str, Any] | None:
    """The JSON part of a run's newest checkpoint, None where there is no checkpoint yet.

    Raises:
        DataError: it is damaged.
    """
    folder = pathlib.Path(workdir) / FOLDER
    steps = _steps(folder)
    if not steps:
        return None
    with contextlib.closing(_manager(folder)) as manager:
        return _restore_meta(manager, steps[-1], folder)


def load_model(path: str | pathlib.Path) -> SavedModel:
    """Reads the weights of a checkpoint to the host.

    Args:
        path: see `find`.

    Raises:
        DataError: no checkpoint there, or damaged.
    """
    folder, step = find(path)
    where = folder / str(step)
    _check_files(where, ["model"])
    with contextlib.closing(_manager(folder)) as manager, _reading(where):
        meta = _restore_meta(manager, step, folder)
        found = _shapes(manager, step, "model", where)
        _check_claim(where, "model", sum(_size(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(found)))
        target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), found)
        model = manager.restore(step, args=ocp.args.Composite(model=ocp.args.StandardRestore(target)))["model"]
    arrays = jax.tree.map(np.asarray, model)
    return SavedModel(arrays["params"], arrays["stats"], meta, step, where)
