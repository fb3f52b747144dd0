"""Weights out: bit for bit what came in, readable by torch, and refused where the other code base differs."""

import hashlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from dmosnet_jax import models
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.export import identify, torch_export, torch_import
from dmosnet_jax.export.layouts import recognise
from tests.models.drawn import draw_tree


def _assert_identical(got, wanted):
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        assert got[name].tobytes() == np.ascontiguousarray(value).tobytes(), name


@pytest.mark.parametrize(
    ("file", "layout"),
    [
        ("goldens/torchreid_osnet_x0_25.pth", "torchreid"),
        ("goldens/fastreid_dmosnet_ibn_x1_0.pth", "fastreid"),
        ("weights/osnet_x0_25_market1501.pth", "torchreid"),
        ("weights/osnet_x0_25_msmt17.pth", "torchreid"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_import_then_export_is_bit_identical(shared, tmp_path, file, layout, suffix):
    original = torch_import.load(shared(file))
    model = models.build(**identify.describe(original), num_classes=identify.infer_num_classes(original))
    params, stats = torch_import.convert(original, model)
    counted = identify.infer_batches(original)
    exported = torch_export.to_state_dict(params, stats, model, layout=layout, batches=counted)
    path = tmp_path / f"out{suffix}"
    torch_export.save(path, exported)
    # What fast-reid's older files say of the input is no weight of a network.
    weights = {name: value for name, value in original.items() if name not in ("pixel_mean", "pixel_std")}
    _assert_identical(torch_import.load(path), weights)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


CASES = [
    ("osnet_x0_25", {"neck": "fc"}, ("torchreid",)),
    ("osnet_ibn_x0_25", {}, ("torchreid", "fastreid")),
    ("osnet_ain_x0_25", {"neck": "fc"}, ("torchreid",)),
    ("dmosnet_x0_25", {"attention": (1, 0, 1)}, ("torchreid", "fastreid")),
    ("dmosnet_ibn_x0_25", {"pool": "gem", "classifier": "circle"}, ("fastreid",)),
    ("resnet50", {"neck": "none", "variant": "torchreid"}, ("torchreid",)),
    ("resnet50", {"neck": "fc"}, ("torchreid",)),
    ("resnet50", {}, ("openunreid", "spcl")),
    ("resnet50", {"pool": "gem"}, ("openunreid",)),
    ("resnet50_ibn_a", {}, ("openunreid", "spcl")),
    ("resnet50_ibn_a", {"variant": "fastreid", "pool": "gem"}, ("fastreid",)),
]


@pytest.mark.parametrize(("name", "options", "layouts"), CASES)
def test_export_then_import_is_bit_identical_in_every_layout(rng, name, options, layouts):
    model = models.build(name, num_classes=3, **options)
    params, stats = (draw_tree(tree, rng) for tree in model.shapes())
    for layout in torch_export.EXPORTS:
        if layout not in layouts:
            with pytest.raises(ConfigError, match=f"layout='{layout}' has no .*: use layout={' or '.join(layouts)}"):
                torch_export.to_state_dict(params, stats, model, layout=layout)
            continue
        state_dict = torch_export.to_state_dict(params, stats, model, layout=layout)
        assert recognise(state_dict).name == layout
        described = identify.describe(state_dict)
        assert described["name"] == name
        assert (described["neck"], described["pool"]) == (model.neck, model.pool)
        assert (described["variant"] or "") == model.variant
        if "attention" in options:
            assert described["attention"] == model.attention
        again = torch_import.convert(state_dict, model)
        assert jax.tree.structure(again) == jax.tree.structure((params, stats))
        jax.tree.map(lambda a, b: _assert_identical({"": a}, {"": b}), again, (params, stats))


def test_exported_arrays_share_nothing_with_the_model(rng):
    model = models.build("osnet_x0_25")
    params, stats = (draw_tree(tree, rng) for tree in model.shapes())
    exported = torch_export.to_state_dict(params, stats, model)
    before = params["conv1"]["bn"]["scale"].copy()
    exported["conv1.bn.weight"][:] = 7
    np.testing.assert_array_equal(params["conv1"]["bn"]["scale"], before)


def test_files_are_reproducible(tmp_path, rng):
    arrays = {"a": rng.normal(size=(2, 3)).astype(np.float32), "n": np.asarray(3, np.int64), "e": np.zeros((0, 4))}
    digests = set()
    for name in ("one.pth", "two.pth"):
        torch_export.save(tmp_path / name, arrays)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
    _assert_identical(torch_import.load(tmp_path / "one.pth"), arrays)


def test_every_element_type_survives(tmp_path, rng):
    arrays = {kind: rng.normal(0, 100, size=(3, 2)).astype(kind) for kind in ("float16", "float32", "float64", "int64")}
    torch_export.save(tmp_path / "x.pth", arrays)
    _assert_identical(torch_import.load(tmp_path / "x.pth"), arrays)


def test_safetensors_names_its_format(tmp_path, rng):
    torch_export.save(tmp_path / "x.safetensors", {"a": np.ones(2, np.float32)})
    with safetensors.safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_wrong_suffix_layout_and_place(tmp_path, rng):
    with pytest.raises(ConfigError, match=r"x\.onnx: the suffix must be one of \.safetensors, \.pth, \.pt"):
        torch_export.save(tmp_path / "x.onnx", {})
    model = models.build("osnet_x0_25")
    with pytest.raises(ConfigError, match="layout='timm' is not known: use one of torchreid, fastreid"):
        torch_export.check_layout(model, "timm")
    (tmp_path / "file").write_text("")
    for name in ("x.pth", "x.safetensors"):
        with pytest.raises(DataError, match="can't be written"):
            torch_export.save(tmp_path / "file" / name, {"a": np.ones(2, np.float32)})


def test_torch_reads_what_we_write(tmp_path, rng):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `peers`)")
    model = models.build("osnet_x0_25", neck="fc", num_classes=4)
    params, stats = (draw_tree(tree, rng) for tree in model.shapes())
    exported = torch_export.to_state_dict(params, stats, model, batches=12)
    torch_export.save(tmp_path / "x.pth", exported)
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    _assert_identical({name: value.numpy() for name, value in loaded.items()}, exported)
    from tests.models import torch_peers

    peer = torch_peers.torchreid("osnet").osnet_x0_25(4, pretrained=False)
    peer.load_state_dict(loaded, strict=True)
