import os
import pathlib
import subprocess
import sys

import pytest

from dmosnet_jax.core import kernels

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_jit_works_where_nothing_can_be_cached():
    # Numba finds no place to cache code that no file holds, as it finds none for a read-only installation.
    space = {}
    exec("def double(x):\n    return 2 * x", space)
    import numba

    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(space["double"])
    assert kernels.jit()(space["double"])(21) == 42


_KERNELS = """
import sys, resource, signal
import numpy as np
from dmosnet_jax.core import kernels, simd

@kernels.jit()
def double(x):
    return 2 * x

def nothing(frame, start, stop):
    pass

if "full" in sys.argv:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
assert simd.kernel(nothing).address
assert double(21) == 42
"""


@pytest.mark.parametrize("harm", ["full", "truncated", "emptied", "no pickle"])
def test_kernels_outlive_a_full_disk_and_damaged_files(tmp_path, harm):
    path = tmp_path / "kernels_of_a_test.py"
    path.write_text(_KERNELS)
    cache = tmp_path / "cache"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(cache)}

    def run(*arguments):
        command = [sys.executable, str(path), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")

    if harm == "full":
        run("full")
        return
    run()
    files = [file for file in cache.rglob("*.nb?") if "kernels_of_a_test" in file.name]
    assert len({file.suffix for file in files}) == 2
    for file in files:
        content = file.read_bytes()
        file.write_bytes({"truncated": content[: len(content) // 2], "emptied": b"", "no pickle": b"x" * 99}[harm])
    run()
    # It is kept again, for later processes.
    run()
    assert all(file.stat().st_size > 99 for file in files)


@pytest.mark.parametrize("threads", [1, 3])
def test_map_rows_covers_all_rows_in_order(threads):
    seen = []
    spans = kernels.map_rows(lambda a, b: (a, b), 10, threads=threads, task_rows=4, progress=seen.append)
    assert spans == [(0, 4), (4, 8), (8, 10)]
    assert seen[-1] == 1.0
    assert kernels.map_rows(lambda a, b: (a, b), 0) == []


def test_map_rows_passes_errors_on():
    def fail(start, stop):
        raise KeyError(start)

    with pytest.raises(KeyError):
        kernels.map_rows(fail, 5)
