"""Features of a user's own images in Python: `dmosnet_jax.load(path)` gives an extractor.

import dmosnet_jax

extractor = dmosnet_jax.load("osnet_x0_25_market1501.pth")
features = extractor(["a.jpg", "b.jpg"], normalised=True)  # float32 [2, 512]
print(features @ features.T)  # cosine similarities
print(extractor.compare("a.jpg", "b.jpg").similarity)
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.data import augment, transforms
from dmosnet_jax.export.weights import fingerprint, open_weights
from dmosnet_jax.models import Model

Picture = np.ndarray | Image.Image | str | os.PathLike[str]


class Extractor:
    """Maps images to features; compiled once for each power of two up to the batch size.

    Attributes:
        model: the network.
        mean: per-channel mean of the pixels, in [0, 1] units.
        std: per-channel standard deviation of the pixels.
        interpolation: filter that resizes the images, "bilinear" or "bicubic".
        feature_dim: size of a feature.
        threshold: cosine similarity from which on two images are taken for one person; None where the weights have no
            card that says it.
        fingerprint: see `export.weights.fingerprint`.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        stats: Any,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str,
        batch_size: int,
        threshold: float | None = None,
    ):
        """Puts the weights on the default device.

        Raises:
            ConfigError: the batch size is not positive, or there is no such filter.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1")
        if interpolation not in transforms.FILTERS:
            known = ", ".join(transforms.FILTERS)
            raise ConfigError(f"interpolation={interpolation!r} is not known: use one of {known}")
        self.model, self.mean, self.std, self.interpolation = model, tuple(mean), tuple(std), interpolation
        self.feature_dim, self.threshold = model.feature_dim, threshold
        self._batch_size = batch_size
        self._weights = jax.device_put((params, stats))

        def forward(params, stats, images):
            pixels = augment.normalise(images, self.mean, self.std)
            return model.apply(params, stats, pixels, train=False)[0]["feature"]

        self._forward = jax.jit(forward)

    @functools.cached_property
    def fingerprint(self) -> str:
        """What decides the features; a gallery has that of the weights that it was made with."""
        inputs: Any = {"mean": self.mean, "std": self.std, "interpolation": self.interpolation}
        return fingerprint(self.model, *self._weights, **inputs)

    def compare(self, first: Picture, second: Picture) -> "Comparison":
        """Whether two images show the same person.

        Args:
            first: a path, a PIL image or a uint8 RGB array `[h, w, 3]`.
            second: likewise.

        Raises:
            DataError: an image can't be read, or is none of the above; says which one.
        """
        pair = self([first, second], normalised=True)
        return Comparison(float(pair[0] @ pair[1]), self.threshold)

    def __call__(self, images: Picture | Sequence[Picture], *, normalised: bool = False) -> np.ndarray:
        """Features of images.

        Args:
            images: one image or many: paths, PIL images, or uint8 RGB arrays `[h, w, 3]`, mixed as you like; or one
                array `[N, h, w, 3]`. Any size: they are resized as for training.
            normalised: scale each feature to unit length, so that products are cosines.

        Returns:
            float32 `[N, D]`, also for a single image.

        Raises:
            DataError: an image can't be read, or is none of the above; says which one.
        """
        pictures = _listed(images)
        done: list[np.ndarray] = []
        waiting: list[tuple[jax.Array, int]] = []
        for batch in _batches(pictures, self._batch_size, self.model.image_size, self.interpolation):
            # One batch ahead: the host reads images while the device computes.
            waiting.append((self._forward(*self._weights, _padded(batch, self._batch_size)), len(batch)))
            if len(waiting) > 1:
                done.append(_fetched(*waiting.pop(0)))
        done += [_fetched(*item) for item in waiting]
        features = np.concatenate(done) if done else np.zeros((0, self.feature_dim), np.float32)
        return unit_rows_np(features) if normalised else features


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How alike two images are.

    Attributes:
        similarity: cosine of their features.
        threshold: from which on they are taken for one person, or None where that is not known.
    """

    similarity: float
    threshold: float | None = None

    @property
    def same(self) -> bool | None:
        """Whether they are taken for one person; None without a threshold."""
        return None if self.threshold is None else self.similarity >= self.threshold


def _fetched(features: jax.Array, count: int) -> np.ndarray:
    return np.asarray(features, np.float32)[:count]


def _listed(images: Any) -> Sequence[Picture]:
    if isinstance(images, np.ndarray) and images.ndim == 3:
        return [images]
    if isinstance(images, str | os.PathLike | Image.Image):
        return [images]
    try:
        return list(images)
    except TypeError as error:
        raise DataError(f"images of type {type(images).__name__}: give paths, PIL images or uint8 arrays") from error


def _batches(
    pictures: Sequence[Picture], batch_size: int, size: tuple[int, int], interpolation: str
) -> Iterator[np.ndarray]:
    for start in range(0, len(pictures), batch_size):
        rows = range(start, min(start + batch_size, len(pictures)))
        yield np.stack([_pixels(pictures[row], size, interpolation, f"images[{row}]") for row in rows])


def _pixels(picture: Picture, size: tuple[int, int], interpolation: str, where: str) -> np.ndarray:
    """uint8 `[H, W, 3]` of the network's size."""
    if isinstance(picture, str | os.PathLike):
        try:
            return transforms.load(pathlib.Path(picture).read_bytes(), size, interpolation)
        except OSError as error:
            raise DataError(f"{where}: {picture}: can't be read ({error.strerror}); check the path") from error
        except DataError as error:
            raise DataError(f"{where}: {picture}: {error}") from error
    if isinstance(picture, Image.Image):
        return transforms.resize(_rgb(picture, where), size, interpolation)
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        kind = f"{picture.dtype}{list(picture.shape)}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise DataError(f"{where}: {kind}: give a path, a PIL image or a uint8 RGB array [h, w, 3]")
    if 0 in picture.shape:
        raise DataError(f"{where}: {list(picture.shape)} is an empty image")
    return transforms.resize(picture, size, interpolation)


def _rgb(image: Image.Image, where: str) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{where}: a PIL image of mode {image.mode}: convert it to RGB, scaled to 0..255")
    try:
        # A copy: Pillow warns when it drops a palette's transparency, and the caller keeps theirs.
        plain = transforms.upright(image).copy()
        plain.info.pop("transparency", None)
        return np.asarray(plain.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{where}: damaged PIL image: {' '.join(str(error).split())}") from error


def _padded(batch: np.ndarray, batch_size: int) -> np.ndarray:
    """Rounded up to a power of two, so that few programs serve any number of images."""
    rows = min(1 << (len(batch) - 1).bit_length(), batch_size)
    return np.concatenate([batch, np.zeros((rows - len(batch), *batch.shape[1:]), np.uint8)])


def load(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    image_size: Sequence[int] | None = None,
    interpolation: str | None = None,
    dtype: str = "float32",
    batch_size: int = 64,
    **options: Any,
) -> Extractor:
    """Opens weights for feature extraction.

    Args:
        path: an exported folder, a run's workdir or checkpoint, or a PyTorch or safetensors file.
        name: registry name of the network, for weights that don't tell it.
        image_size: (height, width), where not the weights' own or 256x128.
        interpolation: filter that resizes the images, "bilinear" or "bicubic", where not the weights' own.
        dtype: compute dtype, "float32" or "bfloat16".
        batch_size: images at once.
        **options: further options of `models.build`, such as `neck` or `variant`.

    Returns:
        The extractor.

    Raises:
        ConfigError: an unknown option, or the network is not told.
        DataError: the weights can't be read, or are of another network.
    """
    weights = open_weights(path)
    model = weights.model(name=name, image_size=image_size, dtype=dtype, **options)
    return Extractor(
        model,
        *weights.arrays(model),
        mean=weights.mean,
        std=weights.std,
        interpolation=interpolation or weights.interpolation,
        batch_size=batch_size,
        threshold=weights.card.threshold if weights.card else None,
    )
