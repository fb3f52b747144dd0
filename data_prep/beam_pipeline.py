"""The Beam pipeline that writes shards: one element for each, on this machine's cores or on any Beam runner.

Beam's runner of the same process hands each core its share of the shards. What is done is seen on the stage and not
through Beam, so that it is seen in the same way everywhere, and by a process that starts anew.
"""

import contextlib
import io
import logging
import os
import pathlib
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from data_prep import shards
from data_prep.shards import Plan, Result
from dmosnet_jax.core import files as places
from dmosnet_jax.core.errors import ConfigError, DataError

# Beam logs its own affairs, on import already.
_before = logging.root.manager.disable
logging.disable(logging.CRITICAL)

import apache_beam as beam  # noqa: E402
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions  # noqa: E402
from apache_beam.runners.portability.fn_api_runner import FnApiRunner  # noqa: E402
from apache_beam.transforms import environments  # noqa: E402

logging.disable(_before)

# Seconds between looks at the stage; a remote one is asked less often.
_LOCAL_LOOK, _REMOTE_LOOK = 0.5, 10.0
# Seconds between lines about the progress where there is no terminal for a bar.
_REPORT = 60.0
# Seconds that workers have to start before they are ended.
_CANCEL = 30.0


class _WriteShard(beam.DoFn):
    """Writes the shard with a number."""

    def __init__(self, stage: str):
        self._stage = stage

    def process(self, element: int) -> None:
        shards.write_shard(self._stage, element)


def parse_options(text: str) -> PipelineOptions:
    """Beam's options as a user gives them, e.g. `--runner=DataflowRunner --project=p`.

    Raises:
      ConfigError: Beam does not understand them.
    """
    try:
        words = shlex.split(text)
        # Beam's parser ends the process where it fails.
        with contextlib.redirect_stderr(io.StringIO()):
            options = PipelineOptions(words)
            options.get_all_options()
    except (SystemExit, ValueError) as error:
        raise ConfigError(f"beam_options={text!r} are not options of Beam's: write --name=value") from error
    wrong = [word for word in words if not word.startswith("-")]
    # A word may be the value of an option before it.
    if wrong and ("=" in text or wrong[0] == words[0]):
        raise ConfigError(f"beam_options={text!r}: {wrong[0]!r} is no option: write --name=value")
    # Beam's defaults are one worker in this process.
    given, direct = {word.split("=")[0] for word in words}, options.view_as(DirectOptions)
    if "--direct_running_mode" not in given:
        direct.direct_running_mode = "multi_processing"
    if "--direct_num_workers" not in given:
        direct.direct_num_workers = 0
    return options


def run(stage: str, plan: Plan, finished: set[int], options: PipelineOptions) -> dict[int, Result]:
    """Writes the shards of a plan that are not finished yet.

    Args:
      stage: see `shards`.
      plan: the plan on it.
      finished: numbers of its finished shards.
      options: of Beam; without a runner, all cores of this machine are used.

    Returns:
      What came of every shard.

    Raises:
      DataError: more images are unreadable than allowed, or shards cannot be written.
    """
    todo = [number for number in range(len(plan.images)) if number not in finished]
    known = shards.results(stage)
    if todo:
        with _Job(stage, todo, options) as job, _Progress(stage, plan, finished) as progress:
            while job.wait(_REMOTE_LOOK if places.is_remote(stage) else _LOCAL_LOOK):
                known = shards.results(stage, known=known)
                _check(known, plan)
                progress.update(known)
        known = shards.results(stage, known=known)
    _check(known, plan)
    missing = [number for number in range(len(plan.images)) if number not in known]
    if missing:
        raise DataError(f"{len(missing)} of {len(plan.images)} shards were not written: {job.problem()}")
    return known


def _check(known: dict[int, Result], plan: Plan) -> None:
    skipped = sum(len(result.skipped) for result in known.values())
    if skipped > plan.allowed:
        raise TooManyUnreadableError(known)
    error = next((result.error for result in known.values() if result.error), None)
    if error is not None:
        raise DataError(error)


class TooManyUnreadableError(Exception):
    """More images are unreadable than allowed; `results` are those so far."""

    def __init__(self, results: dict[int, Result]):
        super().__init__()
        self.results = results


class _Job:
    """A pipeline that runs in a thread, so that this one can look and be interrupted."""

    def __init__(self, stage: str, todo: Sequence[int], options: PipelineOptions):
        self._stage, self._todo, self._options = stage, todo, options
        self._result: Any = None
        self._error: BaseException | None = None
        # On the stage, it does not outlive what a killed process left.
        local = None if places.is_remote(stage) else stage
        self._workers = tempfile.mkdtemp(prefix="beam-workers-", dir=local)
        self._expected = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "_Job":
        self._logging = logging.root.manager.disable
        if not self._is_elsewhere():
            logging.disable(logging.CRITICAL)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._cancel()
        logging.disable(self._logging)
        shutil.rmtree(self._workers, ignore_errors=True)

    def wait(self, seconds: float) -> bool:
        """Waits a while; whether the pipeline still runs then."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def problem(self) -> str:
        """Why the pipeline ended too early, in one line."""
        lines = [line.strip() for line in str(self._error).splitlines() if line.strip()]
        return lines[-1] if lines else "the pipeline ended before; run the same command again"

    def _run(self) -> None:
        try:
            pipeline = beam.Pipeline(runner=self._runner(), options=self._options)
            _ = (
                pipeline
                | beam.Create(list(self._todo))
                # Otherwise one worker would make and take all elements.
                | beam.Reshuffle()
                | beam.ParDo(_WriteShard(self._stage))
            )
            self._result = pipeline.run()
            self._result.wait_until_finish()
        except BaseException as error:
            self._error = error

    def _is_elsewhere(self) -> bool:
        return bool(self._options.view_as(StandardOptions).runner)

    def _runner(self) -> Any:
        if self._is_elsewhere():
            return None
        direct = self._options.view_as(DirectOptions)
        mode = direct.direct_running_mode
        workers = min(direct.direct_num_workers or os.cpu_count() or 1, len(self._todo))
        if workers == 1 or mode == "in_memory" or self._stage.startswith("memory://"):
            direct.direct_num_workers, direct.direct_running_mode = 1, "in_memory"
            return FnApiRunner()
        direct.direct_num_workers = workers
        if mode != "multi_processing":
            return FnApiRunner()
        self._expected = workers
        # Otherwise Beam would start workers of its own kind.
        direct.direct_running_mode = None
        script = pathlib.Path(__file__).with_name("beam_worker.py")
        words = map(shlex.quote, (sys.executable, str(script), self._workers))
        # Workers tell their own affairs on standard error.
        command = f"exec {' '.join(words)} 2>{os.devnull}"
        return FnApiRunner(default_environment=environments.SubprocessSDKEnvironment.from_command_string(command))

    def _cancel(self) -> None:
        shards.stop(self._stage)
        if self._result is not None:
            with contextlib.suppress(Exception):
                self._result.cancel()
        # Some may still be starting.
        ended: set[str] = set()
        deadline = time.monotonic() + _CANCEL
        while len(ended) < self._expected and self._thread.is_alive() and time.monotonic() < deadline:
            for name in set(os.listdir(self._workers)) - ended:
                with contextlib.suppress(OSError):
                    os.kill(int(name), signal.SIGTERM)
                ended.add(name)
            self._thread.join(0.1)
        if not self._expected and not self._is_elsewhere():
            # In this process, shards must not be written on while another conversion begins.
            self._thread.join(_CANCEL)


class _Progress:
    """A bar of images with their rate and the time left; a line each minute where there is no terminal."""

    def __init__(self, stage: str, plan: Plan, finished: set[int]):
        self._stage, self._plan, self._finished = stage, plan, finished
        done = sum(plan.images[number] for number in finished)
        self._bar = tqdm(total=plan.total, initial=done, desc="converting", unit=" images", disable=None, leave=False)
        self._initial = self._done = done
        self._begin = time.monotonic()
        self._reported = self._begin

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, known: dict[int, Result]) -> None:
        """Shows how far it is."""
        done = sum(self._plan.images[number] for number in known) + int(sum(self._partial(known)))
        # Between its end and its result, a shard is seen as neither.
        done = self._done = max(done, self._done)
        if not self._bar.disable:
            self._bar.update(max(0, done - self._bar.n))
            return
        now = time.monotonic()
        if now - self._reported < _REPORT:
            return
        self._reported = now
        rate = max(done - self._initial, 1) / (now - self._begin)
        left = tqdm.format_interval((self._plan.total - done) / rate)
        print(
            f"converted {done:,} of {self._plan.total:,} images, {rate:,.0f} images/s, {left} left",
            file=sys.stderr,
        )

    def _partial(self, known: dict[int, Result]) -> Iterator[float]:
        """Images in shards that are being written, by the bytes so far; a remote one is not seen before its end."""
        if places.is_remote(self._stage):
            return
        names = {self._plan.shard_name(number): number for number in range(len(self._plan.images))}
        with contextlib.suppress(OSError):
            for entry in places.entries(places.join(self._stage, shards.DATASET)):
                number = names.get(entry.name.rsplit(".", 2)[0]) if entry.name.endswith(places.PART) else None
                if number is not None and number not in known:
                    share = entry.size / max(self._plan.sizes[number], 1)
                    yield min(share, 1.0) * self._plan.images[number]
