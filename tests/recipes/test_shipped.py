"""The experiments as users start them: each config file with nothing changed but sizes, and each recipe learns."""

import importlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT

# What may differ from the file: how large, how long, how often, and where things are.
SIZES = {
    "dataset",
    "data_dir",
    "image_size",
    "batch_size",
    "model.name",
    "optim.warmup_steps",
    "train.epochs",
    "train.steps_per_epoch",
    "train.log_every_steps",
    "train.eval_every_epochs",
    "eval.batch_size",
    "data.threads",
}
TRAINING = {
    "image_size": "(64, 32)",
    "train.epochs": 1,
    "train.log_every_steps": 10,
    "eval.batch_size": 48,
    "data.threads": 1,
}
# Runs a recipe without the check that refuses its settings.
UNCHECKED = """
import runpy
from dmosnet_jax.core import config

config._check_groups = lambda *_: None
runpy.run_module("dmosnet_jax.main", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def eight(tmp_path_factory, tiny_writer):
    """Eight people under three cameras, 24 images of each."""
    folder = tmp_path_factory.mktemp("eight")
    tiny_writer(folder, "eight", splits=("train",), cameras=3, images=8)
    return folder


@pytest.fixture(scope="module")
def two_domains(tmp_path_factory, tiny_writer):
    """`there`, to train on with labels, and `here`, other people; each camera casts its colour on all pictures."""
    casts = np.array([[12, -4, -8], [-8, 12, -4], [-4, -8, 12]])

    def picture(rng, pid, camid):
        colours = np.random.default_rng(pid).integers(60, 196, (3, 1, 1, 3)) + casts[camid - 1]
        bands = np.broadcast_to(colours, (3, 16, 24, 3)).reshape(48, 24, 3) + rng.normal(0, 24, (48, 24, 3))
        out = io.BytesIO()
        Image.fromarray(bands.clip(0, 255).astype(np.uint8)).save(out, "jpeg", quality=90)
        return out.getvalue()

    folder, sizes = tmp_path_factory.mktemp("domains"), {"cameras": 3, "images": 8}
    tiny_writer(
        folder, "there", splits=("train",), picture=lambda rng, *who: picture(rng, who[0] + 1000, who[1]), **sizes
    )
    tiny_writer(folder, "here", picture=lambda rng, *who: picture(rng, who[0] + 6000, who[1]), **sizes)
    return folder


def flags(file, **fields):
    assert set(fields) <= SIZES, "more than sizes"
    return [f"--config={ROOT}/configs/{file}", *(f"--config.{name}={value}" for name, value in fields.items())]


def leaves(node, prefix=""):
    found = {}
    for name, value in node.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found


def assert_as_shipped(workdir, file):
    """The config that a run had is the file's, but for sizes."""
    name, _, arg = file.partition(".py:")
    module = importlib.import_module(f"configs.{name.removesuffix('.py')}")
    shipped = leaves(module.get_config(arg or None).to_dict())
    ran = leaves(json.loads((workdir / "config.json").read_text()))
    # The filter is left to the weights, and there are none.
    assert ran.pop("data.interpolation") == (shipped.pop("data.interpolation") or "bicubic")
    assert ran.keys() == shipped.keys()
    assert {name for name in ran if ran[name] != shipped[name]} <= SIZES


def accuracies(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["accuracy"] for row in rows if "accuracy" in row]


RECIPES = {
    "paper": ("finetune.py:eight,model=dmosnet_x0_25", {"batch_size": 32}),
    "released": ("finetune.py:eight,model=dmosnet_ibn_x0_25,recipe=released", {}),
    "released for CUHK03": (
        "finetune.py:cuhk03_detected,model=dmosnet_ibn_x0_25,recipe=released",
        {"dataset": "eight", "batch_size": 32},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_fine_tuning_as_shipped_learns_eight_people(cli, eight, tmp_path, recipe):
    file, sizes = RECIPES[recipe]
    fields = TRAINING | {"data_dir": eight, "train.steps_per_epoch": 60, "optim.warmup_steps": 10} | sizes
    finished = cli.forked(*flags(file, **fields), f"--workdir={tmp_path / 'run'}")
    assert finished.status == 0, finished.err
    assert_as_shipped(tmp_path / "run", file)
    # Chance is an eighth, and the means are over hundreds of images.
    assert np.mean(accuracies(tmp_path / "run")[-2:]) > 0.22


@pytest.mark.slow
def test_groups_of_one_identity_learn_nothing(cli, eight, tmp_path):
    """What the settings refuse: batch statistics of one identity make all equal. The test above would see it."""
    file, _ = RECIPES["released"]
    fields = TRAINING | {"data_dir": eight, "train.steps_per_epoch": 60, "optim.warmup_steps": 10}
    command = [*flags(file, **fields), "--config.model.bn_group_size=16", f"--workdir={tmp_path / 'run'}"]
    refused = cli.forked(*command)
    assert refused.status == 2
    assert "images that share batch statistics would all be of one identity" in refused.errors[-1]
    finished = cli(*command, script=UNCHECKED)
    assert finished.status == 0, finished.err
    assert np.mean(accuracies(tmp_path / "run")[-2:]) < 0.2


SPCL = {
    "Market-1501": ("spcl_market1501.py:model=osnet_x0_25", {}),
    "LUPerson": ("spcl_luperson.py:model=dmosnet_x0_25", {}),
    "Cluster Contrast": ("spcl_market1501.py:model=osnet_x0_25,recipe=cluster_contrast", {"batch_size": 32}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPCL)
def test_pre_training_as_shipped_runs_and_finds_eight_people(cli, eight, tmp_path, name):
    command, sizes = SPCL[name]
    fields = TRAINING | {"dataset": "eight", "data_dir": eight, "train.epochs": 3, "train.steps_per_epoch": 12} | sizes
    finished = cli.forked(*flags(command, **fields), f"--workdir={tmp_path / 'run'}")
    assert finished.status == 0, finished.err
    assert_as_shipped(tmp_path / "run", command)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    clustered = [row for row in rows if "pseudo_nmi" in row]
    assert len(clustered) == 3
    # Eight colours are told apart by any network; how many clusters span several cameras is told.
    assert clustered[0]["pseudo_nmi"] > 0.6
    assert 0 <= clustered[0]["clusters_over_cameras"] <= 1
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)


@pytest.mark.slow
def test_adaptation_as_shipped_learns_the_target(cli, two_domains, tmp_path):
    file = "spcl_uda.py:there+here,model=osnet_x0_25"
    fields = TRAINING | {"data_dir": two_domains, "batch_size": 32}
    scores = {}
    # After one step the network is nearly as it was drawn.
    for steps in (1, 30):
        workdir = tmp_path / str(steps)
        finished = cli.forked(*flags(file, **fields, **{"train.steps_per_epoch": steps}), f"--workdir={workdir}")
        assert finished.status == 0, finished.err
        assert_as_shipped(workdir, file)
        results = json.loads((workdir / "results.json").read_text())
        assert (results["dataset"], results["num_query"]) == ("here", 192)
        scores[steps] = results["mAP"]
    assert scores[30] > scores[1] + 0.1
    # Its checkpoint is an ordinary network, the target's.
    command = [f"--config={ROOT}/configs/evaluate.py:here,checkpoint={workdir}", f"--config.data_dir={two_domains}"]
    finished = cli.forked(*command, "--config.eval.batch_size=48", f"--workdir={tmp_path / 'scores'}")
    assert finished.status == 0, finished.err
    again = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert again["mAP"] == scores[30]
