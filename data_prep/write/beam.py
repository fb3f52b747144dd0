"""Writes shards by Apache Beam, for sources that many machines read: one element for each shard."""

import contextlib
import importlib
import io
import logging
import multiprocessing
import os
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from data_prep.write import shards
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.signals import end_with_parent

# Beam logs its own affairs on import.
_before = logging.root.manager.disable
logging.disable(logging.CRITICAL)

import apache_beam as beam  # noqa: E402
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions  # noqa: E402

logging.disable(_before)

# Beam knows this runner by its full name only, and would give 128 shards at a time to a worker.
_DASK = "--runner=apache_beam.runners.dask.dask_runner.DaskRunner"
_DASK_PARTITIONS = ("--dask_partition_size", "--dask_npartitions")
# Runners of this machine; None is Beam's default.
_LOCAL = (None, "DirectRunner", "BundleBasedDirectRunner", "FnApiRunner")


def parse_options(text: str) -> PipelineOptions:
    """Beam's options as a user gives them, e.g. `--runner=DataflowRunner --project=p`.

    Raises:
      ConfigError: Beam does not understand them.
    """
    try:
        words = [_DASK if word == "--runner=DaskRunner" else word for word in shlex.split(text)]
        if _DASK in words and not any(word.startswith(_DASK_PARTITIONS) for word in words):
            words.append("--dask_partition_size=1")
        # A runner of its own module has options of its own, which Beam knows once that is imported.
        for word in words:
            if word.startswith("--runner=") and "." in word:
                importlib.import_module(word.removeprefix("--runner=").rpartition(".")[0])
        # Beam's parser ends the process where it fails.
        with contextlib.redirect_stderr(io.StringIO()):
            options = PipelineOptions(words)
            options.get_all_options()
    except ImportError as error:
        raise ConfigError(
            f"beam_options={text!r}: {error}: install what the runner needs, e.g. apache-beam[dask]"
        ) from error
    except (SystemExit, ValueError) as error:
        raise ConfigError(f"beam_options={text!r} are not options of Beam's: write --name=value") from error
    wrong = [word for word in words if not word.startswith("-")]
    # A word may be the value of an option before it.
    if wrong and ("=" in text or wrong[0] == words[0]):
        raise ConfigError(f"beam_options={text!r}: {wrong[0]!r} is no option: write --name=value")
    return options


def run(stage: str, todo: Sequence[int], options: str) -> Iterator[tuple[int, shards.Result]]:
    """Writes shards, which workers on other machines find on the stage.

    The pipeline runs in a process of its own, which is ended with all that it started: Beam waits for ever for a worker
    of this machine that was killed.

    Args:
      stage: see `shards`; a folder or URL that all workers reach.
      todo: numbers of the shards to write.
      options: of Beam, with the runner; see `parse_options`.

    Yields:
      The number and the result of each shard, at the end.

    Raises:
      DataError: the pipeline failed, or a worker or the pipeline's process was killed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, stage, list(todo), options))
    process.start()
    sender.close()
    try:
        failure = receiver.recv()
    except EOFError:
        failure = "the pipeline's process was killed, perhaps for want of memory"
    finally:
        _end(process)
    results = shards.results(stage)
    missing = [number for number in todo if number not in results]
    if failure or missing:
        raise DataError(f"shards were not written: {failure or f'Beam left out {len(missing):,} of them'}")
    yield from ((number, results[number]) for number in todo)


def _end(process: Any) -> None:
    """Ends the pipeline's process and its workers, which are of its group once it has begun."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _serve(answers: Connection, stage: str, todo: Sequence[int], options: str) -> None:
    """The pipeline's process: sends what went wrong, or nothing."""
    os.setsid()
    end_with_parent(lambda: os.killpg(0, signal.SIGKILL))
    usual = threading.excepthook

    def hook(raised: threading.ExceptHookArgs) -> None:
        # What waits for a worker of this machine; who asked the worker for something waits on.
        if raised.thread is not None and raised.thread.name == "run_worker":
            answers.send(f"a worker of Beam was killed, perhaps for want of memory ({raised.exc_value}): give fewer")
        else:
            usual(raised)

    threading.excepthook = hook
    parsed = parse_options(options)
    if parsed.view_as(StandardOptions).runner in _LOCAL:
        # Each worker of this machine would tell what it does, and all of them of one that was killed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    answers.send(_execute(stage, todo, parsed))


def _execute(stage: str, todo: Sequence[int], options: PipelineOptions) -> str:
    """Runs the pipeline; returns why it failed."""
    try:
        with beam.Pipeline(options=options) as pipeline:
            _ = (
                pipeline
                | beam.Create(list(todo))
                # Otherwise one worker would make and take all elements.
                | beam.Reshuffle()
                | beam.Map(_write, stage)
            )
    # Runners have errors of their own.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return lines[-1]
    return ""


def _write(number: int, stage: str) -> None:
    shards.write_shard(stage, number)
