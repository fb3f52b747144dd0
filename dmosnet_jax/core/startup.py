"""What a program does before it loads JAX: the allocator keeps memory, compiled programs are kept on disk.

And what it prints may go to a reader that leaves, as `head` does.
"""

import ctypes
import hashlib
import io
import os
import pathlib
import platform
import stat
import sys
from typing import Any

MALLOC, PROGRAMS = "DMOSNET_MALLOC", "JAX_COMPILATION_CACHE_DIR"
# <malloc.h>: M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX.
_OPTIONS = {-1: -1, -4: 0, -8: 1}
# NVIDIA, AMD, and TPUs by either driver.
_ACCELERATORS = ("nvidiactl", "kfd", "accel*", "vfio/[0-9]*")


def keep_memory() -> bool:
    """Freed memory is not returned to the system; with glibc alone, and not with `DMOSNET_MALLOC=0`.

    A training step on CPU takes gigabytes and frees them. By default the system takes them back and clears each page
    anew in the next step, which costs a quarter of the processor's time. Where an accelerator computes, the host's
    threads only decode, and one arena for all of them would hold them up: nothing is changed there.

    To be called while there is one thread. Large memory goes back to the system from every arena but the first, and a
    thread that starts earlier makes another, which later threads are given too.

    Returns:
        Whether it was done.
    """
    if sys.platform != "linux" or os.environ.get(MALLOC, "1") == "0" or _accelerator(pathlib.Path("/dev")):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    done = [library.mallopt(option, value) for option, value in _OPTIONS.items()]
    return all(done)


def keep_programs() -> None:
    """JAX keeps compiled programs in the user's cache folder; `JAX_COMPILATION_CACHE_DIR` names another, empty none.

    A folder is for one kind of processor: XLA's programs for CPUs use the instructions of the one they were made on.
    """
    if PROGRAMS in os.environ:
        return
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path("~/.cache").expanduser()
    os.environ[PROGRAMS] = str(pathlib.Path(base, "dmosnet_jax", "programs", _processor()))


class _Lasting(io.FileIO):
    """A pipe that nothing goes into any more once its reader has left."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            return len(data)


def outlast_readers() -> None:
    """Standard output and error may be pipes whose reader leaves: the command goes on, and its files are written."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            handle = stream.fileno()
            kind = os.fstat(handle).st_mode
        except (AttributeError, OSError, ValueError):
            continue
        if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
            stream.flush()
            pipe = io.BufferedWriter(_Lasting(handle, "w", closefd=False))
            lines = name == "stderr" or stream.line_buffering
            setattr(sys, name, io.TextIOWrapper(pipe, stream.encoding, stream.errors, line_buffering=lines))


def quiet_callbacks() -> None:
    """After a failed save the callbacks of libraries find their loop closed, a thousand times: that is not printed."""
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
            usual(unraisable)

    sys.unraisablehook = hook


def _accelerator(devices: pathlib.Path) -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms != "cpu"
    return any(path for pattern in _ACCELERATORS for path in devices.glob(pattern))


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    kinds = {line for line in lines if line.partition("\t")[0] in ("model name", "flags", "Features")} or set(lines[:1])
    return f"{platform.machine()}-{hashlib.sha256(repr(sorted(kinds)).encode()).hexdigest()[:12]}"
