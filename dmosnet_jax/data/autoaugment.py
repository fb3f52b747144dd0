"""AutoAugment's ImageNet policy (Cubuk et al. 2019, arXiv 1805.09501, table 9), on the host, before the resize.

Part of the training recipe that the authors of DM-OSNet released (fast-reid's `DO_AUTOAUG`, for a tenth of the images).
The operations are Pillow's; their ranges are the paper's table 6. The changes to an image depend on (seed, epoch, step,
position in the global batch) alone: not on threads, processes or on where a run was interrupted.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageEnhance, ImageOps

# Two operations with (probability, magnitude from 0 to 10) each.
POLICY = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 4), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 7)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 2)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 8), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 2)),
    (("equalize", 0.0, 7), ("equalize", 0.8, 8)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 9)),
    (("color", 0.4, 0), ("equalize", 0.6, 3)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
)
# Uncovered corners become mid-grey.
_FILL = (128, 128, 128)
_STREAM = 0xA0A0


def _signed(value: float, rng: np.random.Generator) -> float:
    return value if rng.random() < 0.5 else -value


def _filter(rng: np.random.Generator) -> Image.Resampling:
    return Image.Resampling.BICUBIC if rng.random() < 0.5 else Image.Resampling.BILINEAR


def _shear_x(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    matrix = (1, _signed(0.3 * level / 10, rng), 0, 0, 1, 0)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, _filter(rng), fillcolor=_FILL)


def _rotate(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    return image.rotate(_signed(30.0 * level / 10, rng), _filter(rng), fillcolor=_FILL)


def _solarize(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    del rng
    return ImageOps.solarize(image, int(256 * level / 10))


def _posterize(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    del rng
    return ImageOps.posterize(image, 4 + int(4 * level / 10))


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[..., Image.Image]:
    def apply(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
        del rng
        return kind(image).enhance(0.1 + 1.8 * level / 10)

    return apply


def _plain(function: Callable[[Image.Image], Image.Image]) -> Callable[..., Image.Image]:
    def apply(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
        del level, rng
        return function(image)

    return apply


OPERATIONS: dict[str, Callable[[Image.Image, int, np.random.Generator], Image.Image]] = {
    "shear_x": _shear_x,
    "rotate": _rotate,
    "solarize": _solarize,
    "posterize": _posterize,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "autocontrast": _plain(ImageOps.autocontrast),
    "equalize": _plain(ImageOps.equalize),
    "invert": _plain(ImageOps.invert),
}


@dataclasses.dataclass(frozen=True)
class AutoAugment:
    """Changes each image of an epoch with a probability; picklable, for worker processes."""

    probability: float
    seed: int
    epoch: int

    def chosen(self, step: int, batch_size: int) -> Bool[np.ndarray, " batch"]:
        """Which images of the global batch of a step are changed."""
        rng = np.random.default_rng((_STREAM, self.seed, self.epoch, step))
        return rng.random(batch_size) < self.probability

    def __call__(self, image: Image.Image, step: int, position: int) -> Image.Image:
        """Applies one of the policy's 25 pairs of operations to the image at a position of the global batch."""
        rng = np.random.default_rng((_STREAM, self.seed, self.epoch, step, position))
        for name, probability, level in POLICY[rng.integers(len(POLICY))]:
            if rng.random() < probability:
                image = OPERATIONS[name](image, level, rng)
        return image
