"""Two processes on the loopback give the neighbours, labels and memory of one device."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# argv: process, processes, port, output folder. Writes what this process has at the end.
SCRIPT = """
import sys

import jax
import numpy as np

process, processes, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if processes > 1:
    jax.distributed.initialize("127.0.0.1:" + port, processes, process)

from dmosnet_jax.benchmarks import structured
from dmosnet_jax.core import parallel
from dmosnet_jax.core.errors import UserError
from dmosnet_jax.memory import hybrid, tables
from dmosnet_jax.memory.clustering import cluster, neighbours

mesh = parallel.make_mesh()
features, _, _ = structured.features(500, 64)
found = {}
for backend in ("host", "device"):
    nearest = neighbours.search(features, 20, mesh=mesh, backend=backend)
    found[backend], found[backend + "_similarities"] = nearest.indices, nearest.similarities
# The same as rows of a table, none of whose processes but the first ever makes a copy of it all.
tables.PIECE_BYTES = 10_000
filling = tables.Filling(507, 64, mesh)
filling.write(0, np.zeros((7, 64), np.float32))
for start in range(0, 500, 90):
    filling.write(7 + start, features[start : start + 90])
table = filling.finish()
assert sum(len(shard.data) for shard in table.table.addressable_shards) == len(table.table) // processes
images = tables.TableRows(table.table, 7, 507, mesh)
assert (images.on_first is None) == (process > 0)
assert process or (images.on_first == features).all()
found["some"] = images.fetch(80, 330)
for backend in ("host", "device"):
    nearest = neighbours.search(images, 20, backend=backend)
    found[backend + "_of_table"], found[backend + "_of_table_similarities"] = nearest.indices, nearest.similarities
parts = neighbours.search_host(images, 20, block=23, share=(process, processes))
parts = parallel.by_process((parts.indices, parts.similarities)) if processes > 1 else [x[None] for x in parts[:2]]
found["strips_of_table"] = neighbours.merge([neighbours.Neighbours(*part) for part in zip(*parts)]).indices
found["strips"] = found["host"]
for name, values in (("candidates", features), ("candidates_of_table", images)):
    found[name] = neighbours.search(values, 20, mesh=mesh, backend="device", candidates=40).indices
found["labels_of_table"] = cluster(images, k1=20).labels
result = cluster(features, k1=20, mesh=mesh)
names = ("labels", "dbscan", "dbscan_tight", "dbscan_loose", "r_comp", "r_indep", "indep_threshold", "num_clusters",
         "num_unclustered", "largest_cluster")
found |= {name: getattr(result, name) for name in names}
second = cluster(features, k1=20, mesh=mesh, indep_threshold=result.indep_threshold)
found["again"] = second.labels
try:
    cluster(features, k1=20, mesh=mesh, eps=0.03)
    found["refusal"] = ""
except UserError as error:
    found["refusal"] = str(error)

def step(memory, inputs, indices):
    value, gradient = jax.value_and_grad(hybrid.loss, argnums=1)(memory, inputs, indices)
    return hybrid.update(memory, inputs, indices, loss=value), value, gradient

memory = hybrid.init(features, result.labels, momentum=0.2, temperature=0.05, mesh=mesh)
places, everywhere = tables.shardings(memory, mesh), parallel.replicated(mesh)
jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, everywhere, everywhere))
rng = np.random.default_rng(0)
for number in range(3):
    indices = rng.integers(0, 500, 32).astype(np.int32)
    indices[5] = indices[0]
    inputs = features[indices] + np.float32(0.05) * rng.normal(size=(32, 64)).astype(np.float32)
    inputs /= np.linalg.norm(inputs, axis=1, keepdims=True)
    mine = slice(process * 32 // processes, (process + 1) * 32 // processes)
    batch = parallel.to_devices({"inputs": inputs[mine], "indices": indices[mine]}, mesh)
    memory, value, gradient = jitted(memory, batch["inputs"], batch["indices"])
    found[f"loss{number}"], found[f"gradient{number}"] = np.asarray(value), np.asarray(gradient)
    if number == 1:
        memory = hybrid.set_labels(memory, np.arange(500) % 37)
found["drift"] = float(hybrid.drift(memory))
arrays = parallel.to_host(jax.tree.map(lambda x: x, memory))
found |= {"features": arrays.features, "sums": arrays.class_sums, "counts": arrays.class_counts}
found["devices"] = mesh.size
np.savez(f"{folder}/{processes}-{process}.npz", **found)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(processes, devices, folder):
    port = str(free_port())
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(process), str(processes), port, str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        printed = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, printed
    results = []
    for process in range(processes):
        with np.load(folder / f"{processes}-{process}.npz") as arrays:
            results.append(dict(arrays))
    return results


@pytest.mark.slow
def test_two_processes_equal_one_device(tmp_path):
    (one,) = run(1, 1, tmp_path)
    two = run(2, 2, tmp_path)
    assert one["devices"] == 1
    assert "not one cluster" in str(one["refusal"]) or "only" in str(one["refusal"])
    assert str(two[0]["refusal"]) == str(one["refusal"])
    assert str(two[1]["refusal"]) == "process 0 failed, and its message says why"
    for name in ("host", "strips", "device", "candidates", "labels"):
        np.testing.assert_array_equal(one[f"{name}_of_table"], one[name])
    close = ("similarities", "loss", "gradient", "features", "sums", "drift")
    for found in two:
        assert found["devices"] == 4
        for name, expected in one.items():
            if name in ("devices", "refusal"):
                continue
            if any(part in name for part in close):
                np.testing.assert_allclose(found[name], expected, atol=2e-5, err_msg=name)
            else:
                np.testing.assert_array_equal(found[name], expected, err_msg=name)
    for name, value in two[0].items():
        if name != "refusal":
            np.testing.assert_array_equal(two[1][name], value, err_msg=name)
