"""Writes shards by processes of this machine."""

import concurrent.futures
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from data_prep.write import shards
from data_prep.write.shards import Plan, Result
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.signals import end_with_parent

# Seconds between updates of the progress bar, and between printed lines where there is no terminal for a bar.
_UPDATE = 0.5
_REPORT = 60.0


def run(stage: str, plan: Plan, todo: Sequence[int], workers: int) -> Iterator[tuple[int, Result]]:
    """Writes shards; closing the iterator stops the processes.

    Args:
      stage: see `shards`.
      plan: the plan on it.
      todo: numbers of the shards to write.
      workers: number of processes; 0 for all cores, 1 for this process alone.

    Yields:
      The number and the result of each shard, as they are finished.

    Raises:
      DataError: a shard cannot be written, or a process was killed.
    """
    workers = min(workers or os.cpu_count() or 1, len(todo))
    progress = _Progress(plan.total, plan.total - sum(plan.images[number] for number in todo))
    try:
        if workers <= 1:
            for number in todo:
                yield number, shards.write_shard(stage, number, progress.add)
        else:
            yield from _run_processes(stage, todo, workers, progress)
    finally:
        progress.close()


def _run_processes(
    stage: str, todo: Sequence[int], workers: int, progress: "_Progress"
) -> Iterator[tuple[int, Result]]:
    # A fork would copy the threads' locks of the libraries that are loaded here.
    context = multiprocessing.get_context("spawn")
    images, stop = context.Value("q", 0), context.Event()
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(images, stop))
    try:
        pending = {pool.submit(_write, stage, number): number for number in todo}
        while pending:
            done, _ = concurrent.futures.wait(pending, _UPDATE, concurrent.futures.FIRST_COMPLETED)
            progress.add(images.value - progress.added)
            for future in done:
                yield pending.pop(future), future.result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} worker processes was killed, perhaps for want of memory: give fewer by --workers=N"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


class _StoppedError(BaseException):
    """The run was stopped. Not an `Exception`: storages would report that as a failure of their own."""


# What a worker process shares with the one that started it.
_shared: tuple[Any, Any]


def _begin(images: Any, stop: Any) -> None:
    """Prepares a worker process."""
    global _shared
    _shared = images, stop
    # Ctrl-C goes to all processes of a terminal; the main process decides when its workers stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _write(stage: str, number: int) -> Result:
    return shards.write_shard(stage, number, _count)


def _count(done: int) -> None:
    images, stop = _shared
    if stop.is_set():
        raise _StoppedError
    with images.get_lock():
        images.value += done


class _Progress:
    """A bar of images with their rate and the time left; a line each minute where there is no terminal."""

    def __init__(self, total: int, finished: int):
        self.added = 0
        self._total, self._finished = total, finished
        self._bar = tqdm(total=total, initial=finished, desc="converting", unit=" images", disable=None, leave=False)
        self._begin = self._reported = time.monotonic()

    def add(self, images: int) -> None:
        self.added += images
        self._bar.update(images)
        now = time.monotonic()
        if not self._bar.disable or now - self._reported < _REPORT:
            return
        self._reported = now
        done = self._finished + self.added
        rate = max(self.added, 1) / max(now - self._begin, 1e-9)
        left = tqdm.format_interval((self._total - done) / rate)
        text = f"converted {done:,} of {self._total:,} images, {rate:,.0f} images/s, {left} left"
        print(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
