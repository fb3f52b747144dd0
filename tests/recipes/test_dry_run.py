"""A dry run says what a run needs, and leaves nothing."""

import re

import pytest

from tests.recipes import small


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["finetune", "spcl_market1501", "spcl_uda"])
def test_a_dry_run_says_what_a_run_needs_and_leaves_nothing(cli, tiny_flags, tmp_path, recipe):
    flags = tiny_flags(recipe, **{"model.name": small.NAME, "model.neck": "bnneck"})
    finished = cli.forked(*flags, "--dry_run", f"--workdir={tmp_path / 'runs' / 'dry'}", devices=2)
    assert finished.status == 0, finished.err
    assert finished.errors == []
    assert not list(tmp_path.iterdir())
    out = finished.out
    batch = 32 if recipe == "spcl_uda" else 16
    images = 102 if recipe == "spcl_uda" else 48
    assert "checkpoint_every_steps: 4" in out
    assert "devices: 2 (cpu) of 1 processes\n" in out
    assert re.search(
        rf"network: small, [\d,]+ parameters; images uint8 \[{batch}, 64, 32, 3\], {batch // 2} on each", out
    )
    assert f"; {images} images\n" in out
    state, tables, scratch, total = map(
        float, re.search(r"state (\S+) GiB \(memory tables (\S+)\), a step's scratch (\S+): (\S+) GiB", out).groups()
    )
    assert total == pytest.approx(state + scratch, abs=0.011)
    assert tables <= state
    assert re.search(r"disk: a checkpoint of 0\.00 GiB, at most 5 at once: .* where [\d.]+ GiB are free", out)
    assert re.search(
        r"time: 2 epochs of 10 steps, 20 in all; [\d.]+ ms a step on the devices, [\d.]+ ms for the host", out
    )
    assert ("extraction of all features; clustering is not counted" in out) == (recipe != "finetune")


@pytest.mark.slow
def test_a_dry_run_of_images_on_the_devices(cli, tiny_flags, tmp_path):
    flags = tiny_flags("finetune", **{"model.name": small.NAME, "model.neck": "bnneck", "data.placement": "device"})
    finished = cli.forked(*flags, "--dry_run", f"--workdir={tmp_path / 'dry'}")
    assert finished.status == 0, finished.err
    assert "images on the devices, beside that: 0.00 GiB in all" in finished.out
    assert not list(tmp_path.iterdir())


def test_other_recipes_have_no_dry_run(cli, tiny_flags, tmp_path):
    finished = cli.forked(*tiny_flags("evaluate", checkpoint="x"), "--dry_run", f"--workdir={tmp_path}")
    assert finished.status == 2
    assert finished.errors == ["error: --dry_run describes a training run (spcl, spcl_uda, supervised), not evaluate"]
