"""What training in bfloat16 keeps for the backward pass."""

import jax
import jax.numpy as jnp
import pytest

from dmosnet_jax import models

BATCH, SIZE = 6, (64, 64)


@pytest.mark.parametrize("name", ["osnet_ain_x0_25", "osnet_ibn_x0_25", "dmosnet_ibn_x0_25", "resnet50_ibn_a"])
def test_no_map_is_kept_in_float32(name):
    model = models.build(name, image_size=SIZE, dtype="bfloat16", num_classes=3)
    params, stats = model.shapes()
    images = jax.ShapeDtypeStruct((BATCH, *SIZE, 3), jnp.float32)

    def kept(params, images):
        # The function that computes gradients is a tree; its leaves are the arrays it was given to keep.
        return jax.vjp(lambda p: model.apply(p, stats_of(stats), images, train=True)[0]["logits"], params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, params, images))
    # Smaller ones are statistics of images and channels.
    maps = [leaf for leaf in leaves if leaf.ndim >= 4 and BATCH in leaf.shape]
    assert len(maps) > 40
    assert {leaf.dtype for leaf in maps} <= {jnp.dtype(jnp.bfloat16), jnp.dtype(bool)}


def stats_of(shapes):
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
