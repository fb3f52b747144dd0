"""The yardstick: it runs, says what it measured, and PyTorch's side computes what ours does."""

import csv

import jax
import numpy as np
import pytest

from dmosnet_jax import models
from dmosnet_jax.benchmarks import speed
from dmosnet_jax.export import torch_import

SMALL = ["--models=osnet_x0_25", "--batch=8", "--image_size", "32", "16", "--rounds=1", "--warm=1"]


def test_table_has_a_row_for_each_task(tmp_path, capsys):
    path = tmp_path / "speed.csv"
    with jax.numpy_dtype_promotion("standard"):
        assert speed.main([*SMALL, "--tasks=spcl,infer,onnx,decode", f"--output={path}"]) == 0
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["spcl", "infer", "onnx", "decode"]
    for row in rows:
        assert float(row["images/s"]) > 0
        assert row["ratio"] == ""
    assert "images/s" in capsys.readouterr().out


def test_groups_need_as_many_images(capsys):
    with jax.numpy_dtype_promotion("standard"):
        assert speed.main([*SMALL, "--tasks=spcl_groups"]) == 2
    assert "error: spcl.groups_at_once=1 needs groups, and all 8 images share" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--models=osnet_x9", "--tasks=sleep", "--batch=0"])
def test_unknown_names_are_refused(argument):
    with pytest.raises(SystemExit):
        speed.main([argument])


@pytest.mark.parametrize("name", ["osnet_x0_25", "dmosnet_x0_25", "resnet50"])
def test_both_sides_compute_the_same(rng, name):
    torch = pytest.importorskip("torch")
    from dmosnet_jax.benchmarks import torch_networks

    network = torch_networks.build(name, 5).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if key.endswith("running_mean"):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    # The keys of OpenUnReID's networks.
    moved = {"neck.": "head.feat_bn."}
    state = {}
    for key, value in network.state_dict().items():
        start = next((old for old in moved if key.startswith(old)), "")
        state[moved.get(start, "") + key.removeprefix(start)] = value.numpy()
    size = (64, 64) if name.startswith("dmosnet") else (64, 32)
    model = models.build(name, num_classes=5, image_size=size)
    params, stats = torch_import.convert(state, model)
    images = rng.standard_normal((2, *size, 3)).astype(np.float32)
    with torch.inference_mode():
        feature, logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    ours = jax.jit(lambda p, s, x: model.apply(p, s, x, train=False)[0])(params, stats, images)
    np.testing.assert_allclose(ours["feature"], feature, atol=1e-4 * np.abs(feature).max())
    np.testing.assert_allclose(ours["logits"], logits, atol=1e-4 * np.abs(logits).max())
