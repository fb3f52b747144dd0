"""The training loop of every recipe, in a fixed order: epoch start, steps, evaluation, checkpoint.

A run can be killed at any step. Everything that decides the future is in the checkpoint: the state with its key, and
the recipe's host values. Batches and random numbers are functions of (seed, epoch, step), so the run goes on as if
nothing had happened.
"""

import dataclasses
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from dmosnet_jax.core.errors import UserError
from dmosnet_jax.core.mesh import to_devices, to_host
from dmosnet_jax.train.checkpoints import Checkpoints
from dmosnet_jax.train.metrics import MetricsWriter, progress_bar, write_json
from dmosnet_jax.train.state import TrainState
from dmosnet_jax.train.steps import Step

# Steps dispatched ahead of the devices: enough to hide the host's work, few enough to stop soon and to bound the
# batches held in memory.
_IN_FLIGHT = 2


class StoppedError(UserError):
    """The run was asked to stop (SIGTERM, SIGINT) and has saved its state; 128 + SIGTERM, as shells report it."""

    exit_status = 143


class NonFiniteLossError(UserError):
    """The loss left the finite numbers; the last checkpoint is from before."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Lengths and intervals, in steps unless the name says epochs."""

    steps_per_epoch: int
    epochs: int
    log_every: int
    checkpoint_every: int
    eval_every_epochs: int

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.epochs


class Stream(Protocol):
    """Host batches of one epoch, as `data.pipeline.TrainStream`."""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...

    def close(self) -> None:
        """Frees threads and processes."""


class Recipe(Protocol):
    """What a recipe brings to the loop."""

    def begin_epoch(self, state: TrainState, epoch: int, offset: int) -> tuple[TrainState, Stream, Mapping[str, float]]:
        """Prepares an epoch, or with `offset` > 0 the rest of one.

        Returns state, batches from `offset` on, and metrics.
        """

    def evaluate(self, state: TrainState, epoch: int) -> Mapping[str, float] | None:
        """Scores a state after `epoch` epochs, or None where there is nothing to score on."""

    def meta(self) -> dict[str, Any]:
        """JSON values that a checkpoint keeps beside the state."""

    def files(self, indices: np.ndarray) -> list[str]:
        """File names of training images, for messages."""


class _StopFlag:
    """Notes SIGTERM and SIGINT; the loop saves and stops at the next step. A second signal acts at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopFlag":
        # Python delivers signals to the main thread only; elsewhere (a notebook's worker) there is nothing to install.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        del frame
        self.signal = signal.Signals(number)
        signal.signal(number, self._previous[number])

    def agree(self) -> bool:
        """Whether to stop, the same on every process: one that stopped alone would leave the others waiting for it."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            number = int(multihost_utils.process_allgather(np.int32(self.signal or 0)).max())
            self.signal = signal.Signals(number) if number else None
        return self.signal is not None

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class _Window:
    """Metrics of the steps since the last look, kept on the devices so that looking does not stall them."""

    def __init__(self, workdir: pathlib.Path, files: Callable[[np.ndarray], list[str]]):
        self._workdir, self._files = workdir, files
        self._steps: list[tuple[int, dict[str, jax.Array], np.ndarray]] = []

    def add(self, step: int, metrics: dict[str, jax.Array], indices: np.ndarray) -> None:
        self._steps.append((step, metrics, indices))
        if len(self._steps) > _IN_FLIGHT:
            jax.block_until_ready(self._steps[-1 - _IN_FLIGHT][1])

    def take(self) -> dict[str, float]:
        """Means over the window, which starts anew.

        Raises:
            NonFiniteLossError: after the step, the loss and the batch's files were written to `nonfinite.json`.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return {}
        values = jax.device_get([metrics for _, metrics, _ in steps])
        for (step, _, indices), metrics in zip(steps, values, strict=True):
            if not np.isfinite(metrics["loss"]):
                self._report(step, metrics, indices)
        return {name: float(np.mean([metrics[name] for metrics in values])) for name in values[0]}

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


class Loop:
    """Runs a recipe from a state to its last step."""

    def __init__(
        self,
        recipe: Recipe,
        step: Step,
        schedule: Schedule,
        *,
        mesh: Mesh,
        workdir: pathlib.Path,
        checkpoints: Checkpoints,
        batch_size: int,
    ):
        self._recipe, self._step, self._schedule = recipe, step, schedule
        self._mesh, self._workdir, self._checkpoints = mesh, workdir, checkpoints
        self._batch_size = batch_size

    def run(self, state: TrainState) -> TrainState:
        """Trains to the end.

        Raises:
            StoppedError: a signal came; the state is saved.
            NonFiniteLossError: see there.
        """
        first = int(state.step)
        writer = MetricsWriter(self._workdir, first_step=first)
        total = self._schedule.total_steps
        bar = progress_bar(total * self._batch_size, label="train", initial=first * self._batch_size)
        try:
            with _StopFlag() as stop:
                for epoch in range(first // self._schedule.steps_per_epoch, self._schedule.epochs):
                    state = self._epoch(state, epoch, writer, bar, stop)
        finally:
            bar.close()
            writer.close()
            self._checkpoints.wait()
        return state

    def _epoch(self, state: TrainState, epoch: int, writer: MetricsWriter, bar: Any, stop: _StopFlag) -> TrainState:
        schedule = self._schedule
        offset = int(state.step) - epoch * schedule.steps_per_epoch
        state, stream, notes = self._recipe.begin_epoch(state, epoch, offset)
        if notes:
            # They belong to the first step to come: a run resumed at this boundary writes them again.
            writer.write(int(state.step) + 1, {"epoch": epoch, **notes})
        window = _Window(self._workdir, self._recipe.files)
        number, since = epoch * schedule.steps_per_epoch + offset, time.perf_counter()
        last_logged = number
        try:
            for batch in stream:
                state, metrics = self._step(state, to_devices(batch, self._mesh))
                number += 1
                window.add(number, metrics, batch["index"])
                bar.update(self._batch_size)
                if number % schedule.log_every == 0:
                    means = window.take()
                    rate = (number - last_logged) * self._batch_size / (time.perf_counter() - since)
                    writer.write(number, {"epoch": epoch, **means, "images_per_second": rate})
                    bar.set_postfix(epoch=epoch + 1, loss=f"{means['loss']:.3f}")
                    last_logged, since = number, time.perf_counter()
                self._save_if_due(state, number, window, stop)
        finally:
            stream.close()
        window.take()
        return self._finish_epoch(state, epoch, writer, stop)

    def _save_if_due(self, state: TrainState, number: int, window: _Window, stop: _StopFlag) -> None:
        # The end of an epoch is saved after its evaluation.
        if number % self._schedule.steps_per_epoch == 0:
            return
        # Asking the other processes waits for the step, as logging does.
        if (jax.process_count() == 1 or number % self._schedule.log_every == 0) and stop.agree():
            window.take()
            self._checkpoints.save(state, self._recipe.meta())
            self._stop(state, stop)
        if number % self._schedule.checkpoint_every == 0:
            window.take()
            self._checkpoints.save(state, self._recipe.meta())

    def _finish_epoch(self, state: TrainState, epoch: int, writer: MetricsWriter, stop: _StopFlag) -> TrainState:
        # A pending stop waits for the evaluation, or this epoch would never get one: killed before it ends, the run
        # goes on from the checkpoint before.
        done = epoch + 1
        last = done == self._schedule.epochs
        scores = None
        if last or done % self._schedule.eval_every_epochs == 0:
            scores = self._recipe.evaluate(state, done)
            if scores is not None:
                writer.write(int(state.step), {"epoch": epoch, **scores})
        self._checkpoints.save(state, self._recipe.meta(), metrics=scores)
        if not last and stop.agree():
            self._stop(state, stop)
        return state

    def _stop(self, state: TrainState, stop: _StopFlag) -> None:
        self._checkpoints.wait()
        assert stop.signal is not None
        raise StoppedError(
            f"stopped by {stop.signal.name} at step {int(state.step)}, which is saved in {self._workdir}: run the same "
            "command to go on"
        )
