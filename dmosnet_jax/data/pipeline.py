"""Host batches: read, decode and resize in background threads or processes (Grain), in an order fixed beforehand.

A batch is a dict: `image` uint8 [B, H, W, 3] RGB, `pid`, `camid` and `index` (row in the split) int32 [B], `mask` bool
[B] (False where padded). With several JAX processes each loads its own contiguous slice of every global batch.
"""

import functools
import gc
import os
import signal
import threading
from collections.abc import Generator
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Integer

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.signals import end_with_parent
from dmosnet_jax.data.loading import BatchLoader, Failure, HostBatch, ImageCache
from dmosnet_jax.data.samplers import evaluation_order
from dmosnet_jax.data.splits import Rows

# A worker process that is told to stop goes on so long: the training process can save before it runs out of batches.
_GRACE_SECONDS = 60.0

Batches = Generator[HostBatch, None, None]


def train_batches(
    split: Rows,
    plan: Integer[np.ndarray, "steps batch"],
    *,
    threads: int = 2,
    workers: int = 0,
    start: int = 0,
    cache: ImageCache | None = None,
    **loading: Any,
) -> Batches:
    """The training batches of a plan, from any step on; closing the generator stops its threads and processes.

    Batch `k` is a function of the plan and the data alone: started at step k, the generator gives what an uninterrupted
    one gives, whatever the threads and workers.

    Args:
      split: the images.
      plan: rows of the split in each global batch.
      threads: decoding threads per process; 0 decodes in the caller's thread.
      workers: decoding processes, each with `threads` threads; 0 decodes in this process. Each needs room for about
        three batches in /dev/shm, and the main module must be guarded by `if __name__ == "__main__"`.
      start: first step of the plan to give.
      cache: decoded images to share between calls; only without worker processes.
      **loading: further options of `loading.BatchLoader`; `image_size` is required.

    Raises:
      ConfigError: an option is out of range; raised by the call.
      ValueError: plan, labels or cache do not belong to this split; raised by the call.
      DataError: a record or image cannot be read; raised by the iteration.
    """
    _check_readers(threads, workers, cache)
    if not 0 <= start <= len(plan):
        raise ConfigError(f"start={start} is outside the plan's 0..{len(plan)} steps")
    loader = BatchLoader(split, plan, cache=cache, **loading)
    return _read(loader, range(start, len(plan)), threads, workers)


def evaluation_batches(
    split: Rows,
    *,
    batch_size: int,
    threads: int = 2,
    workers: int = 0,
    cache: ImageCache | None = None,
    **loading: Any,
) -> Batches:
    """Every image of the split once, in order, in ceil(N / batch_size) batches; otherwise as `train_batches`.

    The last batch is padded: there, `mask` is False, images are black, and `pid`, `camid` and `index` are -1.
    """
    _check_readers(threads, workers, cache)
    rows, mask = evaluation_order(len(split), batch_size)
    loader = BatchLoader(split, rows, mask=mask, cache=cache, **loading)
    return _read(loader, range(len(rows)), threads, workers)


def _read(loader: BatchLoader, steps: range, threads: int, workers: int) -> Batches:
    if not steps:
        return
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(loader)
    # As many batches ready as are in the making: more would only cost memory.
    iterable = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if workers:
        if not flags.FLAGS.is_parsed():
            # Grain reads its own flags when it starts workers, also in programs that never parse any.
            flags.FLAGS.mark_as_parsed()
        iterable = iterable.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), _init_worker)
    iterator = iter(iterable)
    try:
        yield from map(functools.partial(_batch, copy=workers > 0), iterator)
    except RuntimeError as error:
        # Grain's message for a process that is gone.
        if "terminated unexpectedly" not in str(error):
            raise
        raise DataError(
            f"one of {workers} decoding processes was killed, perhaps for want of memory (also in /dev/shm): lower "
            "data.workers"
        ) from error
    finally:
        iterator.close()
        if workers:
            # The last batch of each worker hangs on a reference cycle of Grain's, and its shared memory with it.
            del iterator
            gc.collect()


def _batch(loaded: HostBatch | Failure, copy: bool) -> HostBatch:
    if isinstance(loaded, Failure):
        raise loaded.error
    # Workers give views of shared memory, which is scarce in containers: copied, it is released at once.
    return {name: np.array(value) for name, value in loaded.items()} if copy else loaded


def _check_readers(threads: int, workers: int, cache: ImageCache | None) -> None:
    if threads < 0 or workers < 0:
        raise ConfigError(f"data.threads={threads} and data.workers={workers} must not be negative")
    if workers and cache is not None:
        raise ConfigError(f"data.workers={workers} cannot share an image cache: set data.workers=0, or no cache")


def _init_worker(index: int, count: int) -> None:
    """Ties a worker's life to the training process, however that one ends."""
    del index, count
    end_with_parent()
    # Ctrl-C and schedulers signal every process of a job; the training process decides when its workers stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _exit_after(_GRACE_SECONDS))


def _exit_after(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()
