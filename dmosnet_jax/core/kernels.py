"""Compilation and threading of the host kernels: how Numba caches, and how rows are shared out over threads."""

import concurrent.futures
import contextlib
import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import numba

from dmosnet_jax.core.arguments import count

ROWS_PER_TASK = (1024, 65536)  # bounds: kernels clear scratch as long as the data set at the start of each task
_MOST_THREADS = 4096


def jit(**options: Any) -> Callable[[Callable], Callable]:
    """Numba's `njit` without the GIL, compiled code kept on disk where a writable place for it exists.

    Numba refuses to decorate (`RuntimeError`) when neither the package's folder nor the user's cache folder can be
    written, as in a read-only container; the kernel is then compiled in each process instead, and so it is where the
    disk is full or what is kept is damaged.

    Args:
        **options: passed to `numba.njit`, e.g. `fastmath`.
    """

    def decorate(function: Callable) -> Callable:
        # A run-time type checker may have wrapped it.
        function = inspect.unwrap(function)
        try:
            compiled = numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:
            return numba.njit(nogil=True, **options)(function)
        # None where a debugger has switched compilation off.
        cache = getattr(compiled, "_cache", None)
        if cache is not None:
            _forgive(cache)
        return compiled

    return decorate


def _forgive(cache: Any) -> None:
    """Code that can't be kept (a full disk) or read (a damaged file) is compiled anew."""
    for name in ("load_overload", "save_overload"):
        setattr(cache, name, functools.partial(_tried, cache, getattr(cache, name)))


def _tried(cache: Any, method: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return method(*arguments)
    except Exception:
        # A damaged file would stand in the way of every later process too.
        with contextlib.suppress(Exception):
            cache.flush()
        return None


def thread_count(threads: int | None = None) -> int:
    """Number of worker threads: `threads`, or the cores this process may run on; ConfigError for no such number."""
    if threads:
        return count("threads", threads, most=_MOST_THREADS)
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else (os.cpu_count() or 1)


def map_rows(
    function: Callable[[int, int], Any],
    rows: int,
    *,
    threads: int | None = None,
    task_rows: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[Any]:
    """Runs `function(start, stop)` over consecutive row ranges on several threads; results come in row order.

    Threads of ours rather than Numba's: its default threading layer aborts the process when two Python threads enter
    parallel kernels at once, which a training program with loader threads cannot exclude.

    Args:
        function: works on rows `start..stop`; must release the GIL to gain from threads.
        rows: number of rows, 0 gives an empty list.
        threads: worker threads, default all cores.
        task_rows: rows per call, default about eight calls per thread.
        progress: called with the finished fraction in (0, 1].

    Returns:
        One result per range, in order.
    """
    workers = thread_count(threads)
    if task_rows is None:
        task_rows = min(max(rows // (8 * workers), ROWS_PER_TASK[0]), ROWS_PER_TASK[1])
    ranges = [(start, min(start + task_rows, rows)) for start in range(0, rows, task_rows)]
    results = []
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for done, result in enumerate(pool.map(lambda span: function(*span), ranges), start=1):
            results.append(result)
            if progress is not None:
                progress(done / len(ranges))
    return results
