"""The experiments as users start them: each config file with nothing changed but sizes, and each recipe learns."""

import importlib
import json

import numpy as np
import pytest

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
