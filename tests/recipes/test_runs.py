"""Whole runs of the command line: killed at their worst moments, on other device counts, without the converters."""

import json
import signal
import socket

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from tests.recipes import small

RECIPES = ("finetune", "spcl_market1501", "spcl_uda")
STEPS = 20

# Runs the command line, and sends the process a signal: argv[1] is "step:N:NUMBER" (when step N has been logged) or
# "save:N:NUMBER" (when the save of step N goes on in the background).
INTERRUPTED = """
import os, runpy, sys
from dmosnet_jax.train import checkpoints, metrics

kind, step, number = sys.argv.pop(1).split(":")
owner, name = {"step": (metrics.MetricsWriter, "write"), "save": (checkpoints.Checkpoints, "save")}[kind]
original = getattr(owner, name)

def interrupting(self, first, *rest, **options):
    original(self, first, *rest, **options)
    if int(getattr(first, "step", first)) == int(step):
        os.kill(os.getpid(), int(number))

setattr(owner, name, interrupting)
from tests.recipes import small

small.register()
runpy.run_module("dmosnet_jax.main", run_name="__main__", alter_sys=True)
"""

# Runs the command line where what only conversion needs can't be imported, and prints which images each batch has.
WITHOUT_CONVERTERS = """
import runpy, sys

sys.modules.update(dict.fromkeys(("tensorflow", "torch", "apache_beam", "data_prep")))
from dmosnet_jax.memory import tables
from dmosnet_jax.recipes import training

# Process 0 copies by pieces what would be large in a real run.
tables.PIECE_BYTES = 1024

original = training.train_batches

def printing(*args, **options):
    for batch in original(*args, **options):
        print("batch", batch["index"].tolist())
        yield batch

training.train_batches = printing
from tests.recipes import small

small.register()
runpy.run_module("dmosnet_jax.main", run_name="__main__", alter_sys=True)
"""

# Runs the command line, and tells which of the converters were imported although nobody needs them.
TELLING = """
import atexit, runpy, sys

heavy = ("tensorflow", "torch", "apache_beam", "data_prep")
atexit.register(lambda: print("imported:", [name for name in heavy if name in sys.modules]))
from tests.recipes import small

small.register()
runpy.run_module("dmosnet_jax.main", run_name="__main__", alter_sys=True)
"""


def rows(workdir):
    """Rows of the metrics without what depends on the clock."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timed = ("images_per_second", "seconds_")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in found]


def batches(out):
    """The images of each batch, in order."""
    return [json.loads(line.removeprefix("batch ")) for line in out.splitlines() if line.startswith("batch [")]


def assert_begins_alike(workdir, expected):
    """The first step agrees to rounding, and the first epoch is the same run.

    In every further step rounding may grow, by how much depends on the processor: of those only the length is compared.
    """
    steps, expected_steps = ([row for row in rows(w) if "loss" in row][: STEPS // 2] for w in (workdir, expected))
    assert [row["step"] for row in steps] == list(range(1, STEPS // 2 + 1))
    # A gradient's sums meet many more roundings than the loss: 5e-5 was measured.
    for name, tolerance in (("loss", 1e-5), ("gradient_norm", 1e-3)):
        np.testing.assert_allclose(steps[0][name], expected_steps[0][name], rtol=tolerance, err_msg=name)
    counts = ("clusters", "unclustered", "largest_cluster", "pseudo_nmi", "pseudo_pair_precision")
    found, wanted = ([rows(w)[0].get(name) for name in counts] for w in (workdir, expected))
    assert found == wanted


def arrays(workdir, step):
    folder = workdir / "checkpoints" / str(step)
    with ocp.StandardCheckpointer() as reader:
        trees = {item: reader.restore(folder / item) for item in ("model", "train")}
    trees["memory"] = {path.name: np.frombuffer(path.read_bytes(), np.uint8) for path in folder.glob("memory/*.bin")}
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}


def leftovers(workdir):
    return [p for p in workdir.rglob("*") if "tmp" in p.name or p.name.startswith(".") or p.name.endswith(".part")]


@pytest.fixture(scope="module")
def flags(tiny_flags, uninterrupted):
    """The function `flags(recipe)`: fine-tuning, and SpCL from what that gave."""

    def give(recipe):
        fields = {"model.name": small.NAME, "model.neck": "bnneck"}
        if recipe == "finetune":
            return tiny_flags(recipe, **fields)
        # Some checkpoints are where the class sums are rebuilt, and do without them.
        fields["spcl.refresh_every_steps"] = 4
        return tiny_flags(recipe, pretrained=uninterrupted("finetune")[0], **fields)

    return give


@pytest.fixture(scope="module")
def uninterrupted(request, cli, tmp_path_factory):
    """The function `uninterrupted(recipe)`: workdir and outcome of a whole run on one device."""
    done = {}

    def run(recipe):
        if recipe not in done:
            workdir = tmp_path_factory.mktemp(recipe) / "run"
            command = request.getfixturevalue("flags")(recipe)
            done[recipe] = workdir, cli(*command, f"--workdir={workdir}", script=WITHOUT_CONVERTERS)
        return done[recipe]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_whole_run_leaves_what_it_should(uninterrupted, recipe):
    workdir, finished = uninterrupted(recipe)
    assert finished.status == 0, finished.err
    assert finished.errors == []
    steps = [row["step"] for row in rows(workdir) if "loss" in row]
    assert steps == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows(workdir) if "mAP" in row] == [10, 20]
    scores = {row["mAP"]: row["step"] for row in rows(workdir) if "mAP" in row}
    assert {int(p.name) for p in (workdir / "checkpoints").iterdir()} == {12, 16, 20, scores[max(scores)]}
    assert leftovers(workdir) == []
    results = json.loads((workdir / "results.json").read_text())
    assert results["num_query"] == results["num_valid_query"] == results["num_gallery"] == 48
    assert results["mAP"] == rows(workdir)[-1]["mAP"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_and_stopped_run_ends_as_an_uninterrupted_one(uninterrupted, cli, flags, tmp_path, recipe):
    place = tmp_path / "run"
    command = [*flags(recipe), f"--workdir={place}"]
    # Before there is a checkpoint: it starts anew.
    finished = cli.forked(f"step:3:{signal.SIGKILL.value}", *command, script=INTERRUPTED)
    assert finished.status == -signal.SIGKILL, finished.err
    assert rows(place)[-1]["step"] == 3
    # While a checkpoint is being written in the background.
    finished = cli.forked(f"save:8:{signal.SIGKILL.value}", *command, script=INTERRUPTED)
    assert finished.status == -signal.SIGKILL, finished.err
    half = [p.name for p in (place / "checkpoints").iterdir() if not p.name.isdigit()]
    assert half == ["8.orbax-checkpoint-tmp"]
    # Politely, in the next epoch.
    finished = cli.forked(f"step:13:{signal.SIGTERM.value}", *command, script=INTERRUPTED)
    assert finished.status == 143, finished.err
    assert len(finished.errors) == 1
    assert finished.errors[0].startswith("error: stopped by SIGTERM at step 13")
    assert (place / "checkpoints" / "13").is_dir()
    assert leftovers(place) == []
    tables = {step: {p.name for p in (place / "checkpoints" / step).glob("memory/*.bin")} for step in ("12", "13")}
    if recipe != "finetune":
        assert tables["12"] == {"features.0.bin", "labels.0.bin"}
        assert tables["13"] == {"features.0.bin", "labels.0.bin", "class_sums.0.bin", "class_counts.0.bin"}

    finished = cli.forked(*command, script=TELLING)
    assert finished.status == 0, finished.err
    assert finished.out.endswith("imported: []\n")
    workdir, _ = uninterrupted(recipe)
    assert rows(place) == rows(workdir)
    assert leftovers(place) == []
    expected, found = arrays(workdir, STEPS), arrays(place, STEPS)
    assert expected.keys() == found.keys()
    assert any("memory" in name for name in found) == (recipe != "finetune")
    assert any("source" in name for name in found) == (recipe == "spcl_uda")
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name, strict=True)
    for name in ("results.json", f"checkpoints/{STEPS}/meta/metadata"):
        assert json.loads((place / name).read_text()) == json.loads((workdir / name).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_eight_devices_begin_as_one(uninterrupted, cli, flags, tmp_path, recipe):
    command = [*flags(recipe), "--config.train.epochs=1", f"--workdir={tmp_path}"]
    finished = cli.forked(*command, devices=8, script=WITHOUT_CONVERTERS)
    assert finished.status == 0, finished.err
    assert "devices: 8 cpu" in finished.out
    workdir, one = uninterrupted(recipe)
    assert batches(finished.out) == batches(one.out)[: STEPS // 2]
    assert_begins_alike(tmp_path, workdir)


@pytest.mark.slow
def test_two_processes_begin_as_one(uninterrupted, cli, flags, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host, port = probe.getsockname()
    job = ["--distributed", f"--coordinator={host}:{port}", "--num_processes=2"]
    # One epoch: two processes share what one has otherwise.
    command = [*flags("spcl_market1501"), "--config.train.epochs=1", f"--workdir={tmp_path}", *job]
    started = [cli.start(*command, f"--process_id={number}", script=WITHOUT_CONVERTERS) for number in range(2)]
    try:
        printed = [process.communicate(timeout=1800) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], printed
    assert "devices: 2 cpu" in printed[0][0]
    assert "epoch" not in printed[1][0], "process 0 speaks for all"
    workdir, one = uninterrupted("spcl_market1501")
    # Each process has half of every batch.
    halves = zip(*(batches(out) for out, _ in printed), strict=True)
    assert [first + second for first, second in halves] == batches(one.out)[: STEPS // 2]
    assert_begins_alike(tmp_path, workdir)


@pytest.mark.slow
@pytest.mark.parametrize("script", [WITHOUT_CONVERTERS, TELLING], ids=["without converters", "importing none"])
def test_a_trained_network_is_evaluated_and_extracts_by_its_workdir_alone(
    uninterrupted, cli, tiny_flags, tmp_path, script
):
    workdir, _ = uninterrupted("finetune")
    flags = [flag for flag in tiny_flags("evaluate", checkpoint=workdir) if "model.name" not in flag]
    finished = cli(*flags, f"--workdir={tmp_path / 'scores'}", script=script)
    assert finished.status == 0, finished.err
    assert finished.errors == []
    assert "imported: []" in finished.out or script != TELLING
    expected, found = (json.loads((folder / "results.json").read_text()) for folder in (workdir, tmp_path / "scores"))
    shared = expected.keys() & found.keys()
    assert {"mAP", "rank1", "rank5", "rank10", "mINP", "num_query", "num_valid_query", "num_gallery"} <= shared
    assert all(found[name] == expected[name] for name in shared)

    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for name, colour in (("b.png", (200, 10, 10)), ("deep/a.jpg", (10, 200, 10)), ("deep/c.jpg", (10, 10, 200))):
        Image.new("RGB", (20, 50), colour).save(tmp_path / "photos" / name)
    output = tmp_path / "new" / "features.npz"
    fields = {"images": tmp_path / "photos", "checkpoint": workdir, "output": output}
    flags = [flag for flag in tiny_flags("extract", **fields) if "model.name" not in flag]
    finished = cli(*flags, script=script)
    assert finished.status == 0, finished.err
    assert finished.errors == []
    assert "3 features of 64 values" in finished.out
    assert "imported: []" in finished.out or script != TELLING
    with np.load(output, allow_pickle=False) as arrays:
        assert arrays["files"].tolist() == ["b.png", "deep/a.jpg", "deep/c.jpg"]
        assert (arrays["features"].shape, arrays["features"].dtype) == ((3, 64), np.float32)
        assert np.isfinite(arrays["features"]).all()
        assert len(np.unique(arrays["features"].round(4), axis=0)) == 3
    assert [p.name for p in output.parent.iterdir()] == ["features.npz"]
