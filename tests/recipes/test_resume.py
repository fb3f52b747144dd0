"""What a run that goes on needs, and what may have changed since it began."""

import json

import pytest


@pytest.mark.slow
def test_a_run_goes_on_without_its_first_weights_and_says_what_has_changed(cli, tiny_flags, tmp_path):
    fields = {"train.epochs": 1, "train.steps_per_epoch": 2, "model.bn_group_size": 0}
    first = cli.forked(*tiny_flags("finetune", **fields), f"--workdir={tmp_path / 'first'}")
    assert first.status == 0, first.err
    weights = tmp_path / "first.pth"
    export = ("--config.checkpoint", tmp_path / "first", "--config.output", weights)
    config = next(flag for flag in tiny_flags("finetune") if flag.startswith("--config="))
    exported = cli.forked(config.replace("finetune", "export"), *map(str, export))
    assert exported.status == 0, exported.err

    run = f"--workdir={tmp_path / 'run'}"
    # The network is the weights', and the run keeps it when they are gone.
    flags = [flag for flag in tiny_flags("finetune", pretrained=weights, **fields) if "model.name" not in flag]
    begun = cli.forked(*flags, run)
    assert begun.status == 0, begun.err
    weights.unlink()
    changes = ("--config.train.epochs=2", "--config.augment.flip=0.0", "--config.data.threads=2")
    finished = cli.forked(*flags, *changes, run)
    assert finished.status == 0, finished.err
    assert "goes on with augment.flip=0.0 (was 0.5), train.epochs=2 (was 1)" in finished.out
    assert "goes on from step 2 of 4" in finished.out
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 4

    for change, message in (
        ("seed=5", "seed=5 (was 0)"),
        ("data.interpolation=bilinear", "data.interpolation='bilinear' (was 'bicubic')"),
        ("model.neck=fc", "model.neck='fc' (was 'bnneck')"),
        ("model.bn_group_size=8", "model.bn_group_size=8 (was None)"),
    ):
        refused = cli.forked(*flags, f"--config.{change}", run)
        assert refused.status == 1, refused.err
        assert message in refused.errors[-1]
        assert refused.errors[-1].endswith("give another --workdir or the earlier settings")
    # Without the weights there is nothing to begin with.
    begun = cli.forked(*flags, f"--workdir={tmp_path / 'other'}")
    assert begun.status == 1
    assert "first.pth" in begun.errors[-1]
