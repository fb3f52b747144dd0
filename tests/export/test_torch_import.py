"""Layouts, the both-way check, and the real files against the weights they were drawn from."""

import dataclasses
import io
import json
import zipfile
import zlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dmosnet_jax import models
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.export import identify, layouts, torch_import
from dmosnet_jax.export.weights import open_weights


def _drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of a golden model, by the rule in its README."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith("running_mean"):
        return rng.normal(0, 0.1, shape).astype(np.float32)
    if len(shape) >= 2:
        return rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32)
    if name.endswith("weight"):
        return rng.uniform(0.8, 1.2, shape).astype(np.float32)
    return rng.normal(0, 0.05, shape).astype(np.float32)


GOLDENS = {
    "torchreid_osnet_x0_25.pth": ("torchreid_osnet_x0_25", "osnet_x0_25", "torchreid", "fc"),
    "torchreid_osnet_x0_25_trainer.pth.tar": ("torchreid_osnet_x0_25", "osnet_x0_25", "torchreid", "fc"),
    "fastreid_dmosnet_ibn_x1_0.pth": ("fastreid_dmosnet_ibn_x1_0", "dmosnet_ibn_x1_0", "fastreid", "bnneck"),
}


@pytest.mark.parametrize("filename", GOLDENS)
def test_golden_files_hold_the_drawn_weights(shared, filename):
    keys = json.loads(shared(f"goldens/{GOLDENS[filename][0]}.keys.json").read_text())
    state_dict = torch_import.load(shared(f"goldens/{filename}"))
    # The files may hold more than the golden's model, such as fast-reid's pixel_mean.
    assert set(keys) <= set(state_dict)
    for name, shape in keys.items():
        np.testing.assert_array_equal(state_dict[name], _drawn(name, tuple(shape)), err_msg=name)


@pytest.mark.parametrize("filename", GOLDENS)
def test_golden_files_convert_leaf_by_leaf(shared, filename):
    _, model_name, layout, neck = GOLDENS[filename]
    state_dict = torch_import.load(shared(f"goldens/{filename}"))
    assert layouts.recognise(state_dict).name == layout
    described = identify.describe(state_dict)
    assert (described["neck"], described["pool"]) == (neck, "avg")
    classes = identify.infer_num_classes(state_dict)
    model = models.build(model_name, neck=neck, num_classes=classes)
    result = torch_import.plan(state_dict, model)
    assert (result.layout, result.left_out, result.unused) == (layout, (), ())
    wanted = model.shapes()
    assert jax.tree.structure((result.params, result.stats)) == jax.tree.structure(wanted)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, (result.params, result.stats), wanted)
    assert jax.tree.all(same)
    prefix = "backbone." if layout == "fastreid" else ""
    block = result.params["conv2"]["0"]
    kernel = state_dict[f"{prefix}conv2.0.conv2a.conv2.weight"]
    np.testing.assert_array_equal(block["conv2a"]["conv2"]["kernel"][:, :, 0, :], kernel[:, 0].transpose(1, 2, 0))
    pointwise = state_dict[f"{prefix}conv2.0.conv1.conv.weight"]
    np.testing.assert_array_equal(block["conv1"]["conv"]["kernel"][0, 0], pointwise[:, :, 0, 0].T)
    var = state_dict[f"{prefix}conv2.1.conv2a.bn.running_var"]
    np.testing.assert_array_equal(result.stats["conv2"]["1"]["conv2a"]["bn"]["var"], var)
    classifier = state_dict["heads.weight" if layout == "fastreid" else "classifier.weight"]
    np.testing.assert_array_equal(result.params["classifier"]["kernel"], classifier.T)


@pytest.mark.parametrize("dataset", ["market1501", "msmt17"])
def test_real_files_fit_a_model_without_classifier(shared, dataset):
    state_dict = torch_import.load(shared(f"weights/osnet_x0_25_{dataset}.pth"))
    assert identify.infer_num_classes(state_dict) == {"market1501": 751, "msmt17": 1041}[dataset]
    result = torch_import.plan(state_dict, models.build("osnet_x0_25", neck="fc"))
    assert result.unused == ("classifier.weight", "classifier.bias")
    assert result.left_out == ()


def test_another_model_lists_every_difference(shared):
    state_dict = torch_import.load(shared("goldens/torchreid_osnet_x0_25.pth"))
    with pytest.raises(DataError) as caught:
        torch_import.convert(state_dict, models.build("osnet_x0_5", neck="bnneck"))
    message = str(caught.value)
    assert message.isprintable()
    assert "4 missing, 479 misshapen, 6 unexpected" in message
    for name in (
        "bottleneck.scale",
        "fc.0.weight",
        "conv1.conv.weight (16, 3, 7, 7) for conv1.conv.kernel (7, 7, 3, 32)",
    ):
        assert name in message


def _expected(weights, prefix="backbone.", head="heads.bottleneck.0.", classifier="heads.weight"):
    def norm(module):
        return {"scale": weights[f"{module}weight"], "bias": weights[f"{module}bias"]}

    def moments(module):
        return {"mean": weights[f"{module}running_mean"], "var": weights[f"{module}running_var"]}

    kernel = weights[f"{prefix}conv1.conv.weight"].transpose(2, 3, 1, 0)
    params = {"conv1": {"conv": {"kernel": kernel}, "bn": norm(f"{prefix}conv1.bn.")}, "bottleneck": norm(head)}
    params["classifier"] = {"kernel": weights[classifier].T}
    return params, {"conv1": {"bn": moments(f"{prefix}conv1.bn.")}, "bottleneck": moments(head)}


def _assert_trees(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


NAMES = {
    "fastreid": ("backbone.", "heads.bottleneck.0.", "heads.weight"),
    "openunreid": ("backbone.", "head.feat_bn.", "classifier.weight"),
    "torchreid": ("", "bottleneck.", "classifier.weight"),
}


@pytest.mark.parametrize("layout", NAMES)
def test_layouts_are_recognised_and_renamed(small_weights, small_model, layout):
    weights = small_weights(*NAMES[layout])
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    for state_dict in (weights, wrapped):
        assert layouts.recognise(state_dict).name == layout
        assert identify.describe(state_dict)["neck"] == "bnneck"
        assert identify.infer_num_classes(state_dict) == 5
        _assert_trees(torch_import.convert(state_dict, small_model()), _expected(weights, *NAMES[layout]))


def test_entries_dropped_by_rule(small_weights, small_model):
    weights = small_weights() | {"pixel_mean": np.ones((1, 3, 1, 1), np.float32), "pixel_std": np.ones((1, 3, 1, 1))}
    _assert_trees(torch_import.convert(weights, small_model()), _expected(small_weights()))


def _with_domains(weights, infix):
    """Each norm once per domain: the weights as given in the last one, zeros in the others."""
    result = {}
    for name, value in weights.items():
        module, leaf = name.rsplit(".", 1)
        if module.endswith((".bn", "feat_bn")):
            result[f"{module}.{infix[0]}.{leaf}"] = np.zeros_like(value)
            result[f"{module}.{infix[1]}.{leaf}"] = value
        else:
            result[name] = value
    return result


@pytest.mark.parametrize("infix", [("dsbn.0", "dsbn.1"), ("BN_S", "BN_T")])
def test_the_target_domain_is_the_last(small_weights, small_model, infix):
    weights = small_weights(*NAMES["openunreid"])
    state_dict = _with_domains(weights, infix)
    wanted = _expected(weights, *NAMES["openunreid"])
    _assert_trees(torch_import.convert(state_dict, small_model()), wanted)
    _assert_trees(torch_import.convert(state_dict, small_model(), domain=1), wanted)
    source, _ = torch_import.convert(state_dict, small_model(), domain=0)
    np.testing.assert_array_equal(source["bottleneck"]["scale"], np.zeros(4, np.float32))
    with pytest.raises(DataError, match=r"domain=2 .* 0 to 1"):
        torch_import.convert(state_dict, small_model(), domain=2)


def test_a_teacher_is_preferred_to_its_student(small_weights, small_model):
    weights = small_weights(*NAMES["openunreid"])
    pair = {f"module.net.{name}": np.zeros_like(value) for name, value in weights.items()}
    pair |= {f"module.mean_net.{name}": value for name, value in weights.items()}
    assert layouts.recognise(pair).name == "openunreid"
    _assert_trees(torch_import.convert(pair, small_model()), _expected(weights, *NAMES["openunreid"]))


def test_spcl_and_torchvision_names_become_torchvision_stages():
    spcl = ["base.0.weight", "base.1.running_mean", "base.4.0.conv1.weight", "base.7.2.bn3.bias", "feat_bn.weight"]
    spcl.append("base.5.0.downsample.1.num_batches_tracked")
    assert list(layouts.rename(spcl, layouts.recognise(spcl)).values()) == [
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.conv1.weight",
        "layer4.2.bn3.bias",
        "bottleneck.weight",
        None,
    ]
    assert layouts.recognise(spcl).name == "spcl"
    plain = ["conv1.weight", "layer1.0.conv1.weight", "fc.weight", "fc.bias"]
    assert layouts.recognise(plain).name == "torchvision"
    assert list(layouts.rename(plain, layouts.recognise(plain)).values())[2:] == [
        "classifier.weight",
        "classifier.bias",
    ]


def test_domain_norms_inside_ibn_keep_their_place():
    names = ["base.0.weight", "base.4.0.bn1.BN.BN_S.weight", "base.4.0.bn1.BN.BN_T.weight", "base.4.0.bn1.IN.weight"]
    assert list(layouts.rename(names, layouts.recognise(names)).values()) == [
        "conv1.weight",
        None,
        "layer1.0.bn1.BN.weight",
        "layer1.0.bn1.IN.weight",
    ]
    names = ["backbone.layer1.0.bn1.BN.dsbn.0.bias", "backbone.layer1.0.bn1.BN.dsbn.1.bias", "head.feat_bn.dsbn.1.bias"]
    assert list(layouts.rename(names, layouts.recognise(names)).values()) == [
        None,
        "layer1.0.bn1.BN.bias",
        "bottleneck.bias",
    ]


def test_unknown_layout(small_model):
    with pytest.raises(DataError, match=r"2 tensors \(a, b, .*no known layout \(openunreid, fastreid"):
        torch_import.convert({"a": np.ones(1), "b": np.ones(1)}, small_model())


def test_all_kinds_of_differences_in_one_line(small_weights, small_model):
    weights = small_weights()
    del weights["heads.bottleneck.0.running_var"]
    weights["backbone.conv1.bn.bias"] = np.ones(7, np.float32)
    weights["backbone.conv9.weight"] = np.ones((1, 1), np.float32)
    weights["backbone.conv1.bn.weight"] = np.full(4, np.nan, np.float32)
    weights["bottleneck.weight"] = np.ones(4, np.float32)
    with pytest.raises(DataError) as caught:
        torch_import.convert(weights, small_model())
    message = str(caught.value)
    assert message.isprintable()
    for part in (
        "checkpoint (layout fastreid) does not fit model small: 1 missing, ",
        "missing: bottleneck.var;",
        "misshapen: backbone.conv1.bn.bias (7,) for conv1.bn.bias (4,)",
        "unexpected: backbone.conv9.weight",
        "not finite: backbone.conv1.bn.weight",
        "doubled: bottleneck.weight",
    ):
        assert part in message, message


def test_classifier_by_number_of_classes(small_weights, small_model):
    weights = small_weights()
    without = torch_import.plan(weights, small_model(num_classes=0))
    assert "classifier" not in without.params
    assert without.unused == ("heads.weight",)
    with pytest.raises(
        DataError, match=r"1 misshapen; misshapen: heads\.weight \(5, 4\) for classifier\.kernel \(4, 9\)"
    ):
        torch_import.convert(weights, small_model(num_classes=9))
    other = torch_import.plan(weights, small_model(num_classes=9), missing_ok=("classifier",))
    assert "classifier" not in other.params
    assert (other.left_out, other.unused) == (("classifier.kernel",), ("heads.weight",))


def test_backbone_starts_a_model_with_another_head(small_weights, small_model):
    weights = {name: value for name, value in small_weights().items() if name.startswith("backbone.")}
    weights["fc.0.weight"] = np.ones((3, 4), np.float32)
    model = small_model()
    with pytest.raises(DataError, match="5 missing, 1 unexpected"):
        torch_import.convert(weights, model)
    result = torch_import.plan(weights, model, missing_ok=torch_import.HEADS, unexpected_ok=torch_import.HEADS)
    assert set(result.left_out) == {
        *(f"bottleneck.{leaf}" for leaf in ("scale", "bias", "mean", "var")),
        "classifier.kernel",
    }
    fresh_params, fresh_stats = model.init(jax.random.key(1))
    params, stats = torch_import.fill(fresh_params, result.params), torch_import.fill(fresh_stats, result.stats)
    assert jax.tree.structure((params, stats)) == jax.tree.structure((fresh_params, fresh_stats))
    np.testing.assert_array_equal(params["conv1"]["bn"]["scale"], weights["backbone.conv1.bn.weight"])
    np.testing.assert_array_equal(params["classifier"]["kernel"], fresh_params["classifier"]["kernel"])
    # The backbone itself is never optional.
    del weights["backbone.conv1.bn.weight"]
    with pytest.raises(DataError, match=r"1 missing; missing: conv1\.bn\.scale"):
        torch_import.convert(weights, model, missing_ok=torch_import.HEADS, unexpected_ok=torch_import.HEADS)


def test_fill_refuses_leaves_of_another_model():
    with pytest.raises(DataError, match=r"does not have: b\.c"):
        torch_import.fill({"a": 1}, {"b": {"c": 2}})


def test_result_does_not_alias_the_state_dict(small_weights, small_model):
    weights = small_weights()
    params, _ = torch_import.convert(weights, dataclasses.replace(small_model()))
    before = params["conv1"]["bn"]["scale"].copy()
    weights["backbone.conv1.bn.weight"][:] = -1
    np.testing.assert_array_equal(params["conv1"]["bn"]["scale"], before)


@pytest.mark.parametrize(
    "prefix", ["model.", "net.", "base.", "student.", "module.model.", "0.", "encoder_q.", "a.b.c.d."]
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_any_common_prefix_is_taken_off(writer, put, small_weights, small_model, prefix, wrapped):
    plain = small_weights()
    body, storages = writer.state({prefix + name: value for name, value in plain.items()})
    path = put(writer.zipped(writer.mapping({"state_dict": body}) if wrapped else body, storages))
    found = torch_import.load(path)
    assert found.keys() == plain.keys()
    torch_import.convert(found, small_model())


def _pair(writer, small_weights, first="student", second="teacher"):
    """A file with two networks, of which the second has other values."""
    states, storages = {}, {}
    for number, key in enumerate((first, second)):
        weights = {name: value + number for name, value in small_weights().items()}
        index = len(storages)
        own = {str(index + at): array for at, array in enumerate(weights.values())}
        storages |= own
        states[key] = writer.mapping(
            {name: writer.dense(at, array) for (at, array), name in zip(own.items(), weights, strict=True)}
        )
    return writer.zipped(writer.mapping(states), storages)


def test_of_several_networks_one_is_chosen(writer, put, small_weights):
    path = put(_pair(writer, small_weights))
    with pytest.raises(DataError, match=r"several state dicts: choose one by PATH#ENTRY, .* of student, teacher"):
        torch_import.load(path)
    student, teacher = (torch_import.load(f"{path}#{entry}") for entry in ("student", "teacher"))
    name = "backbone.conv1.conv.weight"
    np.testing.assert_array_equal(student[name] + 1, teacher[name])
    with pytest.raises(DataError, match="has no entry 'ema' with tensors; it has student, teacher"):
        torch_import.load(f"{path}#ema")


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema", "module_ema"])
def test_averaged_weights_are_taken_by_choice(writer, put, small_weights, key):
    path = put(_pair(writer, small_weights, "state_dict", key))
    name = "backbone.conv1.conv.weight"
    np.testing.assert_array_equal(torch_import.load(path)[name], small_weights()[name])
    np.testing.assert_array_equal(torch_import.load(f"{path}#{key}")[name], small_weights()[name] + 1)


@pytest.mark.parametrize("key", ["teacher", "student", "ema", "weights_of_mine"])
def test_a_single_network_under_any_key_is_found(writer, put, small_weights, key):
    body, storages = writer.state(small_weights())
    path = put(writer.zipped(writer.mapping({"epoch": writer.integer(3), key: body}), storages))
    assert torch_import.load(path).keys() == small_weights().keys()


def test_parts_of_a_larger_model_are_chosen_by_their_prefix(writer, put, small_weights, tmp_path):
    weights = {f"encoder_q.{name}": value for name, value in small_weights().items()}
    weights |= {f"encoder_k.{name}": value for name, value in small_weights().items()} | {
        "queue": np.ones((4, 8), "f4")
    }
    for path in (put(writer.zipped(*writer.state(weights))), tmp_path / "w.safetensors"):
        if path.suffix == ".safetensors":
            save_file(weights, path)
        with pytest.raises(DataError) as error:
            open_weights(path)
        assert str(error.value).startswith(f"{path}: ")
        assert all(f"PATH#encoder_{key}" in str(error.value) for key in "qk")
        assert torch_import.load(f"{path}#encoder_k").keys() == small_weights().keys()


def test_a_file_with_a_hash_in_its_name_is_that_file(writer, put, small_weights):
    path = put(writer.zipped(*writer.state(small_weights())), "run#3.pth")
    assert torch_import.load(path).keys() == small_weights().keys()


def test_what_is_found_instead_of_weights_is_said(writer, put):
    path = put(writer.zipped(writer.mapping({"epoch": writer.integer(3), "lr": writer.integer(1)}), {}))
    with pytest.raises(DataError, match=r"no state dict with named tensors \(its keys are epoch, lr\)"):
        torch_import.load(path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "is a pointer of Git LFS"),
        (b"<!DOCTYPE html><html><head>", "is a web page"),
        (b"\x1f\x8b\x08\x00", "is compressed: unpack it"),
    ],
)
def test_what_stands_in_the_place_of_weights(put, content, part):
    with pytest.raises(DataError, match=part):
        torch_import.load(put(content))


def test_a_torchscript_program_is_called_so(put):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/data.pkl", b"\x80\x02}.")
        archive.writestr("net/code/__torch__.py", "class Net(Module):\n" * 50)
        archive.writestr("net/constants.pkl", b"\x80\x02).")
    with pytest.raises(DataError, match="is a TorchScript program, and programs are not run: save its weights"):
        torch_import.load(put(out.getvalue()))


def test_weights_that_are_no_numbers_say_why(writer, put, small_weights, small_model):
    weights = small_weights()
    weights["backbone.conv1.conv.weight"][0] = np.nan
    state = torch_import.load(put(writer.zipped(*writer.state(weights))))
    with pytest.raises(DataError, match=r"not finite: .*; its training diverged, or the file is damaged") as error:
        torch_import.convert(state, small_model())
    assert "model.neck" not in str(error.value)


def test_thousands_of_foreign_names_are_a_bounded_message(small_weights, small_model):
    weights = small_weights() | {f"backbone.other{i}.weight": np.zeros(1, np.float32) for i in range(5000)}
    with pytest.raises(DataError, match=r"5000 unexpected; .* and 4,970 more") as error:
        torch_import.convert(weights, small_model())
    assert len(str(error.value)) < 3000


def test_a_safetensors_file_that_begins_as_a_pickle_does(tmp_path):
    """The first byte is of the header's length, and 0x80 begins a pickle too."""
    for fill in range(0, 4096, 8):
        save_file({"weight": np.arange(6.0, dtype=np.float32)}, tmp_path / "w.safetensors", metadata={"a": "b" * fill})
        if (tmp_path / "w.safetensors").read_bytes()[:1] == b"\x80":
            break
    else:
        raise AssertionError("no header of such a length")
    np.testing.assert_array_equal(torch_import.load(tmp_path / "w.safetensors")["weight"], np.arange(6.0))
