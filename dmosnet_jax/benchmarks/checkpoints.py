"""Checkpoints of an SpCL run with a memory of many images: bytes, seconds and host memory of a save and a restore.

    python -m dmosnet_jax.benchmarks.checkpoints --n=200_000,2_090_122 --classes=200_000,1_200_000 --output=c.csv

The state is a network's with Adam, and a memory of drawn features. `blocked` is how long a step waits for a save, which
goes on in the background until `save`; `with sums` is a save between two rebuilds of the class sums, as on SIGTERM,
`plain` what Orbax's own array format makes of the same tables. Each row is two fresh processes, one that saves and one
that restores, and their peaks of memory; `tables` are features, labels, class sums and counts in the memory.
"""

import argparse
import pathlib
import shutil
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from dmosnet_jax import models
from dmosnet_jax.benchmarks import command, structured
from dmosnet_jax.core import tables
from dmosnet_jax.core.command import guarded, run_program
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.memory import hybrid
from dmosnet_jax.train import state as train_state
from dmosnet_jax.train.checkpoints import Checkpoints
from dmosnet_jax.train.state import TrainState

FORMS = ("compacted", "with sums", "plain")


def _state(options: argparse.Namespace, images: int, classes: int, *, drawn: bool) -> TrainState:
    model, mesh = models.build(options.model, bn_group_size=16), make_mesh()
    optimiser = optax.adam(3.5e-4)
    how: dict[str, Any] = {"momentum": 0.2, "temperature": 0.05, "capacity": classes, "mesh": mesh}
    if not drawn:
        memory = hybrid.shapes(images, model.feature_dim, **how)
        return train_state.shapes(*model.shapes(), optimiser).replace(memory=memory)
    state = train_state.create(*model.init(jax.random.key(0)), optimiser, seed=0, mesh=mesh)
    features = structured.directions(np.random.default_rng(0), images, model.feature_dim)
    labels = np.random.default_rng(1).integers(0, classes, images).astype(np.int32)
    return state.replace(memory=hybrid.init(features, labels, **how))


def save(folder: pathlib.Path, form: str, images: int, classes: int, options: argparse.Namespace) -> dict[str, Any]:
    """Saves; what it took."""
    state = jax.block_until_ready(_state(options, images, classes, drawn=True))
    assert isinstance(state.memory, hybrid.Memory)
    held = sum(table.nbytes for table in jax.tree.leaves(state.memory))
    before = command.peak_memory()
    saved = state.replace(memory=state.memory.compacted()) if form == "compacted" else state
    if form == "plain":
        saver = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        start = time.perf_counter()
        saver.save(folder / "plain", args=ocp.args.StandardSave(jax.tree.leaves(saved)))
        blocked = time.perf_counter() - start
        saver.wait_until_finished()
    else:
        store = Checkpoints(folder)
        start = time.perf_counter()
        store.save(saved, {"model": {}, "config": {}, "loop": {}})
        blocked = time.perf_counter() - start
        store.wait()
    seconds = time.perf_counter() - start
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    peak = command.peak_memory()
    return {
        "tables GiB": command.in_gib(held),
        "written GiB": command.in_gib(written),
        "blocked s": blocked,
        "save s": seconds,
        "before GiB": command.in_gib(before),
        "save peak GiB": command.in_gib(peak),
    }


def restore(folder: pathlib.Path, form: str, images: int, classes: int, options: argparse.Namespace) -> dict[str, Any]:
    """Restores; what it took."""
    like = _state(options, images, classes, drawn=False)
    before, start = command.peak_memory(), time.perf_counter()
    if form == "plain":
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(like)]
        with ocp.StandardCheckpointer() as reader:
            jax.block_until_ready(reader.restore(folder / "plain", shapes))
    else:
        jax.block_until_ready(Checkpoints(folder).restore(like, 0, make_mesh()))
    seconds, peak = time.perf_counter() - start, command.peak_memory()
    assert before is not None
    assert peak is not None
    return {"restore s": seconds, "restore peak GiB": command.in_gib(peak - before)}


def measure(form: str, images: int, classes: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=options.folder))
    try:
        row: dict[str, Any] = {"form": form, "images": images, "classes": classes}
        for phase in (save, restore):
            row |= command.in_fresh_process(phase, folder, form, images, classes, options)
        return row
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = command.parser("checkpoints", __doc__)
    parser.add_argument("--n", type=command.sizes, default=[200_000], help="numbers of images, separated by commas")
    parser.add_argument("--classes", type=command.sizes, default=[], help="classes for each; default as many as images")
    parser.add_argument("--model", choices=models.names(), default="dmosnet_x1_0")
    parser.add_argument("--forms", type=command.some_of(FORMS), default=list(FORMS), help=f"of {', '.join(FORMS)}")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where checkpoints are written, and removed")
    options = parser.parse_args(argv)
    options.classes = options.classes or options.n
    if len(options.classes) != len(options.n):
        parser.error(f"--classes has {len(options.classes)} numbers, --n has {len(options.n)}")

    def run() -> None:
        pairs = [(form, *sizes) for sizes in zip(options.n, options.classes, strict=True) for form in options.forms]
        tables.publish([measure(*pair, options) for pair in pairs], options.output)

    return guarded(run)


if __name__ == "__main__":
    run_program(main)
