"""Features of the reference implementations, from weights drawn by name and taken through the weight import."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmosnet_jax.data.augment import IMAGENET_MEAN, IMAGENET_STD, normalise
from dmosnet_jax.export.torch_import import convert
from dmosnet_jax.models import build
from dmosnet_jax.models.attention import DoubleLayerAttention
from dmosnet_jax.models.draws import Draws
from dmosnet_jax.models.functional import Functional
from tests.models.drawn import draw_all

GOLDENS = {
    "torchreid_osnet_x0_25": ("osnet_x0_25", "fc"),
    "torchreid_osnet_x1_0": ("osnet_x1_0", "fc"),
    "torchreid_osnet_ibn_x1_0": ("osnet_ibn_x1_0", "fc"),
    "fastreid_dmosnet_ibn_x1_0": ("dmosnet_ibn_x1_0", "bnneck"),
}


def _unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("golden", GOLDENS)
def test_features_match_the_reference(shared, golden):
    name, neck = GOLDENS[golden]
    wanted = np.load(shared(f"goldens/{golden}.npz"))
    model = build(name, neck=neck)
    params, stats = convert(draw_all(shared(f"goldens/{golden}.keys.json")), model)

    @jax.jit
    def run(params, stats, images):
        pixels = normalise(images, IMAGENET_MEAN, IMAGENET_STD)
        outputs, _ = model.apply(params, stats, pixels, train=False, stages=True)
        outputs["stages"] = {stage: x.mean(axis=(1, 2)) for stage, x in outputs["stages"].items()}
        return outputs

    outputs = run(params, stats, wanted["images"])
    np.testing.assert_allclose(_unit(outputs["feature"]), _unit(wanted["feature"]), atol=1e-4, rtol=0)
    np.testing.assert_allclose(outputs["pooled"], wanted["pooled"], atol=1e-4, rtol=1e-4)
    stages = [key.removeprefix("mean_") for key in wanted.files if key.startswith("mean_")]
    assert len(stages) == (6 if golden.startswith("fastreid") else 0)
    for stage in stages:
        np.testing.assert_allclose(
            outputs["stages"][stage], wanted[f"mean_{stage}"], atol=1e-4, rtol=1e-4, err_msg=stage
        )


def test_attention_alone_matches_the_reference(shared):
    wanted = np.load(shared("goldens/fastreid_dmosnet_ibn_x1_0.npz"))
    weights = draw_all(shared("goldens/fastreid_dmosnet_ibn_x1_0.keys.json"))
    params, stats = convert(weights, build("dmosnet_ibn_x1_0"))
    params, stats = (tree["conv2"]["0"]["conv2d"]["0"]["attn2"] for tree in (params, stats))
    x = jnp.asarray(wanted["attn_in"].transpose(0, 2, 3, 1))
    attention = Functional(lambda rngs: DoubleLayerAttention(x.shape[-1], group_size=None, rngs=rngs))
    y, _ = jax.jit(lambda p, s, x: attention.apply(p, s, x, train=False))(params, stats, x)
    np.testing.assert_allclose(y.transpose(0, 3, 1, 2), wanted["attn_out"], atol=1e-4, rtol=0)


def test_the_attention_of_the_golden_has_heads_of_32_channels():
    attention = nnx.eval_shape(lambda: DoubleLayerAttention(64, group_size=None, rngs=Draws()))
    assert attention.heads == 2
