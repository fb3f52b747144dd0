"""Networks against answers of PyTorch that are committed with the script that made them (tests/golden)."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from dmosnet_jax.export import torch_export, torch_import
from dmosnet_jax.models import build

HERE = pathlib.Path(__file__).resolve().parent
GOLDEN = HERE.parent / "golden"


def _load(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(f"golden_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("name", ["osnet_x1_0", "osnet_x0_25", "osnet_ibn_x1_0", "dmosnet_x1_0", "dmosnet_ibn_x1_0"])
def test_features_are_those_of_pytorch(name):
    draw, images = _load(HERE / "drawn.py").draw, _load(GOLDEN / "make_networks.py").images()
    attentive = name.startswith("dm")
    neck, layout = ("bnneck", "fastreid") if attentive else ("fc", "torchreid")
    model = build(name, neck=neck, image_size=images.shape[1:3])
    names = torch_export.to_state_dict(*model.init(jax.random.key(0)), model, layout=layout)
    weights = {key: draw(key, value.shape) for key, value in names.items()}
    params, stats = torch_import.convert(weights, model)
    outputs, _ = jax.jit(lambda p, s, x: model.apply(p, s, x, train=False))(params, stats, images)
    wanted = np.load(GOLDEN / "networks.npz")[name]
    np.testing.assert_allclose(_unit(np.asarray(outputs["feature"])), _unit(wanted), atol=1e-4, rtol=0)
