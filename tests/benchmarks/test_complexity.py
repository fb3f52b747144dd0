"""Counted operations against the reference's figures, the formulas of the attention, and other ways to compute."""

import csv

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from dmosnet_jax.benchmarks import complexity
from dmosnet_jax.models import build
from dmosnet_jax.models.attention import GRID, DoubleLayerAttention, attend
from dmosnet_jax.models.convolution import depthwise3x3, pointwise
from dmosnet_jax.models.counting import Operations, count
from dmosnet_jax.models.functional import Functional


def _f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("name", "parameters", "weighted"),
    [
        ("osnet_x1_0", 2_169_508, 978_875_392),
        ("osnet_x0_75", 1_285_754, 571_752_192),
        ("osnet_x0_5", 630_034, 272_899_328),
        ("osnet_x0_25", 201_864, 82_314_880),
        ("osnet_ibn_x1_0", 2_170_532, 978_875_392),
    ],
)
def test_osnet_costs_what_torchreid_counts(name, parameters, weighted):
    row = complexity.measure(build(name, neck="fc"))
    assert (row["parameters"], row["weighted"], row["attention products"]) == (parameters, weighted, 0)


def test_dmosnet_backbone_and_its_attention():
    row = complexity.measure(build("dmosnet_ibn_x1_0"))
    assert row["parameters"] == 1_935_908
    # Two blocks on a 64x32 map with a bottleneck of 64 channels.
    positions, channels = 64 * 32, 64
    assert row["attention products"] == 2 * 2 * positions * channels * (GRID**2 + positions // GRID**2)
    assert row["multiply-adds"] == row["weighted"] + row["attention products"]


def _attention_cost(height, width, channels):
    module = Functional(lambda rngs: DoubleLayerAttention(channels, group_size=None, rngs=rngs))
    return count(
        lambda p, s, x: module.apply(p, s, x, train=False)[0], *module.shapes(), _f32(1, height, width, channels)
    )


@pytest.mark.parametrize(("height", "width", "channels"), [(64, 32, 64), (16, 8, 32), (32, 32, 96), (8, 8, 16)])
def test_attention_costs_what_its_formula_says(height, width, channels):
    """H-MHSA of Liu et al. with N positions and C channels: the first layer grows as N G^2, the second as N^2 / G^2."""
    positions, pooled = height * width, height * width // GRID**2
    got = _attention_cost(height, width, channels)
    first = 2 * positions * GRID**2 * channels
    second = 2 * positions * pooled * channels
    assert got.attention == first + second
    # qkv, q and proj at full resolution, kv on the pooled map.
    assert got.weighted == (3 + 1 + 1) * positions * channels**2 + 2 * pooled * channels**2


def test_attention_is_cheaper_than_plain_self_attention():
    channels, heads = 64, 2
    for height, width in ((64, 32), (128, 64)):
        positions = height * width
        tokens = _f32(1, positions, heads, channels // heads)
        plain = count(attend, tokens, tokens, tokens)
        assert plain == Operations(attention=2 * positions**2 * channels)
        ours = _attention_cost(height, width, channels).attention
        assert plain.attention / ours == pytest.approx(positions / (GRID**2 + positions / GRID**2))
    # Twice the width doubles the first layer and quadruples the second.
    small, large = (_attention_cost(64, width, channels).attention for width in (32, 64))
    first = 2 * 64 * 32 * GRID**2 * channels
    assert large - 2 * first == 4 * (small - first)


def test_fast_forms_count_as_the_convolutions_they_are():
    x = _f32(2, 6, 5, 8)

    def grouped(x, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=dimensions, feature_group_count=8
        )

    wanted = Operations(weighted=9 * 2 * 6 * 5 * 8)
    assert count(depthwise3x3, x, _f32(3, 3, 1, 8)) == wanted
    assert count(grouped, x, _f32(3, 3, 1, 8)) == wanted
    assert count(pointwise, x, _f32(8, 7)) == Operations(weighted=2 * 6 * 5 * 8 * 7)
    # Around it, element-wise products still cost nothing.
    assert count(lambda x, k: 2.0 * depthwise3x3(x * x, k), x, _f32(3, 3, 1, 8)) == wanted


def test_strided_and_full_convolutions():
    def conv(x, kernel):
        return lax.conv_general_dilated(x, kernel, (2, 2), [(3, 3), (3, 3)], dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert count(conv, _f32(1, 256, 128, 3), _f32(7, 7, 3, 64)).weighted == 128 * 64 * 64 * 7 * 7 * 3


def test_loops_and_calls():
    matrix = _f32(4, 4)

    def loop(x):
        return lax.scan(lambda carry, _: (carry @ carry, None), x, length=5)[0]

    assert count(loop, matrix).weighted == 5 * 4**3
    assert count(jax.jit(jax.checkpoint(lambda x: jax.nn.relu(x @ x))), matrix).weighted == 4**3
    with pytest.raises(ValueError, match="'while' has no fixed number"):
        count(lambda x: lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ y, x), matrix)


def test_backward_pass_counts_twice_the_forward():
    x, kernel = _f32(2, 6, 5, 8), _f32(8, 7)

    def both(x, kernel):
        y, pull = jax.vjp(pointwise, x, kernel)
        return y, pull(y)

    assert count(both, x, kernel).weighted == 3 * count(pointwise, x, kernel).weighted


def test_command_writes_table_and_picture(tmp_path, capsys):
    table, picture = tmp_path / "a.csv", tmp_path / "a.svg"
    arguments = ["--models", "osnet_x0_25,dmosnet_x1_0", "--output", str(table), "--picture", str(picture)]
    assert complexity.main(arguments) == 0
    printed = capsys.readouterr().out
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    # Every mask of the paper's Table 2, and the cheapest first.
    assert [row["model"] for row in rows] == ["osnet_x0_25", *["dmosnet_x1_0"] * 7]
    masks = {row["attention"] for row in rows[1:]}
    assert masks == {"100", "010", "001", "110", "101", "011", "111"}
    costs = [int(row["multiply-adds"]) for row in rows]
    assert costs == sorted(costs)
    chosen = next(row for row in rows if row["attention"] == "100")
    assert (chosen["mAP"], chosen["rank-1"], chosen["source"]) == ("87.36", "95.61", "Table 4, LUPerson")
    assert "82,314,880" in printed
    assert picture.read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--models", "vgg16"], 2, "model.name='vgg16' is not known"),
        (["--models", "osnet_x0_25", "--picture", "x.gif"], 2, "the suffix must be one of .svg, .png, .pdf"),
        (["--models", "osnet_x0_25", "--image_size", "100", "64"], 2, "the nearest that work are 96 or 112"),
        (["--models", "osnet_x0_25", "--output", "/dev/null/x.csv"], 1, "can't be written"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, status, message):
    assert complexity.main(arguments) == status
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_one_cpu_device_counts_the_same(cli):
    """There the depthwise convolutions are kernels, whose calls do not tell what they compute."""
    script = "from dmosnet_jax.benchmarks.complexity import main; main(['--models=osnet_x0_25'])"
    finished = cli.forked(script=script)
    assert finished.status == 0, finished.err
    assert "82,314,880" in finished.out
