"""What the benchmarks share: arguments, fresh processes, timing and memory."""

import argparse
import multiprocessing
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax

from dmosnet_jax.core import command

GIB = 2**30


def parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark's arguments, with `--output`."""
    made = command.parser(f"dmosnet_jax.benchmarks.{name}", about)
    made.add_argument("--output", default="", help="CSV file to write")
    return made


def sizes(text: str) -> list[int]:
    """Numbers separated by commas, as `12936,2_090_122`."""
    return [int(part.replace("_", "")) for part in text.split(",")]


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """The type of an argument that takes known names separated by commas."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not known: use {', '.join(known)}")
        return chosen

    return parse


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a new process, which has its own devices and its own peak of memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BaseException:
            # A signal does not wait for a measurement to end.
            for process in multiprocessing.active_children():
                process.kill()
            raise


def median_seconds(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Wall and CPU seconds of a call that returns JAX arrays: the medians of several calls."""
    wall, cpu = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        jax.block_until_ready(function())
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return statistics.median(wall), statistics.median(cpu)


def peak_memory() -> int | None:
    """The most bytes of memory this process has held, or None where the system does not tell."""
    try:
        text = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = [line.split() for line in text.splitlines() if line.startswith("VmHWM")]
    return 1024 * int(found[0][1]) if found else None


def device_peak() -> int | None:
    """The most bytes held on the first device, or None where it does not tell (CPUs)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def in_gib(size: float | None) -> float | None:
    """Bytes in GiB."""
    return None if size is None else size / GIB
