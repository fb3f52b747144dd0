"""Training on the images for validation too: one switch, told by every result."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data.splits import load_split
from dmosnet_jax.recipes.datasets import training_images
from tests.recipes import small


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, tiny_writer):
    """`tiny` with 8 images for validation of its training identities, and `renamed`, which does not tell them apart."""
    folder = tmp_path_factory.mktemp("val")
    tiny_writer(folder, "tiny")
    tiny_writer(folder, "extra", splits=("train",), images=1, cameras=1)
    _add_split(folder / "extra" / "1.0.0", folder / "tiny" / "1.0.0", "val")
    tiny_writer(folder, "renamed", splits=("train",))
    _rename_split(folder / "renamed" / "1.0.0", "trainval")
    return folder


def _add_split(source: pathlib.Path, target: pathlib.Path, name: str) -> None:
    info = json.loads((target / "dataset_info.json").read_text())
    added = json.loads((source / "dataset_info.json").read_text())["splits"][0] | {"name": name}
    (target / "dataset_info.json").write_text(json.dumps(info | {"splits": [*info["splits"], added]}))
    for path in source.glob("*.tfrecord-*-of-*"):
        if path.name.count(".") == 1:
            shutil.copy(path, target / path.name.replace("extra-train", f"tiny-{name}"))


def _rename_split(folder: pathlib.Path, name: str) -> None:
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["name"] = name
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for path in folder.glob("*.tfrecord-*"):
        path.rename(folder / path.name.replace("-train.", f"-{name}."))


def config(data_dir, dataset="tiny", *, with_val, subset=None):
    return ConfigDict({"dataset": dataset, "data_dir": str(data_dir), "with_val": with_val, "data": {"subset": subset}})


def test_val_images_join_those_of_train_with_their_identities(data_dir):
    train, val = (load_split(data_dir, "tiny", split) for split in ("train", "val"))
    alone = training_images(config(data_dir, with_val=False))
    both = training_images(config(data_dir, with_val=True))
    assert (len(train), len(val), len(alone), len(both)) == (48, 8, 48, 56)
    np.testing.assert_array_equal(both.pids, np.concatenate([train.pids, val.pids]))
    np.testing.assert_array_equal(both.camids, np.concatenate([train.camids, val.camids]))
    assert both.pids.dtype == np.int32
    assert set(val.pids) <= set(train.pids)
    assert [both.record(row) for row in (0, 47, 48, 55)] == [
        train.record(0),
        train.record(47),
        val.record(0),
        val.record(7),
    ]
    assert both.name == "tiny"


def test_a_copy_that_does_not_tell_is_only_used_whole(data_dir):
    assert len(training_images(config(data_dir, "renamed", with_val=True))) == 48
    with pytest.raises(DataError, match=r"renamed in .* does not tell training from validation .* set with_val=True"):
        training_images(config(data_dir, "renamed", with_val=False))


def test_where_there_is_nothing_to_add_it_is_refused(data_dir):
    with pytest.raises(DataError, match="with_val=True, but extra has no images for validation: leave it False"):
        training_images(config(data_dir, "extra", with_val=True))
    # In a union, one with such images is enough.
    assert len(training_images(config(data_dir, "tiny+extra", with_val=True))) == 56 + 8
    with pytest.raises(ConfigError, match="set with_val=False"):
        training_images(config(data_dir, with_val=True, subset=("cfs", "scores.txt", 0.5)))


@pytest.mark.slow
def test_results_of_training_and_of_its_evaluation_tell(cli, tiny_flags, data_dir, tmp_path):
    short = {
        "model.name": small.NAME,
        "data_dir": data_dir,
        "train.epochs": 1,
        "train.steps_per_epoch": 2,
        "train.eval_every_epochs": 1,
    }
    finished = cli.forked(*tiny_flags("finetune", with_val=True, **short), f"--workdir={tmp_path / 'run'}")
    assert finished.status == 0, finished.err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["with_val"] is True
    assert json.loads((tmp_path / "run" / "config.json").read_text())["with_val"] is True
    flags = tiny_flags("evaluate", data_dir=data_dir, checkpoint=tmp_path / "run", **{"model.name": small.NAME})
    finished = cli.forked(*flags, f"--workdir={tmp_path / 'evaluation'}")
    assert finished.status == 0, finished.err
    assert json.loads((tmp_path / "evaluation" / "results.json").read_text())["with_val"] is True
    # Another set of training images is another run.
    finished = cli.forked(*tiny_flags("finetune", with_val=False, **short), f"--workdir={tmp_path / 'run'}")
    assert finished.status == 1
    assert "with_val=False (was True)" in finished.errors[-1]
