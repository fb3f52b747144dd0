"""ONNX files: what onnxruntime answers is what our network answers, in the form that trackers and servers expect."""

import collections
import json

import jax
import numpy as np
import pytest

from dmosnet_jax import models
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.data import augment
from dmosnet_jax.export import onnx_file, onnx_network
from dmosnet_jax.export.onnx_graph import Graph
from tests.models.drawn import draw_tree

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

SIZE = (64, 32)
SMALL = [name for name in models.names() if name.endswith("x0_25")]
# What each form holds, from bytes.
FORMS = {
    "imagenet": lambda x: (x / 255 - augment.IMAGENET_MEAN) / augment.IMAGENET_STD,
    "unit": lambda x: x / 255,
    "byte": lambda x: x,
}


def drawn(name, **options):
    """A network with drawn weights whose maps neither grow nor fade, so that its last digits decide nothing."""
    model = models.build(name, **{"image_size": SIZE} | options)
    rng = np.random.default_rng(3)
    params, stats = (draw_tree(tree, rng) for tree in model.shapes())

    def smaller(path, leaf):
        return leaf * np.float32(0.7) if path[-1].key == "kernel" else leaf

    return model, jax.tree_util.tree_map_with_path(smaller, params), stats


def ours(model, params, stats, images, mean=augment.IMAGENET_MEAN, std=augment.IMAGENET_STD):
    pixels = augment.normalise(jax.numpy.asarray(images), mean, std)
    return np.asarray(jax.jit(lambda *a: model.apply(*a, train=False)[0]["feature"])(params, stats, pixels))


def session(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def answered(path, images, form="byte"):
    (features,) = session(path).run(None, {"images": fed(images, form)})
    return features


def fed(images, form):
    return FORMS[form](images.astype(np.float64)).transpose(0, 3, 1, 2).astype(np.float32)


def saved(tmp_path, network, **options):
    path = tmp_path / "x.onnx"
    onnx_file.save(path, *network, **{"input": "byte"} | options)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return path


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (3, *SIZE, 3), dtype=np.uint8)


CASES = [(name, {}) for name in SMALL]
CASES += [
    ("osnet_x0_25", {"neck": "fc"}),
    ("osnet_ain_x0_25", {"neck": "none", "num_classes": 5}),
    ("dmosnet_ibn_x0_25", {"pool": "gem", "attention": (1, 1, 0)}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_features_are_ours(name, options, images, tmp_path):
    if any(options.get("attention", ())):
        options, images = options | {"image_size": (64, 64)}, np.concatenate([images, images], axis=2)
    network = drawn(name, **options)
    path = saved(tmp_path, network)
    found, wanted = answered(path, images), ours(*network, images)
    assert (found.dtype, found.shape) == (np.float32, (3, network[0].feature_dim))
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-3
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["spcl", "fastreid", "torchreid"])
def test_resnets_are_ours(variant, images, tmp_path):
    network = drawn("resnet50_ibn_a", variant=variant)
    found, wanted = answered(saved(tmp_path, network), images), ours(*network, images)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_the_three_inputs_and_unit_length(images, tmp_path):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    network = drawn("osnet_x0_25")
    wanted = ours(*network, images, mean, std)
    for form in onnx_file.INPUTS:
        for normalise in (False, True):
            path = saved(tmp_path, network, input=form, normalise=normalise, mean=mean, std=std)
            found = answered(path, images, form)
            expected = unit_rows_np(wanted) if normalise else wanted
            np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), err_msg=form)
    # Pixels that are normalised as the network wants them need no operator.
    plain = onnx.load(saved(tmp_path, network, input="imagenet"))
    assert plain.graph.node[0].op_type == "Conv"


def test_any_batch(images, tmp_path):
    network = drawn("dmosnet_x0_25", image_size=(64, 32))
    run = session(saved(tmp_path, network, normalise=True))
    more = np.concatenate([images] * 22)[:64]
    wanted = unit_rows_np(ours(*network, images))
    for count in (1, 3, 64):
        (found,) = run.run(None, {"images": fed(more[:count], "byte")})
        np.testing.assert_allclose(found, np.concatenate([wanted] * 22)[:count], atol=1e-5)


def test_a_black_image_of_a_zero_feature_has_no_nan(tmp_path):
    model, params, stats = drawn("osnet_x0_25", neck="fc")
    params["fc"]["1"] = {"scale": np.zeros(512, np.float32), "bias": np.zeros(512, np.float32)}
    path = saved(tmp_path, (model, params, stats), normalise=True)
    np.testing.assert_array_equal(answered(path, np.zeros((1, *SIZE, 3), np.uint8)), np.zeros((1, 512)))


def test_the_file_has_the_form_that_trackers_expect(tmp_path):
    network = drawn("dmosnet_x0_25")
    path = saved(tmp_path, network, input="unit", properties={"licence": "CC0"})
    model = onnx.load(path)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 17)]
    assert model.ir_version == 8
    (given,), (out,) = session(path).get_inputs(), session(path).get_outputs()
    assert (given.name, given.shape, given.type) == ("images", ["batch", 3, *SIZE], "tensor(float)")
    assert (out.name, out.shape, out.type) == ("output0", ["batch", 64 * 2], "tensor(float)")
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["licence"] == "CC0"
    assert properties["input"] == "unit: RGB / 255, in [0, 1]"
    assert json.loads((tmp_path / "x.onnx.metadata.json").read_text()) == {
        "schema_version": 1,
        "model_name": "dmosnet_x0_25",
        "preprocess": "resize",
        "model_kwargs": {"img_size": list(SIZE)},
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.onnx", "x.onnx.metadata.json"]


@pytest.mark.parametrize("name", SMALL)
def test_convolutions_are_whole_and_norms_are_in_them(name, tmp_path):
    model = onnx.load(saved(tmp_path, drawn(name)))
    counts = collections.Counter(node.op_type for node in model.graph.node)
    kernels = [leaf for leaf in jax.tree_util.tree_leaves_with_path(drawn(name)[1]) if leaf[0][-1].key == "kernel"]
    # The gate's two convolutions run once for each of four streams, in six blocks.
    assert counts["Conv"] == len(kernels) + 6 * 2 * 3
    assert counts["BatchNormalization"] == 0
    instance_norms = {"osnet_ibn": 3, "dmosnet_ibn": 3, "osnet_ain": 5}
    assert counts["InstanceNormalization"] == instance_norms.get(name.removesuffix("_x0_25"), 0)
    assert len(model.graph.node) < 450


def test_the_same_network_is_the_same_file(tmp_path):
    first, second = (saved(tmp_path, drawn("osnet_x0_25")).read_bytes() for _ in range(2))
    assert first == second


def test_refusals(tmp_path):
    network = drawn("osnet_x0_25")
    with pytest.raises(ConfigError, match=r"onnx\.input='bgr' is not known: use one of imagenet, unit, byte"):
        onnx_file.save(tmp_path / "x.onnx", *network, input="bgr")
    with pytest.raises(ConfigError, match=r"x\.onn: an ONNX file must have the suffix \.onnx"):
        onnx_file.save(tmp_path / "x.onn", *network)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="can't be written"):
        onnx_file.save(tmp_path / "file" / "x.onnx", *network)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_only_the_last_value_is_an_output():
    graph = Graph()
    first = graph.add("Relu", graph.input("images", ("batch", 4)))
    graph.add("Relu", first)
    with pytest.raises(ValueError, match="is not what the last operator computes"):
        graph.output(first, "output0", ("batch", 4))
    assert onnx_network.affine(graph, first, "same", (np.ones(4), np.zeros(4)), rank=2) == first


@pytest.mark.slow
@pytest.mark.parametrize("name", models.names())
def test_every_network(name, tmp_path):
    """At batches of one person, of a frame and of a server, in the three input forms; the benchmark has full size."""
    network = drawn(name)
    images = np.random.default_rng(0).integers(0, 256, (64, *SIZE, 3), dtype=np.uint8)
    wanted = unit_rows_np(ours(*network, images))
    for form in onnx_file.INPUTS:
        run = session(saved(tmp_path, network, input=form, normalise=True))
        for count in (1, 3, 64):
            (found,) = run.run(None, {"images": fed(images[:count], form)})
            np.testing.assert_allclose(found, wanted[:count], atol=1e-5, rtol=0, err_msg=f"{form} {count}")
