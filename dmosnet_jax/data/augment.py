"""Augmentation on the device: pure functions of a key, part of the jitted training step.

Horizontal flip, zero padding with a random crop back to the input size, normalisation, random erasing, as in fast-reid
(`fastreid/data/transforms/build.py`) and SpCL (`examples/spcl_train_usl.py`), which differ in the last: see `ERASING`.
Every image has its own key, folded from its position in the global batch, so its augmentation depends neither on the
batch size nor on how the batch is sharded.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int32, Key, UInt8

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Erasing:
    """How a code base samples the rectangles of random erasing (Zhong et al. 2020) and what it fills them with.

    Attributes:
      area: share of the image, uniform between these.
      aspect: height over width, between these.
      log_aspect: the logarithm of the aspect is uniform instead of the aspect.
      attempts: shapes sampled until one is smaller than the image.
      fill: per channel, after normalisation.
    """

    area: tuple[float, float]
    aspect: tuple[float, float]
    log_aspect: bool
    attempts: int
    fill: tuple[float, float, float]


ERASING = {
    # torchvision's `RandomErasing`, which fast-reid calls with the pixel mean as its value: 0 once normalised.
    "fastreid": Erasing((0.02, 0.33), (0.3, 3.3), log_aspect=True, attempts=10, fill=(0.0, 0.0, 0.0)),
    # `spcl/utils/data/transforms.py`; it comes after the normalisation there, and fills with the mean all the same.
    "spcl": Erasing((0.02, 0.4), (0.3, 1 / 0.3), log_aspect=False, attempts=100, fill=IMAGENET_MEAN),
}


def normalise(
    images: UInt8[Array, "*batch 3"],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*batch 3"]:
    """`(images / 255 - mean) / std` of RGB images, computed in float32 whatever the dtype of the result.

    Args:
      images: RGB.
      mean: per channel, in [0, 1] units.
      std: per channel, in [0, 1] units, > 0.
      dtype: of the result.

    Raises:
      ValueError: images are not uint8 RGB, or mean or std do not have three values.
    """
    if images.dtype != jnp.uint8 or images.shape[-1:] != (3,):
        raise ValueError(f"images must be uint8 [..., 3], got {images.dtype}{list(images.shape)}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean={tuple(mean)} and std={tuple(std)} must be three values each, std positive")
    scale = np.asarray(1.0 / (255.0 * np.asarray(std, np.float64)), np.float32)
    shift = np.asarray(np.asarray(mean, np.float64) / np.asarray(std, np.float64), np.float32)
    broadcast = (1,) * (images.ndim - 1) + (3,)
    return (images.astype(jnp.float32) * scale.reshape(broadcast) - shift.reshape(broadcast)).astype(dtype)


def augment(
    key: Key[Array, ""],
    images: UInt8[Array, "b h w 3"],
    *,
    flip: float = 0.5,
    pad: int = 10,
    erase: float = 0.5,
    erasing: str = "fastreid",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Float32[Array, "b h w 3"]:
    """Flips, pads and crops, normalises and erases each image at random.

    Padding is black before normalisation. `flip=0, pad=0, erase=0` is exactly `normalise`. The options are Python
    values, fixed at tracing.

    Args:
      key: for this step.
      images: RGB, sharded over the batch or not.
      flip: probability of a horizontal flip.
      pad: pixels of zero padding on each side before a crop of H x W at a uniform offset.
      erase: probability of random erasing.
      erasing: whose, a key of `ERASING`.
      mean: see `normalise`.
      std: see `normalise`.

    Raises:
      ValueError: images are not uint8 [B, H, W, 3], or an option is out of range; raised while tracing.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be uint8 [B, H, W, 3], got {images.dtype}{list(images.shape)}")
    if not 0.0 <= flip <= 1.0 or not 0.0 <= erase <= 1.0 or pad < 0:
        raise ValueError(f"flip={flip} and erase={erase} must be in [0, 1], pad={pad} must not be negative")
    batch, height, width = images.shape[:3]
    keys = jax.vmap(jax.random.split, (0, None))(jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch)), 3)
    if flip > 0.0:
        flipped = jax.vmap(lambda k: jax.random.bernoulli(k, flip))(keys[:, 0])
        images = jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)
    if pad > 0:
        offsets = jax.vmap(lambda k: jax.random.randint(k, (2,), 0, 2 * pad + 1))(keys[:, 1])
        images = _pad_crop(images, offsets, pad)
    floats = normalise(images, mean, std)
    if erase > 0.0:
        kind = ERASING[erasing]
        rectangles = jax.vmap(lambda k: erase_rectangle(k, height, width, erase, kind))(keys[:, 2])
        fill = jnp.asarray(kind.fill, jnp.float32).reshape(1, 1, 1, 3)
        floats = jnp.where(_inside(rectangles, height, width)[..., None], fill, floats)
    return floats


def erase_rectangle(
    key: Key[Array, ""], height: int, width: int, probability: float, kind: Erasing
) -> Int32[Array, " 4"]:
    """Samples the rectangle to erase in an image: the first of `kind.attempts` shapes that is smaller than the image.

    Returns:
      Top, left, height, width; height and width are 0 with probability 1 - `probability`, or when no shape fits.
    """
    on_key, area_key, aspect_key, top_key, left_key = jax.random.split(key, 5)
    shapes = (kind.attempts,)
    area = jax.random.uniform(area_key, shapes, minval=kind.area[0], maxval=kind.area[1]) * (height * width)
    low, high = np.log(kind.aspect) if kind.log_aspect else kind.aspect
    aspect = jax.random.uniform(aspect_key, shapes, minval=low, maxval=high)
    if kind.log_aspect:
        aspect = jnp.exp(aspect)
    heights = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits)
    erase = jax.random.bernoulli(on_key, probability) & fits[first]
    h = jnp.where(erase, heights[first], 0)
    w = jnp.where(erase, widths[first], 0)
    top = jax.random.randint(top_key, (), 0, height - h + 1)
    left = jax.random.randint(left_key, (), 0, width - w + 1)
    return jnp.stack([top, left, h, w])


def _pad_crop(images: UInt8[Array, "b h w 3"], offsets: Int32[Array, "b 2"], pad: int) -> UInt8[Array, "b h w 3"]:
    """Images padded by `pad` and cropped at offsets (rows, columns)."""
    _, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    # One whole-image slice per image: 5 ms for 64 x 256 x 128 on two CPU cores, a gather of pixels takes 15.
    def crop(image: Array, offset: Array) -> Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], jnp.int32(0)), (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


def _inside(rectangles: Int32[Array, "b 4"], height: int, width: int) -> Bool[Array, "b h w"]:
    """Whether pixels are inside the rectangles."""
    top, left, h, w = (rectangles[:, i, None] for i in range(4))
    y = jnp.arange(height)[None, :]
    x = jnp.arange(width)[None, :]
    rows = (y >= top) & (y < top + h)
    columns = (x >= left) & (x < left + w)
    return rows[:, :, None] & columns[:, None, :]
