"""The training loop: one function, in a fixed order: epoch start, steps, evaluation, checkpoint.

A run can be killed at any step. All state is in its `RunState`, which is what a checkpoint holds; batches and random
numbers are functions of (seed, epoch, step). A resumed run therefore computes what an uninterrupted one computes.
"""

import contextlib
import dataclasses
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dmosnet_jax.core import signals
from dmosnet_jax.core.errors import UserError
from dmosnet_jax.core.parallel import by_process, from_first, to_devices, to_host
from dmosnet_jax.data.pipeline import Batches
from dmosnet_jax.train.checkpoints import Checkpoints
from dmosnet_jax.train.metrics import MetricsWriter, progress_bar, write_json
from dmosnet_jax.train.state import RunState, TrainState
from dmosnet_jax.train.steps import Step

# Steps dispatched ahead of the devices: enough to hide the host's work, few enough to stop soon and to bound the
# batches held in memory.
_IN_FLIGHT = 2
_SAME_SIGNAL_SECONDS = 1.0


class StoppedError(UserError):
    """The run was asked to stop (SIGTERM, SIGINT) and has saved its state; 128 + SIGTERM, as shells report it."""

    exit_status = 143
    everywhere = True


class NonFiniteLossError(UserError):
    """The loss left the finite numbers; the last checkpoint is from before."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths and intervals of a run, in steps unless the name says something else.

    With `checkpoint_minutes` the first step after so long is saved whose number `checkpoint_multiple` divides.
    """

    steps_per_epoch: int
    epochs: int
    log_every: int
    checkpoint_every: int | None
    eval_every_epochs: int
    checkpoint_minutes: float | None = None
    checkpoint_multiple: int = 1

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.epochs


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a recipe brings to the loop.

    Attributes:
        step: the training step, compiled.
        begin_epoch: (run, epoch, offset) -> (run, batches, metrics to log): prepares an epoch, or
            with an offset > 0 the rest of one, whose batches start at the offset.
        evaluate: (run, finished epochs) -> metrics, or None where no data set has queries.
        files: file names of training images, for messages.
        before_step: (state, steps taken) -> the state that the next step starts from.
        end_epoch: run -> metrics to log after the last step of an epoch.
        compact: state -> the state without what a run that goes on computes anew, to the same numbers.
        begins_with: what takes time at the start of an epoch, for the progress bar.
        scored: whether there is something to evaluate, likewise.
    """

    step: Step
    begin_epoch: Callable[[RunState, int, int], tuple[RunState, Batches, Mapping[str, float]]]
    evaluate: Callable[[RunState, int], Mapping[str, float] | None]
    files: Callable[[np.ndarray], list[str]]
    before_step: Callable[[TrainState, int], TrainState] = lambda state, number: state
    end_epoch: Callable[[RunState], Mapping[str, float]] = lambda run: {}
    compact: Callable[[TrainState], TrainState] = lambda state: state
    begins_with: str = ""
    scored: bool = True

    def after(self, epochs: int, lengths: Lengths) -> str:
        """What comes next when so many epochs are done."""
        then = []
        if self.scored and (epochs == lengths.epochs or epochs % lengths.eval_every_epochs == 0):
            then.append("evaluation")
        if epochs < lengths.epochs:
            then.append(self.begins_with or f"epoch {epochs + 1}")
        return " and ".join(then) or "the end"


def train(
    run: RunState,
    recipe: Recipe,
    lengths: Lengths,
    store: Checkpoints,
    *,
    mesh: Mesh,
    workdir: pathlib.Path,
    batch_size: int,
) -> RunState:
    """Trains to the last step.

    Args:
        run: a fresh run, or one from a checkpoint.
        recipe: what an epoch and a step are.
        lengths: how long, and what happens how often.
        store: where checkpoints go.
        mesh: the devices.
        workdir: where metrics go.
        batch_size: of the global batch.

    Raises:
        StoppedError: a signal came; the state is saved.
        NonFiniteLossError: see there.
    """
    number = int(run.state.step)
    total = lengths.total_steps
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(store.wait)
        writer = MetricsWriter(workdir, first_step=number)
        at_the_end.callback(writer.close)
        bar = at_the_end.enter_context(progress_bar(total * batch_size, label="train", initial=number * batch_size))
        stop = at_the_end.enter_context(_StopFlag())
        at_the_end.callback(signals.finish_first, "")
        clock, is_compiled = _Clock(lengths.checkpoint_minutes), False
        while number < total:
            epoch, offset = divmod(number, lengths.steps_per_epoch)
            run, stream, notes = recipe.begin_epoch(run, epoch, offset)
            if notes:
                # They belong to the first step to come: a run resumed at this boundary writes them again.
                writer.write(number + 1, {"epoch": epoch, **notes})

            window, then = _MetricsWindow(workdir, recipe.files), recipe.after(epoch + 1, lengths)
            bar.skip_pause()
            with contextlib.closing(stream):
                for batch in stream:
                    # What it replaces is let go before the step needs the room.
                    run = run.replace(state=recipe.before_step(run.state, number))
                    state, metrics = recipe.step(run.state, to_devices(batch, mesh))
                    run, number = run.replace(state=state), number + 1
                    if not is_compiled:
                        is_compiled = True
                        bar.skip_pause()
                    window.add(number, metrics, batch["index"])
                    # Until now there was nothing to save.
                    signals.finish_first("the step under way, and saves it")
                    bar.update(batch_size)
                    if number % lengths.log_every == 0:
                        means, steps_per_second = window.flush()
                        rate = {"images_per_second": steps_per_second * batch_size}
                        writer.write(number, {"epoch": epoch, **means, **rate})
                        # Shown when the bar is next drawn: with a rate of its own time, and in a log file not so often.
                        text = f"epoch {epoch + 1} of {lengths.epochs}, loss {means['loss']:.3f}, then {then}"
                        bar.set_postfix_str(text, refresh=False)
                    if number % lengths.steps_per_epoch == 0:
                        # Saved below, after its evaluation.
                        continue
                    # Agreeing with other processes waits for the step to finish, as logging does.
                    may_stop = jax.process_count() == 1 or number % lengths.log_every == 0
                    stopping = may_stop and stop.agree()
                    due = lengths.checkpoint_every is not None and number % lengths.checkpoint_every == 0
                    if number % lengths.checkpoint_multiple == 0:
                        due |= clock.agree()
                    if stopping or due:
                        window.flush()
                        store.save(recipe.compact(run.state), run.meta)
                        clock.restart()
                    if stopping:
                        _stop(number, stop, store, workdir)
            window.flush()

            # A pending stop waits for the evaluation: the checkpoint of an epoch's end is saved with its scores, and a
            # resumed run would start with the next epoch.
            done = epoch + 1
            notes = recipe.end_epoch(run)
            if notes:
                writer.write(number, {"epoch": epoch, **notes})
            scores = None
            if number == total or done % lengths.eval_every_epochs == 0:
                scores = recipe.evaluate(run, done)
                if scores is not None:
                    writer.write(number, {"epoch": epoch, **scores})
            store.save(recipe.compact(run.state), run.meta, metrics=scores)
            clock.restart()
            if number < total and stop.agree():
                _stop(number, stop, store, workdir)
    return run


class _Clock:
    """Minutes since the last checkpoint, by the clock of process 0: others may run a little earlier or later."""

    def __init__(self, minutes: float | None):
        self._seconds = None if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        self._since = time.monotonic()

    def agree(self) -> bool:
        """Whether it is time, the same on every process."""
        if self._seconds is None:
            return False
        return bool(from_first(np.int32(time.monotonic() - self._since >= self._seconds)))


class _StopFlag:
    """Notes SIGTERM and SIGINT; the loop saves and stops at the next step. A second signal acts at once.

    In a job a scheduler may signal both this process and its parent, which passes it on: within a second they are one.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopFlag":
        # Python delivers signals to the main thread only; elsewhere (a notebook's worker) there is nothing to install.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        del frame
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._since > _SAME_SIGNAL_SECONDS:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
        if jax.process_count() == 1:
            # The system then acts by itself, also where native code is blocked.
            signal.signal(number, self._previous[number])

    def agree(self) -> bool:
        """Whether to stop, the same on every process: one that stopped alone would leave the others waiting for it."""
        if jax.process_count() > 1:
            number = int(by_process(np.int32(self.signal or 0)).max())
            self.signal = signal.Signals(number) if number else None
        return self.signal is not None

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _stop(number: int, stop: _StopFlag, store: Checkpoints, workdir: pathlib.Path) -> None:
    store.wait()
    assert stop.signal is not None
    # Else the watch would repeat the signal while files are closed, and this error would be lost.
    signals.heeded()
    raise StoppedError(
        f"stopped by {stop.signal.name} at step {number}, which is saved in {workdir}: run the same command to go on"
    )


class _MetricsWindow:
    """Metrics of the steps since the last log entry, kept on the devices so that reading them stalls none."""

    def __init__(self, workdir: pathlib.Path, files: Callable[[np.ndarray], list[str]]):
        self._workdir, self._files = workdir, files
        self._steps: list[tuple[int, dict[str, jax.Array], np.ndarray]] = []
        self._since = time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array], indices: np.ndarray) -> None:
        self._steps.append((step, metrics, indices))
        if len(self._steps) > _IN_FLIGHT:
            jax.block_until_ready(self._steps[-1 - _IN_FLIGHT][1])

    def flush(self) -> tuple[dict[str, float], float]:
        """Means over the window and steps per second; empties the window.

        Raises:
            NonFiniteLossError: after the step, the loss and the batch's files were written to `nonfinite.json`.
        """
        steps, self._steps = self._steps, []
        values = jax.device_get([metrics for _, metrics, _ in steps])
        since, self._since = self._since, time.perf_counter()
        for (step, _, indices), metrics in zip(steps, values, strict=True):
            if not np.isfinite(metrics["loss"]):
                self._report(step, metrics, indices)
        means = {name: float(np.mean([metrics[name] for metrics in values])) for name in (values[0] if values else ())}
        return means, len(steps) / (self._since - since)

    def _report(self, step: int, metrics: Mapping[str, Any], indices: np.ndarray) -> None:
        path = self._workdir / "nonfinite.json"
        values = {name: str(value) for name, value in metrics.items()}
        # Every process sees the loss of the whole batch, and each has its slice of it.
        indices = to_host(indices)
        if jax.process_index() == 0:
            write_json(path, {"step": step, "metrics": values, "files": self._files(indices)})
        raise NonFiniteLossError(
            f"loss is {metrics['loss']} at step {step}: the batch's files are in {path}; lower optim.learning_rate or "
            "set optim.clip_norm, then run the same command to go on from the last checkpoint"
        )
