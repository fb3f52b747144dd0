"""Activation maps: where in an image the features come from.

Source: torchreid's `tools/visualize_actmap.py`, after Zagoruyko & Komodakis, "Paying More Attention to Attention"; the
paper's Figure 7 is made by it.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image, ImageDraw

from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.core.progress import announced
from dmosnet_jax.data import augment, transforms
from dmosnet_jax.models import Model

_BATCH = 32
_GAP, _PAPER, _MARK = 8, "#ffffff", "#ffffff"
# What the map covers of the picture, as in the source.
_SHARE = 0.7


def last_map(
    model: Model, weights: tuple[Any, Any], images: jax.Array, *, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
    """The last convolutional map of images at test time.

    Args:
        model: the network.
        weights: its parameters and batch statistics.
        images: uint8 `[B, H, W, 3]`, of the network's size.
        mean: per channel, in [0, 1] units.
        std: likewise.

    Returns:
        `[B, h, w, C]`.
    """
    pixels = augment.normalise(images, mean, std)
    stages = model.apply(*weights, pixels, train=False, stages=True)[0]["stages"]
    return list(stages.values())[-1]


def activation_maps(features: jax.Array) -> jax.Array:
    """Sum of squares over the channels, of unit L2 length for each image.

    Args:
        features: `[B, h, w, C]`, the last convolutional map.

    Returns:
        float32 `[B, h, w]`.
    """
    energy = jnp.sum(jnp.square(features.astype(jnp.float32)), axis=-1)
    length = jnp.sqrt(jnp.sum(jnp.square(energy), axis=(1, 2), keepdims=True))
    return energy / jnp.maximum(length, 1e-12)


def maps_of(
    model: Model,
    weights: tuple[Any, Any],
    images: Sequence[bytes],
    *,
    interpolation: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> Float32[np.ndarray, "n h w"]:
    """`activation_maps` of a few encoded images, at least one, by XLA on one device of this process alone.

    Args:
        model: the network.
        weights: its parameters and batch statistics, on the host or on every device.
        images: encoded.
        interpolation: filter that resizes.
        mean: per channel, in [0, 1] units.
        std: likewise.

    Raises:
        DataError: an image can't be decoded.
    """
    # Copies on the host: arrays on the devices of several processes would need all of these.
    weights = jax.tree.map(np.asarray, weights)
    pixels = np.stack([transforms.load(image, model.image_size, interpolation) for image in images])
    batches = -(-len(pixels) // _BATCH)
    # One program: the last batch is filled with images that are there.
    padded = np.resize(pixels, (batches * _BATCH, *pixels.shape[1:]))
    jitted = jax.jit(lambda weights, images: activation_maps(last_map(model, weights, images, mean=mean, std=std)))
    program = announced(jitted, "the activation maps")
    return np.concatenate([program(weights, part) for part in np.split(padded, batches)])[: len(pixels)]


def coloured(values: Float[np.ndarray, "h w"], size: tuple[int, int]) -> UInt8[np.ndarray, "height width 3"]:
    """A map drawn at (height, width), from its lowest value in blue to its highest in red."""
    smooth = Image.fromarray(np.asarray(values, np.float32)).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    wide = np.asarray(smooth)
    scaled = (wide - wide.min()) / max(float(wide.max() - wide.min()), 1e-12)
    return (mpl.colormaps["jet"](scaled)[..., :3] * 255).round().astype(np.uint8)


def overlay(
    image: UInt8[np.ndarray, "height width 3"], drawn: UInt8[np.ndarray, "height width 3"]
) -> UInt8[np.ndarray, "height width 3"]:
    """The map over the picture."""
    return ((1 - _SHARE) * image + _SHARE * drawn).round().astype(np.uint8)


def write_panel(
    path: str | os.PathLike[str],
    image: UInt8[np.ndarray, "height width 3"],
    maps: Sequence[Float32[np.ndarray, "h w"]],
    *,
    mark: tuple[float, float] | None = None,
) -> None:
    """Draws the image, then for each map the map and both together, from left to right.

    Args:
        path: the `.png` file, which appears when it is complete.
        image: RGB.
        maps: of any sizes.
        mark: a place to mark in the image, as shares of height and width.
    """
    height, width, _ = image.shape
    first = Image.fromarray(image)
    if mark is not None:
        y, x = mark[0] * height, mark[1] * width
        radius = max(width / 24, 2)
        ImageDraw.Draw(first).ellipse((x - radius, y - radius, x + radius, y + radius), outline=_MARK, width=2)
    parts = [first]
    for values in maps:
        drawn = coloured(values, (height, width))
        parts += [Image.fromarray(drawn), Image.fromarray(overlay(image, drawn))]
    panel = Image.new("RGB", (len(parts) * (width + _GAP) - _GAP, height), _PAPER)
    for number, part in enumerate(parts):
        panel.paste(part, (number * (width + _GAP), 0))
    with atomic_write(path) as unfinished:
        panel.save(unfinished, "PNG", optimize=True)
