"""Seconds and memory of clustering by number of images, against the dense N x N computation where that fits.

    python -m dmosnet_jax.benchmarks.clustering --n 12936,50000,200000,2090122 --output=clustering.csv

Features are made up, with the structure of a network's (`benchmarks/structured.py`), unless --features gives an .npz or
.npy file. `us/image` is the time without the neighbour search, `peak GiB` the most memory the process ever held,
features included, `estimate GiB` what `estimate_memory` promised. `TFLOP/s` counts the operations that N x N
similarities take (on a device the time includes compiling the search), and `of matmul` is their share of what one large
product reaches there. Each size runs in a process of its own. Neighbours are searched for up to --search_limit images
on a processor, and beyond it taken as known, which made-up features allow.
"""

import argparse
import os
import sys
import time
import timeit
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmosnet_jax.benchmarks import command, dense, structured
from dmosnet_jax.benchmarks.command import GIB, in_gib
from dmosnet_jax.core import tables
from dmosnet_jax.core.command import guarded, run_program
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.memory.clustering import Clustering, cluster, host_memory, neighbours

_STAGES = ("weights", "jaccard", "dbscan", "criterion")
_SEARCHES = ("auto", "host", "device", "given")


def matmul_rate(dim: int, *, device: bool) -> float:
    """Operations per second of one large float32 product, the roofline of the neighbour search."""
    rows = 4096
    table = np.random.default_rng(0).standard_normal((rows, dim), np.float32)
    if device:
        on_device = jax.device_put(table)
        product = jax.jit(lambda x: jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST).max(axis=1))
        product(on_device).block_until_ready()
        run = lambda: product(on_device).block_until_ready()  # noqa: E731
    else:
        out = np.empty((rows, rows), np.float32)
        run = lambda: np.matmul(table, table.T, out=out)  # noqa: E731
    return 2 * rows * rows * dim / min(timeit.repeat(run, number=1, repeat=5))


def _load(path: str, images: int) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
        table = loaded["features"] if hasattr(loaded, "files") else loaded
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not an .npy file or an .npz with `features` ({error})") from error
    if table.ndim != 2 or len(table) < images:
        raise DataError(f"{path}: features have shape {table.shape}; --n asks for {images} rows")
    return unit_rows_np(np.ascontiguousarray(table[:images], np.float32))


def _on_device(search: str) -> bool:
    return jax.default_backend() != "cpu" if search == "auto" else search == "device"


def measure(images: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table; meant to run in a fresh process, whose peak memory is the clustering's."""
    device = _on_device(options.neighbours)
    given = options.neighbours == "given" or (
        options.neighbours == "auto" and not device and images > options.search_limit and not options.features
    )
    nearest = None
    if options.features:
        table = _load(options.features, images)
    else:
        table, _, nearest = structured.features(images, options.dim, seed=options.seed)
    _warm_up(table)
    seconds: dict[str, float] = {}
    if not given:
        del nearest
        start = time.perf_counter()
        backend = "device" if device else "host"
        nearest = neighbours.search(table, options.k1, backend=backend, candidates=options.candidates).indices
        seconds["neighbours"] = time.perf_counter() - start
    found = cluster(table, nearest=nearest, k1=options.k1, eps=options.eps, threads=options.threads or None)
    seconds |= {name: found.seconds[name] for name in _STAGES}
    graph_seconds = sum(seconds[name] for name in _STAGES)
    peak = command.peak_memory()
    estimate = host_memory.estimate_memory(images, table.shape[1], k1=options.k1, threads=options.threads or None)
    row: dict[str, Any] = {"images": images, "neighbours": seconds.get("neighbours")}
    row |= {name: seconds[name] for name in _STAGES}
    row |= {
        "total": sum(seconds.values()),
        "us/image": 1e6 * graph_seconds / images,
        "peak GiB": in_gib(peak),
        "KiB/image": None if peak is None else peak / 1024 / images,
        "estimate GiB": estimate["total"] / GIB,
        "device GiB": in_gib(command.device_peak() if device else None),
        "clusters": found.num_clusters,
        "alone": found.num_unclustered,
    }
    row |= _rates(images, table.shape[1], seconds.get("neighbours"), device)
    return row | _compare(table, found, row, options)


def _warm_up(table: np.ndarray) -> None:
    """Compiles the kernels."""
    few = structured.features(512, table.shape[1])[0]
    cluster(few, eps=0.9)
    neighbours.search_host(few, 2, block=256)


def _rates(images: int, dim: int, seconds: float | None, device: bool) -> dict[str, Any]:
    if seconds is None:
        return {"TFLOP/s": None, "of matmul": None}
    rate = 2.0 * images * images * dim / seconds
    if device:
        rate /= jax.device_count()
    return {"TFLOP/s": rate / 1e12, "of matmul": rate / matmul_rate(dim, device=device)}


def _compare(table: np.ndarray, found: Clustering, row: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and ratio of the dense computation, after everything else: its memory must not count as ours."""
    nothing = {"dense": None, "ratio": None, "same labels": None}
    if len(table) > options.dense_limit or row["neighbours"] is None:
        return nothing
    need = 4 * dense.MATRICES * len(table) ** 2
    if need > host_memory.machine_memory():
        return nothing
    try:
        clusters, classes, seconds = dense.labels(table, k1=options.k1, eps=options.eps)
    except ImportError:
        print("no comparison with the dense computation: pip install scikit-learn", file=sys.stderr)
        return nothing
    pairs = np.stack([classes, found.labels])
    same = np.array_equal(clusters, found.dbscan) and (
        np.unique(pairs, axis=1).shape[1] == len(np.unique(classes)) == len(np.unique(found.labels))
    )
    total = sum(seconds.values())
    return {"dense": total, "ratio": total / row["total"], "same labels": "yes" if same else "no"}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser("clustering", __doc__)
    parser.add_argument("--n", type=command.sizes, default=[12_936], help="numbers of images, separated by commas")
    parser.add_argument("--dim", type=int, default=512, help="feature length of made-up features")
    parser.add_argument("--k1", type=int, default=30)
    parser.add_argument("--eps", type=float, default=0.6)
    parser.add_argument("--features", default="", help="an .npy file, or an .npz file with `features`, to cluster")
    parser.add_argument("--neighbours", choices=_SEARCHES, default="auto", help="auto: device where it is no processor")
    parser.add_argument(
        "--candidates",
        type=int,
        default=0,
        help="on devices: find so many by bfloat16 products first; 0 for exact ones",
    )
    parser.add_argument("--search_limit", type=int, default=100_000, help="largest N that a processor searches")
    parser.add_argument(
        "--dense_limit", type=int, default=13_000, help="largest N of the dense computation, 0 for none"
    )
    parser.add_argument("--threads", type=int, default=0, help="host threads, 0 for all cores")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if min(*arguments.n, arguments.dim, arguments.k1) < 2:
        parser.error("--n, --dim and --k1 must be 2 or more")
    if arguments.features and arguments.neighbours == "given":
        parser.error("--neighbours=given goes with made-up features: leave out --features")
    return arguments


def _run(options: argparse.Namespace) -> None:
    print(f"{os.cpu_count()} CPU cores, {host_memory.machine_memory() / GIB:.0f} GiB of memory", flush=True)
    rows = []
    for images in options.n:
        rows.append(command.in_fresh_process(measure, images, options))
        print(f"{images:,}: done in {rows[-1]['total']:.1f} s", flush=True)
    tables.publish(rows, options.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    options = _arguments(argv)
    return guarded(lambda: _run(options))


if __name__ == "__main__":
    run_program(main)
