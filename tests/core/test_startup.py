"""What is set before JAX is loaded."""

import ctypes
import os
import pathlib
import subprocess
import sys

import pytest

from dmosnet_jax.core import startup

FAULTS = """
import resource, sys
from dmosnet_jax.core import startup
assert startup.keep_memory() == (sys.argv[1] == "kept")
import numpy as np
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 24, np.float32).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(4)][-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of Linux' C library")
@pytest.mark.parametrize(("wanted", "least", "most"), [("kept", 0, 100), ("returned", 10_000, 1 << 20)])
def test_memory_that_was_freed_is_used_again(wanted, least, most):
    environment = {**os.environ, startup.MALLOC: "1" if wanted == "kept" else "0"}
    command = [sys.executable, "-c", FAULTS, wanted]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # 64 MiB are 16,384 pages of 4 KiB, unless the system has larger ones.
    assert least <= int(done.stdout) <= most or (wanted == "returned" and int(done.stdout) > 20)


ARENAS = """
import ctypes, sys, threading
from dmosnet_jax import main as program

def run(*_, **__):
    for _ in range(8):
        thread = threading.Thread(target=lambda: ctypes.CDLL(None).malloc(1 << 20))
        thread.start()
        thread.join()
    library = ctypes.CDLL(None)
    library.fopen.restype = ctypes.c_void_p
    file = ctypes.c_void_p(library.fopen(sys.argv[1].encode(), b"w"))
    library.malloc_info(0, file)
    library.fclose(file)

program.app.run = run
program.main()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="the allocator of Linux' C library")
def test_all_threads_of_a_run_share_the_heap_that_keeps_memory(tmp_path):
    """In another one freed memory goes back, and every step of training clears its gigabyte of pages anew."""
    environment = {name: value for name, value in os.environ.items() if name != startup.MALLOC}
    command = [sys.executable, "-c", ARENAS, str(tmp_path / "heaps")]
    done = subprocess.run(
        command, env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "heaps").read_text().count("<heap nr=") == 1


@pytest.mark.parametrize("device", ["nvidiactl", "kfd", "accel0", "vfio/0"])
def test_hosts_of_accelerators_are_left_alone(monkeypatch, tmp_path, device):
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert not startup._accelerator(tmp_path)
    (tmp_path / device).touch()
    assert startup._accelerator(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not startup._accelerator(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert startup._accelerator(tmp_path)


def test_programs_go_to_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Set first, where it is not set, so that it is taken back at the end.
    monkeypatch.setenv(startup.PROGRAMS, "")
    monkeypatch.delenv(startup.PROGRAMS)
    startup.keep_programs()
    chosen = pathlib.Path(os.environ[startup.PROGRAMS])
    assert chosen.parent == tmp_path / "dmosnet_jax" / "programs"
    monkeypatch.delenv(startup.PROGRAMS)
    startup.keep_programs()
    assert os.environ[startup.PROGRAMS] == str(chosen)


@pytest.mark.parametrize("given", ["elsewhere", ""])
def test_a_users_own_choice_stays(monkeypatch, given):
    monkeypatch.setenv(startup.PROGRAMS, given)
    startup.keep_programs()
    assert os.environ[startup.PROGRAMS] == given
