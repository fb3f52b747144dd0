"""Galleries from the command line: made, grown, searched, and refused where the weights are others'."""

import json

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import dmosnet_jax
from dmosnet_jax import models
from dmosnet_jax.export import torch_export
from tests.conftest import ROOT
from tests.models.drawn import draw_tree


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Two files of one network with different weights."""
    folder = tmp_path_factory.mktemp("weights")
    model = models.build("osnet_x0_25", neck="fc", image_size=(64, 32))
    for seed, name in enumerate(("a", "b")):
        trees = [draw_tree(tree, np.random.default_rng(seed)) for tree in model.shapes()]
        safetensors.numpy.save_file(torch_export.to_state_dict(*trees, model), folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Thirty photos under three cameras."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(30):
        path = folder / f"c{number % 3}" / f"{number:02d}_c{number % 3}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80, 40, 3), dtype=np.uint8)).save(path)
    return folder


def run(cli, recipe, **fields):
    fields = {"image_size": "(64, 32)", "eval.batch_size": 16, "data.threads": 1} | fields
    return cli.forked(f"--config={ROOT}/configs/{recipe}.py", *(f"--config.{k}={v}" for k, v in fields.items()))


@pytest.fixture
def gallery(cli, weights, photos, tmp_path):
    path = tmp_path / "gallery"
    fields = {"images": photos / "c0", "checkpoint": weights / "a.safetensors", "output": path}
    finished = run(cli, "index", **fields, camera_pattern=r"_c(\d)")
    assert finished.status == 0, finished.err
    assert finished.errors == []
    assert "10 images added, 10 in the gallery" in finished.out
    return path


def test_made_grown_and_searched(cli, weights, photos, gallery, tmp_path):
    fields = {"checkpoint": weights / "a.safetensors", "output": gallery, "camera_pattern": r"_c(\d)"}
    finished = run(cli, "index", images=photos, **fields)
    assert finished.status == 0, finished.err
    # Another folder: its names begin with c0.
    assert "30 images added, 40 in the gallery" in finished.out
    opened = dmosnet_jax.Gallery.open(gallery)
    assert opened.files[:2] == ["00_c0.jpg", "03_c0.jpg"]
    assert opened.files[10:12] == ["c0/00_c0.jpg", "c0/03_c0.jpg"]
    np.testing.assert_array_equal(np.bincount(opened.cameras), [20, 10, 10])
    fields = {"index": gallery, "images": photos / "c1", "top_k": 3, "output": tmp_path / "matches.json"}
    finished = run(cli, "search", **fields, page=tmp_path / "matches.html", **{"eval.rank_lists": 2})
    assert finished.status == 0, finished.err
    assert finished.errors == []
    results = json.loads((tmp_path / "matches.json").read_text())
    assert [result["query"] for result in results] == sorted(path.name for path in (photos / "c1").iterdir())
    for result in results:
        assert [match["rank"] for match in result["matches"]] == [1, 2, 3]
        assert result["matches"][0]["file"] == f"c1/{result['query']}"
        assert result["matches"][0]["score"] == pytest.approx(1, abs=2e-3)
        scores = [match["score"] for match in result["matches"]]
        assert scores == sorted(scores, reverse=True)
    page = (tmp_path / "matches.html").read_text()
    assert page.count('class="query"') == 2
    assert page.count('class="found"') == 6
    assert "c1/01_c1.jpg" in page
    # The same from Python.
    extractor = dmosnet_jax.load(weights / "a.safetensors", image_size=(64, 32))
    opened.check(extractor.fingerprint, "a")
    found = opened.search(extractor(photos / "c1" / "01_c1.jpg"), top_k=3)
    assert [opened.files[row] for row in found.indices[0]] == [match["file"] for match in results[0]["matches"]]


def test_what_is_in_it_is_left_out(cli, weights, photos, gallery, tmp_path):
    fields = {"images": photos / "c0", "checkpoint": weights / "a.safetensors", "output": gallery}
    finished = run(cli, "index", **fields)
    assert finished.status == 1
    assert "all 10 images are in the gallery already" in finished.err
    Image.new("RGB", (20, 40)).save(photos / "c0" / "new.png")
    try:
        finished = run(cli, "index", **fields)
    finally:
        (photos / "c0" / "new.png").unlink()
    assert "10 images are in the gallery already\n1 images added, 11 in the gallery" in finished.out


def test_matches_below_a_threshold_are_left_out(cli, photos, gallery, tmp_path):
    fields = {"index": gallery, "images": photos / "c0" / "00_c0.jpg", "output": tmp_path / "m.json"}
    assert run(cli, "search", **fields, threshold=0.9999, top_k=5).status == 0
    (result,) = json.loads((tmp_path / "m.json").read_text())
    assert [match["file"] for match in result["matches"]] == ["00_c0.jpg"]


@pytest.mark.parametrize(
    ("recipe", "fields", "status", "part"),
    [
        ("index", {"checkpoint": "b.safetensors"}, 1, "was made by other weights"),
        ("index", {"data.interpolation": "bicubic"}, 1, "was made by other weights"),
        ("index", {"dtype": "float32"}, 1, "has features of float16: give --config.dtype=float16"),
        ("index", {"dtype": "int8"}, 2, "dtype='int8' is not known: use one of float16, float32"),
        ("index", {"camera_pattern": "("}, 2, "camera_pattern='(' is no regular expression"),
        ("index", {"camera_pattern": "c"}, 2, "camera_pattern='c' has no group"),
        ("search", {"checkpoint": "b.safetensors"}, 1, "was made by other weights"),
        ("search", {"output": "."}, 1, "is something else than an earlier result"),
        ("search", {"top_k": 0}, 2, "top_k=0 must be greater than 0"),
        ("search", {"index": "nowhere"}, 1, "is no gallery"),
        ("search", {"index": ""}, 2, "index is not set: give --config.index=PATH"),
    ],
)
def test_refusals(cli, weights, photos, gallery, tmp_path, recipe, fields, status, part):
    given = {"images": photos / "c0", "output": gallery if recipe == "index" else tmp_path / "m.json"}
    given |= {"checkpoint": "a.safetensors"} if recipe == "index" else {"index": gallery}
    given |= fields
    if given.get("checkpoint"):
        given["checkpoint"] = weights / given["checkpoint"]
    finished = run(cli, recipe, **given)
    assert (finished.status, len(finished.errors)) == (status, 1), finished.err
    assert part in finished.errors[0]
    assert len(dmosnet_jax.Gallery.open(gallery)) == 10
    assert not (tmp_path / "m.json").exists()
