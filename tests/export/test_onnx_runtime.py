"""Features by onnxruntime are those of JAX, in the same order, from every door that has them."""

import json
import pickle
import sys

import jax
import numpy as np
import pytest

import dmosnet_jax
from dmosnet_jax import models
from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.data.loading import ImageCache
from dmosnet_jax.data.splits import load_split
from dmosnet_jax.evaluation import extract
from dmosnet_jax.export import folder, onnx_runtime
from tests.models.drawn import draw_tree

pytest.importorskip("onnxruntime")
SIZE = (64, 32)
INPUTS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


def drawn(name):
    model = models.build(name, image_size=SIZE)
    rng = np.random.default_rng(3)
    return model, *(draw_tree(tree, rng) for tree in model.shapes())


@pytest.fixture(scope="module")
def network():
    return drawn("osnet_x0_25")


def assert_alike(found, expected):
    assert (found.shape, found.dtype) == (expected.shape, np.float32)
    np.testing.assert_allclose(unit_rows_np(found), unit_rows_np(expected), atol=2e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("name", "flip"), [("osnet_x0_25", False), ("osnet_x0_25", True), ("dmosnet_ibn_x0_25", True)])
def test_features_are_those_of_jax(tiny_data, name, flip):
    model, params, stats = drawn(name)
    split = load_split(tiny_data, "tiny", "query")
    # 48 images: the last batch is not full.
    options = {"batch_size": 20, "threads": 1, "flip": flip, **INPUTS}
    expected = extract.Extractor(model, make_mesh(), **options)(params, stats, split)
    extractor = onnx_runtime.Extractor(model, **options)
    assert_alike(extractor(jax.device_put(params), stats, split), expected)
    cache = ImageCache.within(split, SIZE, 2**20)
    for _ in range(2):
        assert_alike(extractor(params, stats, split, cache=cache), expected)
    others = jax.tree.map(lambda leaf: -leaf, params)
    assert not np.allclose(extractor(others, stats, split), expected, rtol=0.1)


def test_load_takes_it_and_pickles(network, tmp_path, rng):
    model, params, stats = network
    folder.save(tmp_path / "model", params, stats, folder.Card(model, **INPUTS))
    images = list(rng.integers(0, 256, (5, 90, 40, 3), dtype=np.uint8))
    expected = dmosnet_jax.load(tmp_path / "model")(images)
    extractor = dmosnet_jax.load(tmp_path / "model", runtime="onnxruntime", batch_size=2)
    assert_alike(extractor(images), expected)
    assert_alike(pickle.loads(pickle.dumps(extractor))(images), expected)
    assert extractor.fingerprint == dmosnet_jax.load(tmp_path / "model").fingerprint
    for options, reason in (
        ({"runtime": "tensorrt"}, "runtime='tensorrt' is not known: use one of jax, onnxruntime"),
        ({"runtime": "onnxruntime", "dtype": "bfloat16"}, "runtime=onnxruntime computes in float32, not bfloat16"),
    ):
        with pytest.raises(ConfigError, match=reason):
            dmosnet_jax.load(tmp_path / "model", **options)


def test_a_runtime_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"eval\.runtime=onnxruntime is not installed: pip install onnxruntime"):
        onnx_runtime.check("onnxruntime", "float32", field="eval.runtime")
    onnx_runtime.check("jax", "bfloat16")
    monkeypatch.undo()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="runtime=onnxruntime is for one process, not 2: use jax"):
        onnx_runtime.check("onnxruntime", "float32")


def test_an_evaluation_scores_the_same(network, cli, tiny_flags, tmp_path):
    model, params, stats = network
    folder.save(tmp_path / "model", params, stats, folder.Card(model, **INPUTS))
    found = {}
    for runtime in onnx_runtime.RUNTIMES:
        fields = {"checkpoint": tmp_path / "model", "eval.runtime": runtime}
        finished = cli.forked(*tiny_flags("evaluate", **fields), f"--workdir={tmp_path / runtime}")
        assert finished.status == 0, finished.err
        found[runtime] = json.loads((tmp_path / runtime / "results.json").read_text())
    for name in ("mAP", "rank1", "mINP"):
        assert found["onnxruntime"][name] == pytest.approx(found["jax"][name], abs=0.02), name
    refused = cli(f"--config={tiny_flags('activation_maps')[0].partition('=')[2]}", "--config.eval.runtime=onnxruntime")
    assert refused.status == 2
    assert len(refused.errors) == 1
