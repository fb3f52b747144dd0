"""A table in one command: what is declared, what is run, what goes on after a stop, and what is written."""

import csv
import importlib
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dmosnet_jax import models
from dmosnet_jax.core.config import validate
from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.tools import reproduce, runs
from dmosnet_jax.tools.experiments import TABLES, Row, Table
from tests.conftest import ROOT, _environment

# Commands of a run, in a process that knows the network `small`.
MAIN = (
    "import runpy; from tests.recipes import small; small.register(); "
    "runpy.run_module('dmosnet_jax.main', run_name='__main__', alter_sys=True)"
)
# The command itself, with a table of the tests.
COMMAND = """
import sys
from tests.tools import test_reproduce
from dmosnet_jax.tools import reproduce, runs

runs.MAIN = test_reproduce.small_main()
reproduce.TABLES["tiny"] = test_reproduce.TINY
sys.exit(reproduce.main(sys.argv[1:]))
"""
# Nothing is written there.
NOWHERE = ROOT / "nowhere"
SIZES = {
    "image_size": (64, 32),
    "batch_size": 16,
    "model.bn_group_size": 8,
    "train.steps_per_epoch": 3,
    "train.log_every_steps": 1,
    "data.threads": 1,
}
TINY = Table(
    "Tiny",
    (
        Row(
            "scratch",
            "from scratch",
            "finetune.py:tiny,model=small,epochs=1",
            SIZES,
            seeds=(0, 1),
            trains_on=("tiny",),
            scored_on="tiny",
            figures=(50.0, None),
            whose="nobody",
        ),
        Row(
            "spcl",
            "without labels",
            "spcl_market1501.py:model=small,epochs=1",
            SIZES | {"dataset": "tiny", "model.neck": "bnneck", "spcl.k1": 8, "spcl.k2": 3},
            trains_on=("tiny",),
            scored_on="",
        ),
        Row(
            "tuned",
            "from that",
            "finetune.py:tiny,model=small,epochs=1",
            SIZES,
            start_row="spcl",
            trains_on=("tiny",),
            scored_on="tiny",
        ),
        Row("zoo", "as it is", start="zoo.pth", trains_on=(), scored_on="tiny"),
    ),
    official={"tiny": (48, 49)},
)


def small_main():
    """In place of `runs.MAIN`."""
    return (sys.executable, "-c", MAIN)


def places(tmp_path, weights=None):
    return runs.Places(tmp_path / "table", "data", weights)


@pytest.mark.parametrize("name", TABLES)
def test_every_declared_run_has_a_config_that_is_valid(name, tmp_path):
    table = TABLES[name]
    found = runs.runs_of(table, places(tmp_path, tmp_path), ())
    assert len(found) == sum(len(row.seeds) for row in table.rows)
    assert len({run.name for run in found}) == len(found)
    for run in found:
        assert run.row.scored_on in ("", *table.official)
        if not run.row.config:
            assert run.train_command() == []
            continue
        file, _, arg = run.row.config.partition(".py:")
        config = importlib.import_module(f"configs.{file}").get_config(arg)
        config.update_from_flattened_dict({"seed": run.seed, **run.row.overrides})
        validate(config)
        models.build(
            config.model.name,
            image_size=config.image_size,
            **{k: config.model[k] for k in ("neck", "attention", "pool") if config.model[k] is not None},
        )
        # What a run starts from was made by an earlier one.
        assert run.start is None or found.index(run.start) < found.index(run)


def test_tables_are_the_papers():
    small = {run.name: run for run in runs.runs_of(TABLES["paper_small"], places(NOWHERE), ())}
    assert set(small) == {
        f"{network}_{stage}/{seed}"
        for network in ("osnet", "dmosnet")
        for stage in ("scratch", "spcl", "pretrained")
        for seed in (0, 1)
    }
    command = " ".join(small["dmosnet_pretrained/1"].train_command())
    for part in (
        "--config=configs/finetune.py:market1501,model=dmosnet_x0_25,epochs=60",
        "--config.seed=1",
        "dmosnet_spcl/seed1/train",
        "--config.image_size=(128, 64)",
        "--config.optim.decay_epochs=(25, 50)",
        "--config.optim.warmup_steps=1000",
    ):
        assert part in command
    paper = {row.name: row for row in TABLES["paper"].rows}
    assert {name: row.figures for name, row in paper.items()} == {
        "attention_000": (84.9, 94.8),
        "attention_100": (86.76, 95.26),
        "attention_111": (84.93, 93.88),
    }
    assert all(row.seeds == (0, 1, 2) for row in paper.values())


def test_overrides_are_for_all_rows_or_one():
    given = runs.parse_overrides(["train.epochs=2", "spcl:spcl.k1=5", "spcl:train.epochs=3", "eval.flip=True"], TINY)
    found = {run.name: run for run in runs.runs_of(TINY, places(NOWHERE), given)}
    assert found["tuned/0"].overrides == {"train.epochs": "2", "eval.flip": "True"}
    assert found["spcl/0"].overrides == {"train.epochs": "3", "spcl.k1": "5", "eval.flip": "True"}
    assert "--config.spcl.k1=5" in found["spcl/0"].train_command()
    # The evaluation has its own fields, and no others.
    assert found["tuned/0"].score_command()[-1] == "--config.eval.flip=True"
    assert not [flag for flag in found["tuned/0"].score_command() if "epochs" in flag]
    assert found["tuned/0"].settings["start"]["overrides"]["train.epochs"] == "3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--override=train.epochs"], "--override=train.epochs: give FIELD=VALUE or ROW:FIELD=VALUE"),
        (["--override=nobody:seed=1"], "there is no row 'nobody': use one of scratch, spcl, tuned, zoo"),
        (["--override=seed=1"], "seed is the table's own"),
        (["--only=nobody"], "--only=nobody: there is no such row: use one of scratch, spcl, tuned, zoo, or ROW/SEED"),
        (["--weights=nowhere"], "--weights=nowhere: no such folder"),
        (["--workdir=gs://bucket/x"], "runs are in local folders"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(reproduce.TABLES, "tiny", TINY)
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["tiny", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_some_rows_bring_those_that_they_start_from():
    found = runs.runs_of(TINY, places(NOWHERE), ())
    assert [run.name for run in runs.chosen(found, ["tuned"])] == ["spcl/0", "tuned/0"]
    assert [run.name for run in runs.chosen(found, ["scratch/1", "zoo"])] == ["zoo/0", "scratch/1"]
    assert [run.name for run in found] == ["scratch/0", "spcl/0", "tuned/0", "zoo/0", "scratch/1"]
    with pytest.raises(ConfigError):
        runs.chosen(found, ["scratch/2"])


@pytest.fixture(scope="module")
def blurred(tmp_path_factory, tiny_writer):
    """The tiny data set under so much noise that no score is perfect."""

    def picture(rng, pid, camid):
        colour = np.random.default_rng(pid).integers(64, 192, 3)
        noisy = colour + 8 * camid + rng.normal(0, 96, (48, 24, 3)) + rng.normal(0, 40, 3)
        out = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "jpeg", quality=90)
        return out.getvalue()

    folder = tmp_path_factory.mktemp("blurred")
    tiny_writer(folder, "tiny", picture=picture)
    return folder


@pytest.fixture
def command(tmp_path, blurred):
    """Starts the command on the table of the tests."""

    def start(*arguments, **options):
        flags = [f"--workdir={tmp_path / 'table'}", f"--data_dir={blurred}", "--override=eval.report=False"]
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, "tiny", *flags, *arguments],
            cwd=tmp_path,
            env=_environment(1) | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(*arguments):
        process = start(*arguments)
        out, err = process.communicate(timeout=1200)
        return process.returncode, out, err.splitlines()

    run.start = start
    run.table = tmp_path / "table"
    return run


def note(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.mark.slow
def test_a_table(command):
    """A row that fails, the others beside it; the plan; what is done is not done again."""
    status, out, err = command("--dry_run")
    assert (status, err) == (0, [])
    lines = out.splitlines()
    assert [line.split()[0:2] for line in lines if not line.startswith(" ")] == [
        [f"{name}:", "missing"] for name in ("scratch/0", "spcl/0", "tuned/0", "zoo/0", "scratch/1")
    ]
    assert sum("--config=configs/finetune.py" in line for line in lines) == 3
    assert not command.table.exists()

    # SpCL's row has a field that is not there, so what starts from it is left out; the zoo's weights are not given.
    status, out, err = command("--override=spcl:spcl.nonsense=1")
    assert status == 1
    assert len(err) == 4, err
    assert err[0].startswith("error: [2/5] spcl/0: exit status 2: --config.spcl.nonsense")
    assert "train.log" in err[0]
    assert err[1] == "error: [3/5] tuned/0: left out, since spcl/0, which it starts from, failed"
    assert err[2] == "error: [4/5] zoo/0: needs zoo.pth: give its folder as --weights=DIR"
    assert err[3] == "error: 3 of 5 runs failed: spcl/0, tuned/0, zoo/0"
    scores = [
        json.loads((command.table / "scratch" / f"seed{seed}" / "score" / "results.json").read_text())
        for seed in (0, 1)
    ]
    assert scores[0]["mAP"] != scores[1]["mAP"]
    with (command.table / "table.csv").open(newline="") as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["scratch", "spcl", "tuned", "zoo"]
    found = rows["scratch"]
    percent = [100 * score["mAP"] for score in scores]
    assert float(found["mAP"]) == pytest.approx(statistics.mean(percent))
    assert float(found["mAP_sd"]) == pytest.approx(abs(percent[0] - percent[1]) / 2**0.5)
    assert (found["runs"], found["runs_wanted"], found["published_mAP"], found["published_rank1"]) == (
        "2",
        "2",
        "50.0",
        "",
    )
    assert 0 < float(found["hours"]) < 1
    assert found["device"].startswith("CPU (")
    assert found["commit"]
    assert (rows["tuned"]["runs"], rows["tuned"]["mAP"]) == ("0", "")
    text = (command.table / "table.md").read_text()
    assert f"| from scratch | 2 of 2 | {statistics.mean(percent):.2f} ± {statistics.stdev(percent):.2f} |" in text
    assert "50.00 / - (nobody)" in text
    assert "scratch: 48 queries and 48 gallery images of tiny instead of the official 48 and 49" in text
    assert f"| scratch/1 | {percent[1]:.2f} |" in text
    assert text in out

    # Again: what is done stays; the folder that the failed run left is of other settings.
    before = (command.table / "scratch" / "seed0" / "train.log").read_bytes()
    status, out, err = command("--only=scratch", "--only=spcl")
    assert status == 1
    assert "spcl/0: " in err[0]
    assert "is a run of other settings (spcl.nonsense was 1, now not set)" in err[0]
    assert (command.table / "scratch" / "seed0" / "train.log").read_bytes() == before
    # Another way to score is only scored again.
    status, out, err = command("--only=scratch/0", "--override=eval.flip=True")
    assert (status, err) == (0, [])
    assert (command.table / "scratch" / "seed0" / "train.log").read_bytes() == before
    results = json.loads((command.table / "scratch" / "seed0" / "score" / "results.json").read_text())
    assert results["test_time"] == {"flip": True}
    assert "scratch: with eval.flip=True" in (command.table / "table.md").read_text()


@pytest.mark.slow
def test_a_stopped_table_goes_on(command):
    process = command.start("--only=tuned", "--override=spcl:train.epochs=12")
    metrics = command.table / "spcl" / "seed0" / "train" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 4):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    assert err == "error: [1/2] spcl/0: stopped by SIGTERM; the same command goes on\n"
    assert "tuned" not in out
    first = note(command.table / "spcl" / "seed0")
    assert (first["trained"], first["seconds"] > 0) == (False, True)
    log = (command.table / "spcl" / "seed0" / "train.log").read_text()
    assert "stopped by SIGTERM at step" in log
    status, out, err = command("--dry_run", "--only=tuned", "--override=spcl:train.epochs=12")
    assert out.startswith("spcl/0: interrupted  (without labels)")

    # Other lengths make another run.
    status, _, err = command("--only=tuned")
    assert (status, len(err)) == (1, 3)
    assert "train.epochs was 12, now not set" in err[0]

    status, out, err = command("--only=tuned", "--override=spcl:train.epochs=12")
    assert (status, err) == (0, []), err
    log = (command.table / "spcl" / "seed0" / "train.log").read_text()
    assert "goes on from step" in log
    steps = [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if "loss" in row]
    assert steps == list(range(1, 37))
    second = note(command.table / "spcl" / "seed0")
    assert second["trained"]
    assert second["seconds"] > first["seconds"]
    assert note(command.table / "tuned" / "seed0")["scored"] == {}
    assert "starts from" in (command.table / "tuned" / "seed0" / "train.log").read_text()


def test_a_workdir_that_cannot_be_made_is_one_line(tmp_path, tiny_data, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setitem(reproduce.TABLES, "tiny", TINY)
    monkeypatch.setattr(reproduce, "_device", lambda: "none")
    status = reproduce.main(["tiny", f"--workdir={tmp_path / 'file'}", f"--data_dir={tiny_data}", "--only=scratch/0"])
    err = capsys.readouterr().err.splitlines()
    assert (status, len(err)) == (1, 1)
    assert str(tmp_path / "file") in err[0]


def test_a_damaged_note_is_told(tmp_path):
    run = runs.runs_of(TINY, places(tmp_path), ())[0]
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text("{")
    with pytest.raises(Exception, match=r"run\.json: is damaged .*: remove"):
        run.note()


def test_the_version_is_the_commit_or_the_packages(monkeypatch):
    version = reproduce._version()
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert head.stdout.startswith(version.rstrip("+"))
    monkeypatch.setenv("PATH", os.devnull)
    assert reproduce._version().startswith("version ")
