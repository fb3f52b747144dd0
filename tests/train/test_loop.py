"""The loop with a recipe of one number, so that every order of events can be tried."""

import contextlib
import json
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.train import loop as loops
from dmosnet_jax.train import state as train_state
from dmosnet_jax.train.checkpoints import Checkpoints
from dmosnet_jax.train.metrics import read_rows

ROWS = 8


class Stream:
    def __init__(self, batches):
        self._batches, self.closed = batches, False

    def __iter__(self):
        return iter(self._batches)

    def close(self):
        self.closed = True


class Recipe:
    """Adds numbers; `events` is what the loop asked for."""

    def __init__(self, *, steps_per_epoch=4, poison=None, scores=True, actions=None):
        self.steps_per_epoch, self.poison, self.scores = steps_per_epoch, poison, scores
        self.events, self.streams, self.actions = [], [], actions or {}

    def act(self, event):
        self.events.append(event)
        self.actions.get(event, lambda: None)()

    def begin_epoch(self, run, epoch, offset):
        self.act(f"epoch {epoch} from {offset}")
        batches = []
        for step in range(epoch * self.steps_per_epoch + offset, (epoch + 1) * self.steps_per_epoch):
            value = np.nan if step + 1 == self.poison else 1.0 + step
            index = (np.arange(ROWS, dtype=np.int32) + step) % 50
            batches.append({"value": np.full(ROWS, value, np.float32), "index": index})
        self.streams.append(Stream(batches))
        run = run.replace(state=run.state, epoch=epoch)
        return run, self.streams[-1], {"clusters": 10 + epoch} if offset == 0 else {}

    def evaluate(self, run, epoch):
        self.act(f"evaluate {epoch}")
        return {"mAP": float(run.state.params["sum"]) / 1e4} if self.scores else None

    def files(self, indices):
        return [f"{index}.jpg" for index in indices]


def add(state, batch):
    """A step whose state is the sum of all batches, in an order that matters."""
    value = batch["value"].mean()
    params = {"sum": state.params["sum"] * jnp.float32(1.01) + value}
    return state.replace(step=state.step + 1, params=params), {"loss": value * jnp.float32(0.5)}


def run(workdir, recipe, *, epochs=3, log_every=1, checkpoint_every=3, eval_every=1, on_step=None, **more):
    mesh = make_mesh()
    workdir.mkdir(exist_ok=True)
    state = train_state.create({"sum": np.float32(0)}, {}, optax.identity(), seed=0, mesh=mesh)
    store = Checkpoints(workdir)
    if store.latest() is not None:
        state = store.restore(state, store.latest(), mesh)
    compiled = jax.jit(add)

    def step(state, batch):
        if on_step is not None:
            on_step(int(state.step) + 1)
        return compiled(state, batch)

    lengths = loops.Lengths(recipe.steps_per_epoch, epochs, log_every, checkpoint_every, eval_every, **more)
    bound = loops.Recipe(step, recipe.begin_epoch, recipe.evaluate, recipe.files)
    begun = train_state.RunState(state, {"loop": {}})
    first = int(state.step)
    try:
        run = loops.train(begun, bound, lengths, store, mesh=mesh, workdir=workdir, batch_size=ROWS)
    finally:
        store.close()
    if first < int(run.state.step):
        assert run.meta["loop"] == {"epoch": epochs - 1}
    return run.state


def test_checkpoints_by_the_clock_are_at_the_steps_that_may_be(tmp_path):
    options = {"checkpoint_every": None, "checkpoint_multiple": 3, "epochs": 2}
    run(tmp_path / "often", Recipe(steps_per_epoch=10, scores=False), checkpoint_minutes=1e-9, **options)
    # The latest three are kept.
    assert saved(tmp_path / "often") == [15, 18, 20]
    run(tmp_path / "seldom", Recipe(steps_per_epoch=10, scores=False), checkpoint_minutes=60.0, **options)
    assert saved(tmp_path / "seldom") == [10, 20]
    run(
        tmp_path / "both",
        Recipe(steps_per_epoch=10, scores=False),
        checkpoint_minutes=60.0,
        **options | {"checkpoint_every": 7},
    )
    assert saved(tmp_path / "both") == [10, 14, 20]


def metrics(workdir):
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_rows(workdir / "metrics.jsonl")]


def saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def send(number):
    return lambda: os.kill(os.getpid(), number)


def test_order_of_events_and_rows(tmp_path):
    recipe = Recipe()
    state = run(tmp_path, recipe, epochs=2)
    assert int(state.step) == 8
    assert recipe.events == ["epoch 0 from 0", "evaluate 1", "epoch 1 from 0", "evaluate 2"]
    assert all(stream.closed for stream in recipe.streams)
    found = metrics(tmp_path)
    assert [row["step"] for row in found] == [1, 1, 2, 3, 4, 4, 5, 5, 6, 7, 8, 8]
    assert found[0] == {"step": 1, "epoch": 0, "clusters": 10}
    assert found[1] == {"step": 1, "epoch": 0, "loss": 0.5}
    assert found[5]["mAP"] == found[-1]["mAP"] / float(state.params["sum"]) * sum_after(4)
    assert saved(tmp_path) == [4, 6, 8]


def test_the_bar_says_what_comes_next(tmp_path, monkeypatch):
    drawn, pauses = [], []

    class Bar(contextlib.nullcontext):
        n = 0

        def set_postfix_str(self, text, refresh):
            drawn.append(text)

        def update(self, images):
            self.n += images

        def skip_pause(self):
            pauses.append(self.n)

        def __enter__(self):
            return self

    monkeypatch.setattr(loops, "progress_bar", lambda *unused, **options: Bar())
    run(tmp_path, Recipe(), epochs=3, log_every=4, eval_every=2)
    assert [text.partition("then ")[2] for text in drawn] == ["epoch 2", "evaluation and epoch 3", "evaluation"]
    assert drawn[0].startswith("epoch 1 of 3, loss ")
    # Before each epoch's first step, and after the one that compiles.
    assert pauses == [0, 0, 4 * ROWS, 8 * ROWS]


def test_what_comes_next_is_the_recipes():
    def after(epochs, **options):
        lengths = loops.Lengths(4, 3, 1, None, 2)
        return loops.Recipe(add, lambda *unused: None, lambda *unused: None, list, **options).after(epochs, lengths)

    assert [after(done, begins_with="clustering", scored=False) for done in (1, 2, 3)] == ["clustering"] * 2 + [
        "the end"
    ]
    assert after(2, begins_with="clustering") == "evaluation and clustering"


def sum_after(steps):
    total = np.float32(0)
    for step in range(steps):
        total = total * np.float32(1.01) + np.float32(1.0 + step)
    return float(total)


def test_rows_are_means_since_the_last(tmp_path):
    run(tmp_path, Recipe(steps_per_epoch=6, scores=False), epochs=1, log_every=3, checkpoint_every=100)
    assert [(row["step"], row["loss"]) for row in metrics(tmp_path) if "loss" in row] == [(3, 1.0), (6, 2.5)]


@pytest.mark.parametrize(
    ("every", "events"), [(2, ["evaluate 2", "evaluate 3"]), (3, ["evaluate 3"]), (7, ["evaluate 3"])]
)
def test_the_last_epoch_is_always_evaluated(tmp_path, every, events):
    recipe = Recipe()
    run(tmp_path, recipe, eval_every=every)
    assert [event for event in recipe.events if "evaluate" in event] == events


def test_without_scores_nothing_is_best(tmp_path):
    run(tmp_path, Recipe(scores=False))
    assert not any("mAP" in row for row in metrics(tmp_path))
    assert saved(tmp_path) == [8, 9, 12]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Workdir and last state of a run that nothing happens to."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(workdir, Recipe())


# The first step, between and at checkpoints, the ends of epochs, and the last step.
@pytest.mark.parametrize("stop_at", [1, 3, 4, 5, 8, 11, 12])
def test_a_run_stopped_at_any_step_goes_on_as_if_it_had_not(tmp_path, whole, stop_at):
    number = signal.SIGINT if stop_at == 5 else signal.SIGTERM
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def on_step(step):
        if step == stop_at:
            send(number)()

    if stop_at < 12:
        with pytest.raises(loops.StoppedError, match=f"stopped by {number.name} at step {stop_at}, which is saved"):
            run(tmp_path / "run", Recipe(), on_step=on_step)
        assert max(saved(tmp_path / "run")) == stop_at
    else:
        # The signal came with the last step: there is nothing left to stop.
        run(tmp_path / "run", Recipe(), on_step=on_step)
        assert max(saved(tmp_path / "run")) == 12
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    found = run(tmp_path / "run", Recipe())
    np.testing.assert_array_equal(found.params["sum"], whole[1].params["sum"])
    assert metrics(tmp_path / "run") == metrics(whole[0])


def test_a_stop_during_the_evaluation_keeps_its_score(tmp_path):
    with pytest.raises(loops.StoppedError, match="at step 4"):
        run(tmp_path, Recipe(actions={"evaluate 1": send(signal.SIGTERM)}))
    assert json.loads((tmp_path / "checkpoints" / "4" / "metrics" / "metrics").read_text())["mAP"] > 0
    recipe = Recipe()
    run(tmp_path, recipe)
    assert recipe.events[0] == "epoch 1 from 0"
    assert [row["step"] for row in metrics(tmp_path) if "mAP" in row] == [4, 8, 12]


def test_a_second_signal_acts_at_once(tmp_path):
    def twice():
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Recipe(actions={"epoch 1 from 0": twice}))
    assert max(saved(tmp_path)) == 4


def test_rows_after_the_checkpoint_are_written_again(tmp_path, whole):
    # Steps 5 and 6 are logged, the checkpoint is at 4.
    def on_step(step):
        if step == 7:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "run", Recipe(), checkpoint_every=100, on_step=on_step)
    assert metrics(tmp_path / "run")[-1]["step"] == 6
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    run(tmp_path / "run", Recipe(), checkpoint_every=100)
    assert metrics(tmp_path / "run") == metrics(whole[0])


def test_a_finished_run_does_nothing_more(tmp_path):
    run(tmp_path, Recipe())
    before = (tmp_path / "metrics.jsonl").read_bytes()
    recipe = Recipe()
    assert int(run(tmp_path, recipe).step) == 12
    assert recipe.events == []
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("poison", "log_every", "last"), [(6, 1, 4), (7, 4, 6), (8, 100, 6), (3, 100, None)])
def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path, poison, log_every, last):
    recipe = Recipe(poison=poison)
    with pytest.raises(
        loops.NonFiniteLossError, match=f"loss is nan at step {poison}: the batch's files are in"
    ) as info:
        run(tmp_path, recipe, log_every=log_every)
    assert "\n" not in str(info.value)
    assert info.value.exit_status == 1
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["step"] == poison
    assert math.isnan(float(report["metrics"]["loss"]))
    assert report["files"] == [f"{(row + poison - 1) % 50}.jpg" for row in range(ROWS)]
    assert all(stream.closed for stream in recipe.streams)
    assert (max(saved(tmp_path)) if last else (saved(tmp_path) or None)) == last
    # The cause removed, it goes on from there.
    state = run(tmp_path, Recipe())
    np.testing.assert_allclose(state.params["sum"], sum_after(12), rtol=1e-6)
