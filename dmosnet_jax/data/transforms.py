"""From encoded bytes to an RGB array of the network's size, on the host.

Both steps are Pillow's, so that imported weights score what they scored: torchreid, fast-reid and SpCL all decode with
Pillow, convert to RGB and resize with its bicubic filter.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

from dmosnet_jax.core.errors import DataError

# Nothing else is tried on untrusted bytes.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
# A header may claim any size; person crops are thousands of pixels.
MAX_PIXELS = 2**26


def decode(data: bytes) -> np.ndarray:
    """Decodes an image of any mode; transparency is dropped, 16-bit grey keeps its upper byte.

    Args:
      data: an encoded JPEG, PNG, BMP or WebP file.

    Returns:
      uint8 [h, w, 3] RGB.

    Raises:
      DataError: the bytes are not such an image, or are damaged or cut short. The caller knows the file and names it.
    """
    return np.asarray(_decode(data))


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes as `PIL.Image.resize((W, H), BICUBIC)` does, bit for bit.

    Args:
      image: uint8 [h, w, 3].
      size: (H, W) in pixels, height first.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ValueError: image is not uint8 [h, w, 3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 [h, w, 3], got {image.dtype}{list(image.shape)}")
    return np.asarray(_resize(Image.fromarray(image), size))


def load(data: bytes, size: tuple[int, int], change: Callable[[Image.Image], Image.Image] | None = None) -> np.ndarray:
    """`resize(decode(data), size)`, without the array in between.

    Args:
      data: an encoded image.
      size: (H, W) in pixels, height first.
      change: applied to the RGB image before it is resized.

    Returns:
      uint8 [H, W, 3] RGB.

    Raises:
      DataError: as `decode`.
    """
    image = _decode(data)
    return np.asarray(_resize(image if change is None else change(image), size))


def _decode(data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            image.load()
            return _to_rgb(image)
    except UnidentifiedImageError as error:
        raise DataError(f"not an image in one of the formats {', '.join(FORMATS)} ({len(data)} bytes)") from error
    # Pillow's decoders raise whatever a damaged file leads them to: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"damaged image ({len(data)} bytes): {reason}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    # Pillow warns when it drops a palette's transparency; dropping it is what is wanted.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    return image.resize((width, height), Image.Resampling.BICUBIC)
