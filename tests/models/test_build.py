"""The registry: every name builds, sizes are the reference's, and wrong options are refused in one line."""

import itertools
import math

import jax
import numpy as np
import pytest

from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.trees import named_leaves
from dmosnet_jax.models import build, names
from dmosnet_jax.models.attention import head_count

MASKS = list(itertools.product((0, 1), repeat=3))
WIDTHS = ("x1_0", "x0_75", "x0_5", "x0_25")
CONTRACT = [f"{family}_{width}" for family in ("osnet", "dmosnet") for width in WIDTHS]
CONTRACT += ["osnet_ibn_x1_0", "osnet_ain_x1_0", "dmosnet_ibn_x1_0", "resnet50", "resnet50_ibn_a"]


def _count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("osnet_x1_0", 2_169_508),
        ("osnet_x0_75", 1_285_754),
        ("osnet_x0_5", 630_034),
        ("osnet_x0_25", 201_864),
        ("osnet_ibn_x1_0", 2_170_532),
        ("osnet_ain_x1_0", 2_169_508),
    ],
)
def test_osnet_has_as_many_parameters_as_torchreid(name, wanted):
    params, _ = build(name, neck="fc").shapes()
    assert _count(params) == wanted


@pytest.mark.parametrize("name", ["resnet50", "resnet50_ibn_a"])
def test_resnet_has_as_many_parameters_as_torchvision(name):
    params, _ = build(name, neck="none").shapes()
    assert _count(params) == 25_557_032 - (2048 * 1000 + 1000)


@pytest.mark.parametrize(("variant", "side"), [("spcl", 4), ("fastreid", 4), ("torchreid", 2)])
def test_resnet_variants_differ_in_their_last_stride(variant, side):
    model = build("resnet50", variant=variant, image_size=(64, 32))
    images = jax.ShapeDtypeStruct((2, 64, 32, 3), np.float32)
    run = lambda p, s, x: model.apply(p, s, x, train=False, stages=True)[0]  # noqa: E731
    outputs = jax.eval_shape(run, *model.shapes(), images)
    assert outputs["stages"]["layer4"].shape == (2, side, side // 2, 2048)
    assert outputs["stages"]["maxpool"].shape == (2, 16, 8, 64)


@pytest.mark.parametrize(("name", "wanted"), [("dmosnet_ibn_x1_0", 1_935_908), ("dmosnet_x1_0", 1_934_884)])
def test_dmosnet_backbone_has_as_many_parameters_as_released(name, wanted):
    params, _ = build(name).shapes()
    assert _count({key: part for key, part in params.items() if key != "bottleneck"}) == wanted


def test_shapes_are_those_of_a_fresh_model():
    model = build("dmosnet_ibn_x0_25", num_classes=3, pool="gem")
    of = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # noqa: E731
    assert model.shapes() == jax.tree.map(of, model.init(jax.random.key(0)))


def test_contract_names_are_known():
    assert set(CONTRACT) <= set(names())


@pytest.mark.parametrize("name", names())
def test_every_name_builds_with_float32_leaves(name):
    model = build(name, num_classes=7)
    params, stats = model.shapes()
    assert {leaf.dtype.name for leaf in jax.tree.leaves((params, stats))} == {"float32"}
    assert params["classifier"]["kernel"].shape == (model.feature_dim, 7)
    # Every norm with statistics has both of them, and a scale and bias of the same size.
    found = {key: leaf.shape for key, leaf in named_leaves(stats)}
    ours = dict(named_leaves(params))
    for key, shape in found.items():
        module, leaf = key.rsplit(".", 1)
        assert leaf in ("mean", "var")
        assert found[f"{module}.mean"] == found[f"{module}.var"] == ours[f"{module}.scale"].shape == shape


@pytest.mark.parametrize("name", ["dmosnet_x0_75", "dmosnet_x0_25"])
@pytest.mark.parametrize("mask", MASKS)
def test_all_masks_of_table_2_put_attention_where_they_say(name, mask):
    model = build(name, attention=mask)
    params, _ = model.shapes()
    assert model.attention == mask
    for stage, flag in zip(("conv2", "conv3", "conv4"), mask, strict=True):
        for block in ("0", "1"):
            stream = params[stage][block]["conv2d"]
            assert (set(stream) == {"0"} and "attn2" in stream["0"]) == bool(flag)
            assert (set(stream) == {"0", "1", "2", "3"}) != bool(flag)


def test_shapes_flow_through_every_mask_and_neck():
    for mask, neck in ((MASKS[5], "bnneck"), (MASKS[7], "fc")):
        model = build("dmosnet_x0_75", attention=mask, neck=neck, num_classes=3)
        images = jax.ShapeDtypeStruct((2, 256, 128, 3), np.float32)

        def run(params, stats, images, model=model):
            return model.apply(params, stats, images, train=True, stages=True)

        outputs, moved = jax.eval_shape(run, *model.shapes(), images)
        stages = outputs.pop("stages")
        assert {key: x.shape for key, x in stages.items()} == {
            "conv1": (2, 128, 64, 48),
            "maxpool": (2, 64, 32, 48),
            "conv2": (2, 32, 16, 192),
            "conv3": (2, 16, 8, 288),
            "conv4": (2, 16, 8, 384),
            "conv5": (2, 16, 8, 384),
        }
        width = model.feature_dim
        assert {key: x.shape for key, x in outputs.items()} == {
            "pooled": (2, 384),
            "embedding": (2, width),
            "feature": (2, width),
            "logits": (2, 3),
        }
        assert moved == model.shapes()[1]


@pytest.mark.parametrize(("channels", "wanted"), [(64, 2), (96, 3), (128, 4), (48, 2), (72, 2), (16, 1), (24, 1)])
def test_heads_have_32_channels_where_that_divides_the_width(channels, wanted):
    assert head_count(channels) == wanted
    assert channels % head_count(channels) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "osnet"}, "model.name='osnet' is not known: use one of dmosnet_"),
        ({"neck": "bn"}, "model.neck='bn' is not known: use one of bnneck, fc, none"),
        ({"classifier": "arc"}, "model.classifier='arc' is not known: use one of linear, circle"),
        ({"variant": "spcl"}, "model.variant='spcl' is for resnet50"),
        ({"name": "resnet50", "variant": "caffe"}, "model.variant='caffe' is not known: use one of spcl, fastreid"),
        ({"name": "resnet50", "attention": (1, 0, 0)}, "model.attention=(1, 0, 0) is for osnet_* and dmosnet_*"),
        ({"name": "osnet_ain_x0_25", "attention": (1, 0, 0)}, "leave it out for osnet_ain_x0_25"),
        ({"pool": "max"}, "model.pool='max' is not known: use one of avg, gem"),
        ({"dtype": "float16"}, "model.dtype='float16' is not known: use one of float32, bfloat16, float64"),
        ({"attention": (1, 0)}, r"model.attention=(1, 0) must be three flags"),
        ({"num_classes": -1}, "model.num_classes=-1"),
        ({"bn_group_size": 1}, "model.bn_group_size=1 must be a whole number of at least 2"),
        ({"image_size": (256,)}, "image_size=(256,) must be (height, width)"),
        ({"image_size": (250, 128)}, "the height must be a multiple of 32"),
        ({"image_size": (250, 128)}, "nearest that work are 224 or 256"),
        ({"image_size": (256, 8)}, "the width must be a multiple of 32"),
        ({"image_size": (256, 8)}, "nearest that work are 32"),
        ({"image_size": (0, 128)}, "the height must be"),
        ({"image_size": (256, 96), "attention": (1, 0, 1)}, "the width must be a multiple of 128"),
        ({"image_size": (256, 96), "attention": (1, 1, 0)}, "nearest that work are 64 or 128"),
        ({"image_size": (256, 100), "attention": (0, 0, 0)}, "multiple of 16"),
    ],
)
def test_wrong_options_name_the_value_and_the_fix(options, message):
    with pytest.raises(ConfigError) as caught:
        build(**{"name": "dmosnet_x0_25", **options})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("image_size", "mask"),
    [((160, 64), (0, 0, 0)), ((160, 96), (1, 0, 0)), ((320, 64), (0, 1, 0)), ((384, 128), (1, 1, 1))],
)
def test_image_sizes_that_the_message_allows_do_work(image_size, mask):
    model = build("dmosnet_x0_25", attention=mask, image_size=image_size)
    images = jax.ShapeDtypeStruct((2, *image_size, 3), np.float32)
    outputs = jax.eval_shape(lambda p, s, x: model.apply(p, s, x, train=False)[0], *model.shapes(), images)
    assert outputs["feature"].shape == (2, 128)


@pytest.mark.parametrize("name", ["osnet_x0_25", "osnet_ain_x0_25", "dmosnet_ibn_x0_25", "resnet50"])
def test_evaluation_computes_in_float32_on_every_device(name):
    """TPUs would round the inputs of float32 products to bfloat16, and GPUs to TF32: published weights would differ."""
    model = build(name, neck="fc", image_size=(128, 64))
    images = jax.ShapeDtypeStruct((2, 128, 64, 3), np.float32)

    def products(train):
        run = jax.jit(lambda p, s, x: model.apply(p, s, x, train=train)[0]["feature"])
        lines = run.lower(*model.shapes(), images).as_text().splitlines()
        return [line for line in lines if "stablehlo.dot_general" in line or "stablehlo.convolution" in line]

    assert len(products(train=False)) > 40
    assert all(line.count("HIGHEST") == 2 for line in products(train=False))
    # Training leaves it to the device, as PyTorch does.
    assert not any("HIGHEST" in line for line in products(train=True))
