"""The quickstart's chain, with as little of each stage as shows that they fit together."""

import importlib.util
import json
import pathlib

import pytest

from tests.recipes import small

CONFIG = pathlib.Path(__file__).resolve().parents[2] / "configs" / "quickstart.py"
FIELDS = {
    "image_size": "(64, 32)",
    "eval.batch_size": 16,
    "model.bn_group_size": 8,
    "data.threads": 1,
    "pretrain.batch_size": 16,
    "pretrain.train.steps_per_epoch": 2,
    "finetune.batch_size": 16,
    "finetune.train.steps_per_epoch": 2,
    "finetune.train.eval_every_epochs": 1,
}


@pytest.mark.slow
def test_whole_chain_runs_and_is_not_done_twice(cli, tmp_path):
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("could not import tensorflow: the conversion needs the convert extra")
    options = f"model={small.NAME},pretrain_epochs=1,finetune_epochs=1"
    flags = [f"--config={CONFIG}:{options}", f"--workdir={tmp_path}"]
    flags += [f"--config.{name}={value}" for name, value in FIELDS.items()]
    first = cli.forked(*flags)
    assert first.status == 0, first.err
    assert first.errors == []
    stages = json.loads((tmp_path / "results.json").read_text())
    assert list(stages) == ["chance", "untrained", "pretrained", "finetuned"]
    assert all(0 < values["mAP"] < 1 for values in stages.values())
    # One image of four cameras in about fifty identities: a ranking by chance finds few.
    assert stages["chance"]["mAP"] < 0.06
    assert "fine-tuned with labels" in first.out
    for name in ("pretrain/report.html", "finetune/report.html", "finetune/metrics.jsonl", "data/synthetic"):
        assert name.split("/")[0] in first.out
        assert (tmp_path / name).exists()

    again = cli.forked(*flags)
    assert again.status == 0, again.err
    assert json.loads((tmp_path / "results.json").read_text()) == stages
    assert "goes on from step 2 of 2" in again.out


@pytest.mark.slow
def test_failing_conversion_is_one_line(cli, tmp_path):
    place = tmp_path / "file"
    place.write_text("not a folder")
    finished = cli.forked(f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", f"--config.data_dir={place}")
    assert finished.status == 1
    assert finished.errors[-1].startswith("error: ")
    assert "Traceback" not in finished.err
