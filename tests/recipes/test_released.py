"""The authors' released fine-tuning, from the command line to scores."""

import json

import pytest


@pytest.mark.slow
def test_released_recipe_trains_and_scores(cli, tiny_flags, tmp_path):
    flags = tiny_flags("finetune", **{"model.name": "dmosnet_ibn_x0_25", "image_size": "(64, 32)"})
    flags[0] += ":tiny,recipe=released"
    shorter = ("--config.train.epochs=1", "--config.train.steps_per_epoch=3", "--config.augment.autoaugment=0.5")
    workdir = tmp_path / "run"
    finished = cli.forked(*flags, "--config.sampler.instances=4", *shorter, f"--workdir={workdir}")
    assert finished.status == 0, finished.err
    assert finished.errors == []
    config = json.loads((workdir / "config.json").read_text())
    assert (config["model"]["pool"], config["model"]["classifier"]) == ("gem", "circle")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "loss" in row]
    # 64 times the margins of the circle: far above the logarithm of the number of identities.
    assert all(row["loss_id"] > 5 for row in losses)
    assert all(row["loss"] == pytest.approx(row["loss_id"] + row["loss_triplet"], rel=1e-5) for row in losses)
    assert 0 < json.loads((workdir / "results.json").read_text())["mAP"] <= 1
    # The network tells what it is: nothing but the workdir is needed.
    evaluated = [flag for flag in tiny_flags("evaluate", checkpoint=workdir) if "model.name" not in flag]
    evaluated = [flag for flag in evaluated if "image_size" not in flag]
    finished = cli.forked(*evaluated, f"--workdir={tmp_path / 'scores'}")
    assert finished.status == 0, finished.err
    scores = [json.loads((folder / "results.json").read_text())["mAP"] for folder in (workdir, tmp_path / "scores")]
    assert scores[0] == scores[1]
