"""Exported ONNX files in onnxruntime beside this package: equal features, operators, and time for a batch.

    pip install onnxruntime && python -m dmosnet_jax.benchmarks.onnx_runtime --output=onnx.csv

Weights are drawn at random. Each network is written with its input in bytes and features of unit length, and both
programs get the same images, from memory; `difference` is the largest between two values. Both use all cores.
"""

import functools
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from dmosnet_jax import models
from dmosnet_jax.benchmarks import command
from dmosnet_jax.core import tables
from dmosnet_jax.core.command import guarded, run_program
from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.kernels import thread_count
from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.data import augment
from dmosnet_jax.export import onnx_file, onnx_graph

_REPEATS = {1: 30, 3: 15}


def drawn(model: models.Model) -> tuple[Any, Any]:
    """Weights whose norms and biases do something, so that folding them wrongly would show."""
    rng = np.random.default_rng(0)

    def leaf(path: Any, shape: Any) -> np.ndarray:
        name = path[-1].key
        if name == "kernel":
            # A little less than keeps the size of the maps: where they grow, gates saturate and last digits decide.
            values = rng.normal(0, 0.7 * np.sqrt(2 / np.prod(shape.shape[:-1])), shape.shape)
        elif name in ("bias", "mean"):
            values = rng.normal(0, 0.1, shape.shape)
        else:
            values = np.full(shape.shape, 3.0) if name == "p" else rng.uniform(0.8, 1.2, shape.shape)
        return values.astype(np.float32)

    params, stats = (jax.tree_util.tree_map_with_path(leaf, tree) for tree in model.shapes())
    return params, stats


def measure(name: str, batches: list[int]) -> dict[str, Any]:
    """One row of the table.

    Raises:
        ConfigError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError("onnxruntime is not installed: pip install onnxruntime") from error
    model = models.build(name)
    params, stats = drawn(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = thread_count()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "x.onnx"
        onnx_file.save(path, model, params, stats, input="byte", normalise=True)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        data = path.read_bytes()
    weights = jax.device_put((params, stats))

    @jax.jit
    def forward(weights: Any, images: jax.Array) -> jax.Array:
        return model.apply(weights[0], weights[1], augment.normalise(images), train=False)[0]["feature"]

    row: dict[str, Any] = {"network": name, "operators": len(onnx_graph.parse(data).graph.node), "MB": len(data) / 1e6}
    differences = []
    for batch in batches:
        images = np.random.default_rng(batch).integers(0, 256, (batch, *model.image_size, 3), dtype=np.uint8)
        given = {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32)}
        placed = jax.device_put(images)
        theirs = functools.partial(session.run, None, given)
        ours = functools.partial(forward, weights, placed)
        differences.append(float(np.abs(unit_rows_np(np.asarray(ours())) - theirs()[0]).max()))
        for label, call in (("onnxruntime", theirs), ("here", ours)):
            row[f"ms {label} {batch}"] = 1000 * command.median_seconds(call, _REPEATS.get(batch, 5))[0]
    row["difference"] = f"{max(differences):.1e}"
    return row


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    parser = command.parser("onnx_runtime", __doc__)
    parser.add_argument("--models", default="all", help="names separated by commas, or all")
    parser.add_argument("--batch", type=command.sizes, default=[1, 3, 64], help="batch sizes separated by commas")
    args = parser.parse_args(argv)
    names = models.names() if args.models == "all" else args.models.split(",")

    def run() -> None:
        # Each in a process of its own: the memory of one network's programs does not slow down the next one.
        tables.publish([command.in_fresh_process(measure, name, args.batch) for name in names], args.output)

    return guarded(run)


if __name__ == "__main__":
    run_program(main)
