"""Checkpoints: one unit of train state, memory, pseudo-labels and loop state. The only file that imports Orbax.

A checkpoint is a folder `checkpoints/<step>` with the items `model` (parameters and statistics), `train` (step,
optimiser, key, memory) and `meta` (JSON: model, config, loop state). Orbax writes it aside and renames it when done.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers as managers

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.trees import differences
from dmosnet_jax.train.state import TrainState, shardings

FOLDER = "checkpoints"
BEST = "best"
_ITEMS = ("model", "train", "meta")


def _quiet() -> None:
    # Orbax logs every save and restore step by step; the loop reports what a user needs.
    for name in ("absl", "orbax"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _split(state: TrainState) -> dict[str, Any]:
    """The state as nested dicts of arrays, free of library types, so that old checkpoints stay readable."""
    leaves = jax.tree.leaves(state.opt_state)
    train = {"step": state.step, "key": state.key, "opt": {str(i): leaf for i, leaf in enumerate(leaves)}}
    if state.memory is not None:
        fields = ("features", "class_sums", "class_counts", "labels")
        train["memory"] = {name: getattr(state.memory, name) for name in fields}
    return {"model": {"params": state.params, "stats": state.stats}, "train": train}


def _join(like: TrainState, model: Mapping[str, Any], train: Mapping[str, Any]) -> TrainState:
    structure = jax.tree.structure(like.opt_state)
    opt_state = jax.tree.unflatten(structure, [train["opt"][str(i)] for i in range(structure.num_leaves)])
    memory = None if like.memory is None else like.memory.replace(**train["memory"])
    return TrainState(train["step"], model["params"], model["stats"], opt_state, train["key"], memory)


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["mAP"]


def _manager(folder: pathlib.Path, *, keep: int | None, writable: bool) -> ocp.CheckpointManager:
    _quiet()
    policy = None
    if keep is not None:
        best = managers.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
        policy = managers.AnyPreservationPolicy([managers.LatestN(keep), best])
    options = ocp.CheckpointManagerOptions(
        create=writable,
        read_only=not writable,
        cleanup_tmp_directories=writable,
        preservation_policy=policy,
        # What is kept is the policy's business; without a `best_fn`, scores would not be written beside the arrays.
        best_fn=_score,
    )
    return ocp.CheckpointManager(folder.absolute(), options=options, item_names=_ITEMS)


class Checkpoints:
    """Saves and restores the checkpoints of one run; saving goes on in the background."""

    def __init__(self, workdir: str | pathlib.Path, *, keep: int = 3):
        """Opens `workdir/checkpoints`; `keep` latest checkpoints and the best by mAP are kept."""
        self._folder = pathlib.Path(workdir) / FOLDER
        self._manager = _manager(self._folder, keep=keep, writable=True)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None) -> None:
        """Starts to save a state; the arrays are copied off the devices before this returns.

        Args:
            state: the state; its step names the checkpoint. A step that is there already is not saved again.
            meta: JSON values: "model", "config", "loop".
            metrics: evaluation of this state; the best `mAP` is kept for good.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        parts = _split(state)
        items = {name: ocp.args.StandardSave(parts[name]) for name in ("model", "train")}
        args = ocp.args.Composite(meta=ocp.args.JsonSave(dict(meta)), **items)
        values = {"mAP": float(metrics["mAP"])} if metrics is not None else None
        self._manager.save(step, args=args, metrics=values)

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        return _restore_meta(self._manager, step, self._folder)

    def restore(self, like: TrainState, step: int, mesh: Mesh) -> TrainState:
        """A saved state, placed over a mesh of any size.

        Args:
            like: a state of the same shapes (arrays or shapes).
            step: the checkpoint's step.
            mesh: the devices.

        Raises:
            DataError: the checkpoint is of another model or optimiser, or damaged.
        """
        where = self._folder / str(step)
        wanted = _split(like)
        places = _split(shardings(like, mesh))
        restored = {}
        for item in ("model", "train"):
            _check_shapes(self._manager, step, item, wanted[item], where)
            target = jax.tree.map(
                lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                wanted[item],
                places[item],
            )
            restored[item] = ocp.args.StandardRestore(target)
        try:
            items = self._manager.restore(step, args=ocp.args.Composite(**restored))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(_damaged(where, error)) from error
        return _join(like, items["model"], items["train"])

    def wait(self) -> None:
        """Blocks until every save is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Completes the saves and frees the background threads."""
        self._manager.wait_until_finished()
        self._manager.close()


def _damaged(where: pathlib.Path, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return f"{where}: checkpoint can't be read ({reason}); remove this folder to go on from an earlier one"


def _restore_meta(manager: ocp.CheckpointManager, step: int, folder: pathlib.Path) -> dict[str, Any]:
    try:
        return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(_damaged(folder / str(step), error)) from error


def _check_shapes(manager: ocp.CheckpointManager, step: int, item: str, wanted: Any, where: pathlib.Path) -> None:
    found = manager.item_metadata(step)[item]
    if found is None:
        raise DataError(f"{where}: checkpoint has no {item!r}; it was not written by this program or is incomplete")
    problems = differences(wanted, getattr(found, "tree", found))
    if problems:
        raise DataError(f"{where}: checkpoint of another model or setting: {'; '.join(problems)}")


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
        path: a run's workdir, its `checkpoints` folder, one `checkpoints/<step>`, or `checkpoints/best` (highest mAP).

    Raises:
        DataError: there is no checkpoint.
    """
    given = pathlib.Path(path)
    wanted: int | str | None = None
    folder = given
    if given.name.isdigit() or given.name == BEST:
        wanted, folder = (int(given.name) if given.name.isdigit() else BEST), given.parent
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    if not steps:
        raise DataError(f"{given}: no checkpoint here: give a run's workdir, its checkpoints folder or one step of it")
    if wanted == BEST:
        return folder, _best_step(folder) or steps[-1]
    if wanted is None:
        return folder, steps[-1]
    if wanted not in steps:
        raise DataError(f"{given}: no such checkpoint; there are {', '.join(map(str, steps))}")
    return folder, int(wanted)


def _best_step(folder: pathlib.Path) -> int | None:
    manager = _manager(folder, keep=None, writable=False)
    try:
        scores = {step: manager.metrics(step) for step in manager.all_steps()}
    finally:
        manager.close()
    scored = {step: metrics["mAP"] for step, metrics in scores.items() if metrics}
    return max(scored, key=lambda step: scored[step]) if scored else None


def load_model(path: str | pathlib.Path) -> SavedModel:
    """Reads the weights of a checkpoint to the host.

    Args:
        path: see `find`.

    Raises:
        DataError: no checkpoint there, or damaged.
    """
    folder, step = find(path)
    manager = _manager(folder, keep=None, writable=False)
    try:
        meta = _restore_meta(manager, step, folder)
        found = manager.item_metadata(step)["model"]
        target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), getattr(found, "tree", found))
        model = manager.restore(step, args=ocp.args.Composite(model=ocp.args.StandardRestore(target)))["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(_damaged(folder / str(step), error)) from error
    finally:
        manager.close()
    arrays = jax.tree.map(np.asarray, model)
    return SavedModel(arrays["params"], arrays["stats"], meta, step, folder / str(step))
