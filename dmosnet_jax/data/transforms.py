"""From encoded bytes to an RGB array of the network's size, on the host.

All steps are Pillow's or equal them bit for bit (`data/resampling.py`), so that imported weights score what they
scored: torchreid, fast-reid, SpCL and OpenUnReID all decode with Pillow, convert to RGB and resize. They differ in the
filter that resizes: torchreid's is torchvision's default, bilinear; that of the others is bicubic. An image is turned
as its EXIF orientation says, as fast-reid's reader does (`fastreid/data/data_utils.py`); crops of the data sets have
none, photos of phones do.
"""

import io
import warnings
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from dmosnet_jax.core.errors import ArgumentError, DataError
from dmosnet_jax.data import resampling

# Nothing else is tried on untrusted bytes.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
# A header may claim any size; person crops are thousands of pixels.
MAX_PIXELS = 2**26
# Filters by the name that a config has.
FILTERS = tuple(resampling.FILTERS)
DEFAULT_FILTER = "bicubic"

# Of each EXIF orientation but the upright one (1): https://www.cipa.jp/std/documents/download_e.html?DC-008, 4.6.5.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Its only use here is EXIF blocks, and a damaged one costs an image its orientation, nothing else.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes a JPEG, PNG, BMP or WebP file to upright RGB; transparency is dropped, 16-bit grey keeps its upper byte.

    Raises:
      DataError: the bytes are not such an image, or are damaged or cut short. The caller knows the file and names it.
    """
    return np.asarray(_decode(data))


def resize(
    image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], interpolation: str = DEFAULT_FILTER
) -> UInt8[np.ndarray, "height width 3"]:
    """Resizes to (height, width) by one of `FILTERS` as `PIL.Image.resize` does, bit for bit.

    Raises:
      ConfigError: image is not uint8 [h, w, 3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ArgumentError(f"image must be uint8 [h, w, 3], got {image.dtype}{list(image.shape)}")
    return resampling.resize(image, size, interpolation)


def load(
    data: bytes,
    size: tuple[int, int],
    interpolation: str = DEFAULT_FILTER,
    change: Callable[[Image.Image], Image.Image] | None = None,
) -> UInt8[np.ndarray, "height width 3"]:
    """`resize(decode(data), size, interpolation)`, with `change` applied to the RGB image in between.

    Raises:
      DataError: as `decode`.
    """
    image = _decode(data)
    return resampling.resize(np.asarray(image if change is None else change(image)), size, interpolation)


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; itself where that is not there, or can't be read."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Pillow's parser raises whatever a damaged block leads it to.
        return image
    return image if turn is None else image.transpose(turn)


def _decode(data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            image.load()
            return _to_rgb(upright(image))
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
