"""The export command: files and folders that evaluate, extract and PyTorch's readers open, and clear refusals."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

import dmosnet_jax
from dmosnet_jax import models
from dmosnet_jax.export import torch_export, torch_import
from tests.models.drawn import draw_tree

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = f"--config={ROOT}/configs/export.py"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights in fast-reid's layout with a classifier of three identities."""
    model = models.build("dmosnet_x0_25", num_classes=3)
    rng = np.random.default_rng(5)
    params, stats = (draw_tree(tree, rng) for tree in model.shapes())
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch_export.save(path, torch_export.to_state_dict(params, stats, model, layout="fastreid", batches=7))
    return path


def test_to_every_form_and_back(cli, weights, tmp_path):
    original = torch_import.load(weights)
    for target, source in (("a", weights), ("b.safetensors", tmp_path / "a"), ("c.pth", tmp_path / "b.safetensors")):
        finished = cli.forked(CONFIG, f"--config.checkpoint={source}", f"--config.output={tmp_path / target}")
        assert finished.status == 0, finished.err
        assert finished.errors == []
        assert f"dmosnet_x0_25: {source} written to {tmp_path / target}" in finished.out
    found = torch_import.load(tmp_path / "c.pth")
    assert found.keys() == original.keys()
    for name, value in original.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(found[name], value, err_msg=name, strict=True)


def test_to_onnx(cli, weights, tmp_path):
    flags = [f"--config.checkpoint={weights}", "--config.image_size=(64, 32)", "--config.licence=CC-BY-4.0"]
    flags += ["--config.onnx.input=unit", "--config.onnx.normalise=True"]
    finished = cli.forked(CONFIG, *flags, f"--config.output={tmp_path / 'x.onnx'}")
    assert finished.status == 0, finished.err
    assert finished.errors == []
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(tmp_path / "x.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    assert {"interpolation": "bicubic", "source": str(weights), "licence": "CC-BY-4.0"}.items() <= facts.items()
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 32, 3), dtype=np.uint8)
    (found,) = session.run(None, {"images": image.transpose(0, 3, 1, 2).astype(np.float32) / 255})
    wanted = dmosnet_jax.load(weights, image_size=(64, 32))(image, normalised=True)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert json.loads((tmp_path / "x.onnx.metadata.json").read_text())["model_kwargs"] == {"img_size": [64, 32]}


def test_the_folder_says_what_it_is_and_needs_no_config(cli, weights, tmp_path):
    folder = tmp_path / "network"
    fields = {"output": folder, "licence": "CC-BY-4.0", "source": "https://example.org", "image_size": "(64, 32)"}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    finished = cli.forked(CONFIG, f"--config.checkpoint={weights}", "--config.keep_classifier=False", *flags)
    assert finished.status == 0, finished.err
    card = json.loads((folder / "config.json").read_text())
    expected = {
        "name": "dmosnet_x0_25",
        "num_classes": 0,
        "image_size": [64, 32],
        "feature_dim": 128,
        "source": "https://example.org",
        "licence": "CC-BY-4.0",
    }
    assert {name: card[name] for name in expected} == expected
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (20, 50), (200, 90, 10)).save(tmp_path / "photos" / "a.png")
    features = []
    for checkpoint, more in ((folder, ()), (weights, ("--config.image_size=(64, 32)",))):
        output = tmp_path / f"{len(features)}.npz"
        finished = cli.forked(
            f"--config={ROOT}/configs/extract.py",
            f"--config.images={tmp_path / 'photos'}",
            f"--config.checkpoint={checkpoint}",
            f"--config.output={output}",
            *more,
        )
        assert finished.status == 0, finished.err
        with np.load(output, allow_pickle=False) as arrays:
            features.append(arrays["features"])
    assert features[0].shape == (1, 128)
    np.testing.assert_array_equal(features[0], features[1])


def test_the_folder_is_evaluated(cli, tiny_flags, weights, tmp_path):
    finished = cli.forked(CONFIG, f"--config.checkpoint={weights}", f"--config.output={tmp_path / 'network'}")
    assert finished.status == 0, finished.err
    results = []
    for checkpoint in (tmp_path / "network", weights):
        workdir = tmp_path / f"scores{len(results)}"
        flags = [flag for flag in tiny_flags("evaluate", checkpoint=checkpoint) if "model.name" not in flag]
        finished = cli.forked(*flags, f"--workdir={workdir}")
        assert finished.status == 0, finished.err
        results.append(json.loads((workdir / "results.json").read_text()))
    assert results[0]["num_query"] == 48
    assert {**results[0], "checkpoint": ""} == {**results[1], "checkpoint": ""}


@pytest.mark.parametrize(
    ("fields", "status", "part"),
    [
        ({"output": ""}, 2, "output is not set: give --config.output=PATH"),
        ({"checkpoint": ""}, 2, "checkpoint is not set: give --config.checkpoint=PATH"),
        ({"layout": "keras", "output": "x.pth"}, 2, "layout='keras' is not known: use one of torchreid, fastreid"),
        ({"layout": "fastreid", "output": "folder"}, 2, "layout='fastreid' is for a file"),
        ({"layout": "fastreid", "output": "x.onnx"}, 2, "layout='fastreid' is for a file"),
        (
            {"onnx.input": "bgr", "output": "x.onnx"},
            2,
            "onnx.input='bgr' is not known: use one of imagenet",
        ),
        ({"output": "dmosnet_x0_25.pt"}, 2, "would build osnet_x0_25 for dmosnet_x0_25: leave osnet out of the name"),
        ({"checkpoint": "nowhere.pth"}, 1, "nowhere.pth"),
        ({"model.name": "osnet_x0_5"}, 1, "conv2.0.conv1"),
    ],
)
def test_refusals(cli, weights, tmp_path, fields, status, part):
    given = {"checkpoint": weights, "output": "out.safetensors"} | fields
    for name in ("checkpoint", "output"):
        given[name] = given[name] and tmp_path / given[name]
    finished = cli.forked(CONFIG, *(f"--config.{name}={value}" for name, value in given.items()))
    assert finished.status == status, finished.err
    assert len(finished.errors) == 1
    assert finished.errors[0].startswith("error: ")
    assert part in finished.errors[0]
    assert list(tmp_path.iterdir()) == []
