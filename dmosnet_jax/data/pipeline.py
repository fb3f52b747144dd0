"""Host batches: read, decode and resize in background threads or processes (Grain), in an order fixed beforehand.

A batch is a dict: `image` uint8 [B, H, W, 3] RGB, `pid`, `camid` and `index` (row in the split) int32 [B], `mask` bool
[B] (False where padded). With several JAX processes each loads its own contiguous slice of every global batch.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data.autoaugment import AutoAugment
from dmosnet_jax.data.loading import BatchLoader, Failure, HostBatch, ImageCache, Images, Plan
from dmosnet_jax.data.samplers import evaluation_order
from dmosnet_jax.data.transforms import DEFAULT_FILTER

# How long a worker process told to stop goes on, so that the training process can save before it runs out of batches.
_GRACE_SECONDS = 60.0


class TrainStream:
    """Iterator over the training batches of a plan, from any step on, with a checkpointable position.

    Batch `k` is a function of the plan and the data alone: a stream resumed at step k gives what an uninterrupted one
    gives, whatever the threads, workers and earlier position. Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        split: Images,
        plan: Plan,
        *,
        image_size: tuple[int, int],
        interpolation: str = DEFAULT_FILTER,
        threads: int = 2,
        workers: int = 0,
        start: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        labels: np.ndarray | None = None,
        cache: ImageCache | None = None,
        policy: AutoAugment | None = None,
    ):
        """Prepares the stream; nothing is read before the first batch is asked for.

        Args:
          split: a `dmosnet_jax.data.splits.Split`: `source`, `pids`, `camids`, `record(i)`.
          plan: rows of the global batches, see `Plan`.
          image_size: (H, W) in pixels.
          interpolation: filter that resizes, a key of `transforms.FILTERS`.
          threads: decoding threads per process; 0 decodes in the caller's thread.
          workers: decoding processes, each with `threads` threads; 0 decodes in this process. Each needs room for about
            three batches in /dev/shm, and the main module must be guarded by `if __name__ == "__main__"`.
          start: first step of the plan to give.
          process_index: of this JAX process.
          process_count: number of JAX processes; must divide B.
          labels: int [N], given as `pid` instead of the split's (pseudo-labels, or identities renumbered).
          cache: decoded images to share between streams; only without worker processes.
          policy: changes images before they are resized.

        Raises:
          ConfigError: an option is out of range.
          ValueError: plan, labels or cache do not belong to this split.
        """
        _check_readers(threads, workers, cache)
        self._loader = BatchLoader(
            split,
            plan,
            image_size=image_size,
            interpolation=interpolation,
            process_index=process_index,
            process_count=process_count,
            labels=labels,
            cache=cache,
            policy=policy,
        )
        self._steps = len(plan)
        self._threads, self._workers = threads, workers
        self._batches: _Batches | None = None
        self._step = self._check_step(start)

    def __iter__(self) -> "TrainStream":
        return self

    def __next__(self) -> HostBatch:
        """The next batch.

        Raises:
          StopIteration: the plan is at its end.
          DataError: a record or image cannot be read; the position stays at the batch that holds it.
        """
        if self._step >= self._steps:
            self.close()
            raise StopIteration
        if self._batches is None:
            self._batches = _Batches(self._loader, range(self._step, self._steps), self._threads, self._workers)
        try:
            batch = next(self._batches)
        except BaseException:
            self.close()
            raise
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """The position as JSON-able values: the next step, and the plan's length to recognise another plan."""
        return {"step": self._step, "steps": self._steps}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from a position that `get_state` gave, on this or an equal stream.

        Raises:
          DataError: the state belongs to a plan of another length.
        """
        if state.get("steps") != self._steps or not 0 <= state.get("step", -1) <= self._steps:
            raise DataError(
                f"iterator state {state} does not fit a plan of {self._steps} steps: "
                "resume with the config and data the checkpoint was made with"
            )
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Stops threads and processes; the position stays, and the next batch starts them again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __enter__(self) -> "TrainStream":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _check_step(self, step: int) -> int:
        if not 0 <= step <= self._steps:
            raise ConfigError(f"start={step} is outside the plan's 0..{self._steps} steps")
        return int(step)


def evaluation_batches(
    split: Images,
    *,
    image_size: tuple[int, int],
    interpolation: str = DEFAULT_FILTER,
    batch_size: int,
    threads: int = 2,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    cache: ImageCache | None = None,
) -> Iterator[HostBatch]:
    """Every image of the split once, in order; the last batch is padded.

    Padded rows have `mask` False, black images, and -1 as `pid`, `camid` and `index`.

    Args:
      split: see `TrainStream`.
      image_size: (H, W) in pixels.
      interpolation: see `TrainStream`.
      batch_size: of the global batch; `process_count` must divide it.
      threads: see `TrainStream`.
      workers: see `TrainStream`.
      process_index: see `TrainStream`.
      process_count: see `TrainStream`.
      cache: see `TrainStream`.

    Returns:
      An iterator of ceil(N / batch_size) batches; closing it stops its threads.

    Raises:
      ConfigError: an option is out of range; raised by the call.
      DataError: a record or image cannot be read; raised by the iteration.
    """
    rows, mask = evaluation_order(len(split.source), batch_size)
    _check_readers(threads, workers, cache)
    loader = BatchLoader(
        split,
        rows,
        image_size=image_size,
        interpolation=interpolation,
        mask=mask,
        process_index=process_index,
        process_count=process_count,
        cache=cache,
    )
    return _until_closed(loader, range(len(rows)), threads, workers)


def _until_closed(loader: BatchLoader, steps: range, threads: int, workers: int) -> Iterator[HostBatch]:
    if steps:
        with contextlib.closing(_Batches(loader, steps, threads, workers)) as batches:
            yield from batches


class _Batches:
    """Grain's iterator over the loader's batches for a range of steps."""

    def __init__(self, loader: BatchLoader, steps: range, threads: int, workers: int):
        dataset = grain.MapDataset.range(steps.start, steps.stop).map(loader)
        # As many batches ready as are in the making: more would only cost memory.
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        iterable = dataset.to_iter_dataset(options)
        if workers:
            if not flags.FLAGS.is_parsed():
                # Grain reads its own flags when it starts workers, also in programs that never parse any.
                flags.FLAGS.mark_as_parsed()
            iterable = iterable.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), _init_worker)
        self._copies = workers > 0
        self._iterator = iter(iterable)

    def __iter__(self) -> "_Batches":
        return self

    def __next__(self) -> HostBatch:
        batch = next(self._iterator)
        if isinstance(batch, Failure):
            raise batch.error
        # Workers give views of shared memory, which is scarce in containers: copied, it is released at once.
        return {name: np.array(value) for name, value in batch.items()} if self._copies else batch

    def close(self) -> None:
        self._iterator.close()
        if self._copies:
            # The last batch of each worker hangs on a reference cycle of Grain's, and its shared memory with it.
            del self._iterator
            gc.collect()


def _check_readers(threads: int, workers: int, cache: ImageCache | None) -> None:
    if threads < 0 or workers < 0:
        raise ConfigError(f"data.threads={threads} and data.workers={workers} must not be negative")
    if workers and cache is not None:
        raise ConfigError(f"data.workers={workers} cannot share an image cache: set data.workers=0, or no cache")


def _init_worker(index: int, count: int) -> None:
    """Ties a worker's life to the training process, however that one ends."""
    del index, count
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    # Ctrl-C and schedulers signal every process of a job; the training process decides when its workers stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _exit_after(_GRACE_SECONDS))


def _exit_after(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()
