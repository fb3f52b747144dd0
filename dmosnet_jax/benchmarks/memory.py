"""Seconds and memory of the hybrid memory's step by number of images, against SpCL's way and a direct computation.

    python -m dmosnet_jax.benchmarks.memory --n 12936,2090122 --classes 8000,1200000 --output=memory.csv

A step is loss, gradient and update for one batch, the tables donated; `CPU ms` is its processor time, which other
programs on the machine disturb less. `tables` counts features, class sums, counts and labels once, `held` all that the
compiled step holds at a time: arguments, results that do not reuse them, and scratch.
`direct` is the largest relative difference of loss and gradient from a float64 computation over all images for a few
random probes, and of the updated rows from the rule applied one image after the other. `reference` is the step as SpCL
does it, similarities with all images summed by class. `labels` is the new epoch's class tables, `plan` its batches.
With --backbone NAME its training step is timed too, and `share` is the memory's step over it.
"""

import argparse
import timeit
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dmosnet_jax import models
from dmosnet_jax.benchmarks import command, structured
from dmosnet_jax.benchmarks.command import GIB, in_gib, median_seconds
from dmosnet_jax.core import parallel
from dmosnet_jax.core.command import guarded, run_program
from dmosnet_jax.core.tables import publish
from dmosnet_jax.data.samplers import class_epoch
from dmosnet_jax.memory import hybrid, tables

_ROWS = 65_536
MOMENTUM, TEMPERATURE, EPSILON = 0.2, 0.05, 1e-6


def step(memory: hybrid.Memory, inputs: jax.Array, indices: jax.Array) -> tuple[hybrid.Memory, jax.Array, jax.Array]:
    """Loss, gradient and update: what training adds to a backbone's step."""
    value, gradient = jax.value_and_grad(hybrid.loss, argnums=1)(memory, inputs, indices)
    return hybrid.update(memory, inputs, indices, loss=value), value, gradient


def problem(images: int, classes: int, dim: int, batch: int, seed: int) -> tuple[np.ndarray, ...]:
    """Features float32 [N, D], labels int32 [N], inputs float32 [B, D] and indices int32 [B], two of them equal."""
    rng = np.random.default_rng(seed)
    features = structured.directions(rng, images, dim)
    # Every class has an image; the others crowd into an eighth of the classes, as clusters do beside the un-clustered.
    labels = np.empty(images, np.int32)
    labels[:classes] = np.arange(classes)
    labels[classes:] = rng.integers(0, max(classes // 8, 1), images - classes)
    labels = rng.permutation(labels)
    indices = rng.integers(0, images, batch).astype(np.int32)
    indices[-1] = indices[0]
    inputs = features[indices] + rng.standard_normal((batch, dim), np.float32) / np.float32(2 * dim**0.5)
    return features, labels, inputs / np.linalg.norm(inputs, axis=1, keepdims=True), indices


def direct(
    features: np.ndarray, labels: np.ndarray, inputs: np.ndarray, indices: np.ndarray
) -> tuple[float, np.ndarray]:
    """Loss and its gradient [B, D] in float64 over all images, block by block."""
    wide = inputs.astype(np.float64)
    counts = np.bincount(labels)
    sums = np.zeros((len(inputs), len(counts)))
    blocks = [slice(start, start + _ROWS) for start in range(0, len(labels), _ROWS)]
    for block in blocks:
        for total, row in zip(sums, wide @ features[block].astype(np.float64).T, strict=True):
            total += np.bincount(labels[block], row, len(counts))
    weights = np.exp(sums / np.maximum(counts, 1) / TEMPERATURE) * (counts > 0)
    shares = weights / (weights.sum(axis=1, keepdims=True) + EPSILON)
    own = shares[np.arange(len(inputs)), labels[indices]]
    # d(-log(p + e)) = -(p / (p + e)) * (own mean - mean by shares) / temperature
    pull = shares.copy()
    pull[np.arange(len(inputs)), labels[indices]] -= 1
    pull *= (own / (own + EPSILON))[:, None] / TEMPERATURE / np.maximum(counts, 1) / len(inputs)
    gradient = np.zeros_like(wide)
    for block in blocks:
        gradient += pull[:, labels[block]] @ features[block].astype(np.float64)
    return float(-np.log(own + EPSILON).mean()), gradient


def updated_rows(rows: np.ndarray, inputs: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Rows [B, D] of the batch's images after the momentum update, one image after the other."""
    state = {int(i): row.astype(np.float64) for i, row in zip(indices, rows, strict=True)}
    for x, i in zip(inputs, indices, strict=True):
        row = MOMENTUM * state[int(i)] + (1 - MOMENTUM) * x
        state[int(i)] = row / np.linalg.norm(row)
    return np.stack([state[int(i)] for i in indices])


def reference_step(
    features: jax.Array, labels: jax.Array, inputs: jax.Array, indices: jax.Array, *, classes: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """SpCL's step as its authors wrote it (`spcl/models/hm.py`): [B, N] similarities, summed by class."""

    def loss(x):
        similarity = jnp.matmul(x, features.T, precision=jax.lax.Precision.HIGHEST) / TEMPERATURE
        sums = jnp.zeros((classes, len(x)), jnp.float32).at[labels].add(similarity.T)
        counts = jnp.zeros((classes, 1), jnp.float32).at[labels].add(1.0)
        weights = jnp.exp(sums / jnp.maximum(counts, 1.0)) * (counts > 0)
        shares = weights / (weights.sum(axis=0, keepdims=True) + EPSILON)
        return -jnp.log(shares[labels[indices], jnp.arange(len(x))] + EPSILON).mean()

    def update(b, table):
        row = MOMENTUM * table[indices[b]] + (1 - MOMENTUM) * inputs[b]
        return table.at[indices[b]].set(row / jnp.linalg.norm(row))

    value, gradient = jax.value_and_grad(loss)(inputs)
    return jax.lax.fori_loop(0, len(indices), update, features), value, gradient


def _difference(found: Any, expected: Any) -> float:
    expected = np.asarray(expected, np.float64)
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())


def measure(images: int, classes: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table; meant to run in a fresh process."""
    mesh = parallel.make_mesh()
    features, labels, inputs, indices = problem(images, classes, options.dim, options.batch, options.seed)
    probes = min(options.probes, options.batch)
    expected = direct(features, labels, inputs[:probes], indices[:probes])
    expected_rows = updated_rows(features[indices], inputs, indices)
    reference = None
    if images <= options.reference_limit:
        reference = _time_reference(features, labels, inputs, indices, classes, options.repeats)
    memory = hybrid.init(features, labels, momentum=MOMENTUM, temperature=TEMPERATURE, capacity=classes, mesh=mesh)
    del features
    replicated = parallel.replicated(mesh)
    x, i = jax.device_put((inputs, indices), replicated)
    value, gradient = jax.jit(jax.value_and_grad(hybrid.loss, argnums=1))(memory, x[:probes], i[:probes])
    differences = [_difference(value, expected[0]), _difference(gradient, expected[1])]
    shardings = (tables.shardings(memory, mesh), replicated, replicated)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=shardings).lower(memory, x, i).compile()
    held = compiled.memory_analysis()
    assert held is not None
    state = [compiled(memory, x, i)[0]]
    differences.append(_difference(jax.jit(lambda table: table[i])(state[0].features), expected_rows))

    def one() -> jax.Array:
        state[0], loss, _ = compiled(state[0], x, i)
        return loss

    wall, cpu = median_seconds(one, options.repeats)
    relabel, _ = median_seconds(lambda: hybrid.set_labels(state[0], labels), 2)
    steps = max(images // 64, 1)
    plan = timeit.timeit(
        lambda: class_epoch(labels, None, batch_size=64, instances=4, seed=0, epoch=0, steps=steps), number=1
    )
    size = sum(table.nbytes for table in jax.tree.leaves(state[0])) / GIB
    devices, on_device = mesh.size, command.device_peak()
    bytes_held = held.argument_size_in_bytes + held.output_size_in_bytes - held.alias_size_in_bytes
    row = {
        "images": images,
        "classes": classes,
        "step ms": 1e3 * wall,
        "CPU ms": 1e3 * cpu,
        "tables GiB": size,
        "held GiB": (bytes_held + held.temp_size_in_bytes) * devices / GIB,
        "device GiB": None if on_device is None else in_gib(on_device * devices),
        "peak GiB": in_gib(command.peak_memory()),
        "direct": f"{max(differences):.0e}",
        "reference ms": None if reference is None else 1e3 * reference,
        "ratio": None if reference is None else reference / wall,
        "labels s": relabel,
        "plan s": plan,
    }
    if options.backbone:
        del state[0]
        backbone = _time_backbone(options.backbone, options.batch, options.dtype, mesh)
        row |= {"backbone ms": 1e3 * backbone, "share": f"{wall / backbone:.1%}"}
    return row


def _time_reference(
    features: np.ndarray, labels: np.ndarray, inputs: np.ndarray, indices: np.ndarray, classes: int, repeats: int
) -> float:
    """Median seconds of SpCL's step on one device."""
    compiled = jax.jit(reference_step, donate_argnums=0, static_argnames="classes")
    rest = jax.device_put((labels, inputs, indices))
    table = [compiled(jnp.array(features), *rest, classes=classes)[0]]

    def one() -> jax.Array:
        table[0], value, _ = compiled(table[0], *rest, classes=classes)
        return value

    return median_seconds(one, repeats)[0]


def _time_backbone(name: str, batch: int, dtype: str, mesh: Any) -> float:
    """Seconds of a network's training step: forward, backward, Adam."""
    model = models.build(name, bn_group_size=16, dtype=dtype)
    optimiser = optax.adam(3.5e-4)
    params, stats = jax.device_put(model.init(jax.random.key(0)), parallel.replicated(mesh))
    height, width = model.image_size
    images = jax.random.normal(jax.random.key(1), (batch, height, width, 3), jnp.float32)
    images = jax.device_put(images, parallel.by_rows(mesh))

    def train(params, stats, opt_state, images):
        def loss(params):
            outputs, new = model.apply(params, stats, images, train=True)
            return jnp.square(outputs["feature"]).mean(), new

        (value, new), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimiser.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), new, opt_state, value

    compiled = jax.jit(train, donate_argnums=(0, 1, 2))
    state = [compiled(params, stats, jax.jit(optimiser.init)(params), images)]

    def one() -> Any:
        state[0] = compiled(*state[0][:3], images)
        return state[0][3]

    return median_seconds(one, 3)[0]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser("memory", __doc__)
    parser.add_argument("--n", type=command.sizes, default=[12_936], help="numbers of images, separated by commas")
    parser.add_argument(
        "--classes", type=command.sizes, default=[], help="classes for each; default 0.574 of the images"
    )
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--probes", type=int, default=4, help="inputs that are checked against the direct computation")
    parser.add_argument("--reference_limit", type=int, default=200_000, help="largest N of SpCL's own way, 0 for none")
    parser.add_argument("--backbone", default="", help="a network whose training step is timed too, e.g. dmosnet_x1_0")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the backbone")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    arguments.classes = arguments.classes or [max(round(0.574 * n), 1) for n in arguments.n]
    if len(arguments.classes) != len(arguments.n):
        parser.error(f"--classes has {len(arguments.classes)} numbers, --n has {len(arguments.n)}")
    if any(classes > n for n, classes in zip(arguments.n, arguments.classes, strict=True)):
        parser.error("--classes: there can't be more classes than images")
    if min(*arguments.n, *arguments.classes, arguments.dim, arguments.probes, arguments.repeats) < 1:
        parser.error("--n, --classes, --dim, --probes and --repeats must be 1 or more")
    if arguments.batch < 2:
        parser.error("--batch must be 2 or more")
    return arguments


def _run(options: argparse.Namespace) -> None:
    rows = []
    for images, classes in zip(options.n, options.classes, strict=True):
        rows.append(command.in_fresh_process(measure, images, classes, options))
        print(f"{images:,}: {rows[-1]['step ms']:.1f} ms a step", flush=True)
    publish(rows, options.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    options = _arguments(argv)
    return guarded(lambda: _run(options))


if __name__ == "__main__":
    run_program(main)
