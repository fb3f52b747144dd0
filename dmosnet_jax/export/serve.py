"""Features of a user's own images in Python: `dmosnet_jax.load(path)` gives an extractor.

import dmosnet_jax

extractor = dmosnet_jax.load("osnet_x0_25_market1501.pth")
features = extractor(["a.jpg", "b.jpg"], normalised=True)  # float32 [2, 512]
print(features @ features.T)  # cosine similarities
people = extractor(frame, boxes=[(10, 20, 60, 150)], order="bgr")  # of a detector, on a frame of OpenCV's
print(extractor.compare("a.jpg", "b.jpg").similarity)
"""

import dataclasses
import functools
import inspect
import numbers
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from dmosnet_jax.core import files
from dmosnet_jax.core.errors import ConfigError, DataError, printable
from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.data import augment, transforms
from dmosnet_jax.export import onnx_runtime
from dmosnet_jax.export.weights import fingerprint, open_weights
from dmosnet_jax.models import Model, build

Picture = np.ndarray | jax.Array | Image.Image | str | os.PathLike[str] | bytes | bytearray | memoryview
ORDERS = ("rgb", "bgr")
_MANY = "encoded bytes, PIL images or uint8 arrays"
_BOXES = "numbers [N, 4]: left, top, right, bottom"
_KINDS = "a path, encoded bytes, a PIL image, or a uint8 array [h, w, 3] or [h, w]"


class Extractor:
    """Maps images to features; compiled once for each power of two up to the batch size.

    It pickles with its weights, for worker processes.

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
        runtime: str = onnx_runtime.JAX,
    ):
        """Puts the weights on the default device.

        Raises:
            ConfigError: the batch size is not positive, or there is no such filter or runtime.
        """
        _check_batch_size(batch_size)
        onnx_runtime.check(runtime, model.dtype)
        if interpolation not in transforms.FILTERS:
            known = ", ".join(transforms.FILTERS)
            raise ConfigError(f"interpolation={interpolation!r} is not known: use one of {known}")
        self.model, self.mean, self.std, self.interpolation = model, tuple(mean), tuple(std), interpolation
        self.feature_dim, self.threshold = model.feature_dim, threshold
        self._batch_size, self._runtime = batch_size, runtime
        self._weights = jax.device_put((params, stats))
        self._compile()

    def _compile(self) -> None:
        model = self.model
        self._forward: Callable[..., Any]
        if self._runtime != onnx_runtime.JAX:
            features = onnx_runtime.compile_features(model, *self._weights, mean=self.mean, std=self.std)
            self._forward = lambda params, stats, images: features(images)
            return

        def forward(params, stats, images):
            pixels = augment.normalise(images, self.mean, self.std)
            return model.apply(params, stats, pixels, train=False)[0]["feature"]

        self._forward = jax.jit(forward)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name != "_forward"}
        # A model that has run holds functions, which do not pickle.
        return state | {"_weights": jax.tree.map(np.asarray, self._weights), "model": dataclasses.replace(self.model)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._weights = jax.device_put(self._weights)
        self._compile()

    @functools.cached_property
    def fingerprint(self) -> str:
        """What decides the features; a gallery has that of the weights that it was made with."""
        inputs: Any = {"mean": self.mean, "std": self.std, "interpolation": self.interpolation}
        return fingerprint(self.model, *self._weights, **inputs)

    def compare(self, first: Picture, second: Picture) -> "Comparison":
        """Whether two images show the same person.

        Args:
            first: one image, as for a call.
            second: likewise.

        Raises:
            DataError: an image can't be read, or is none of the kinds; says which one.
        """
        pair = self([first, second], normalised=True)
        return Comparison(float(pair[0] @ pair[1]), self.threshold)

    def __call__(
        self,
        images: Picture | Sequence[Picture],
        *,
        boxes: Any = None,
        order: str = "rgb",
        normalised: bool = False,
    ) -> np.ndarray:
        """Features of images, or of people in one image.

        Args:
            images: one image or many: paths, encoded files as bytes, PIL images, or uint8 arrays `[h, w, 3]` or, grey,
                `[h, w]`, of NumPy or JAX, mixed as you like; or one array `[N, h, w, 3]`. Any size: they are resized
                as for training.
            boxes: of people in the one image that is given, `[N, 4]`: left, top, right and bottom in pixels, right and
                bottom not included; fractions are rounded outwards, and what is outside of the image is cut off.
            order: of the channels of arrays, "rgb" or, as OpenCV has it, "bgr".
            normalised: scale each feature to unit length, so that products are cosines.

        Returns:
            float32 `[N, D]`, also for a single image.

        Raises:
            ConfigError: there is no such order, or boxes are given with several images.
            DataError: an image can't be read, or is none of the above, or a box is none in the image; says which one.
        """
        if order not in ORDERS:
            raise ConfigError(f"order={printable(order)!r} is not known: use one of {', '.join(ORDERS)}")
        pictures = _listed(images)
        if boxes is not None:
            if len(pictures) != 1:
                raise ConfigError(f"boxes are of one image, and {len(pictures)} are given: call once for each")
            pictures = _crops(_decoded(pictures[0], "images[0]", order), boxes)
            order = "rgb"
        done: list[np.ndarray] = []
        waiting: list[tuple[Any, int]] = []
        for batch in _batches(pictures, self._batch_size, self.model.image_size, self.interpolation, order):
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


def _fetched(features: np.ndarray | jax.Array, count: int) -> np.ndarray:
    return np.asarray(features, np.float32)[:count]


def _check_batch_size(batch_size: Any) -> None:
    if not isinstance(batch_size, numbers.Integral) or isinstance(batch_size, bool):
        raise ConfigError(f"batch_size={printable(batch_size)} must be a whole number")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")


def _listed(images: Any) -> Sequence[Picture]:
    if isinstance(images, np.ndarray | jax.Array) and 2 <= images.ndim <= 3 and images.dtype != object:
        return [images]
    if isinstance(images, str | os.PathLike | Image.Image | bytes | bytearray | memoryview):
        return [images]
    try:
        return list(images)
    except TypeError as error:
        raise DataError(f"images of type {type(images).__name__}: give paths, {_MANY}") from error


def _batches(
    pictures: Sequence[Picture], batch_size: int, size: tuple[int, int], interpolation: str, order: str
) -> Iterator[np.ndarray]:
    for start in range(0, len(pictures), batch_size):
        rows = range(start, min(start + batch_size, len(pictures)))
        yield np.stack([_pixels(pictures[row], size, interpolation, f"images[{row}]", order) for row in rows])


def _pixels(picture: Picture, size: tuple[int, int], interpolation: str, where: str, order: str) -> np.ndarray:
    """uint8 `[H, W, 3]` of the network's size."""
    return transforms.resize(_decoded(picture, where, order), size, interpolation)


def _decoded(picture: Picture, where: str, order: str) -> np.ndarray:
    """uint8 RGB `[h, w, 3]`."""
    if isinstance(picture, str | os.PathLike):
        where = f"{where}: {printable(picture)}"
        try:
            picture = files.read(picture, most=files.MAX_IMAGE_BYTES)
        except (OSError, ValueError) as error:
            # ValueError: a path with a zero character.
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{where}: can't be read ({reason}); check the path") from error
    if isinstance(picture, bytes | bytearray | memoryview):
        try:
            return transforms.decode(bytes(picture))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    if isinstance(picture, Image.Image):
        return _rgb(picture, where)
    if isinstance(picture, jax.Array):
        picture = np.asarray(picture)
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or not _is_image(picture.shape):
        kind = f"{picture.dtype}{list(picture.shape)}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise DataError(f"{where}: {kind}: give {_KINDS}")
    if 0 in picture.shape:
        raise DataError(f"{where}: {list(picture.shape)} is an empty image")
    if picture.ndim == 2:
        return np.repeat(picture[..., None], 3, axis=2)
    return picture[..., ::-1] if order == "bgr" else picture


def _is_image(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)


def _crops(image: np.ndarray, boxes: Any) -> list[np.ndarray]:
    """The parts of an image in boxes `[N, 4]`."""
    height, width = image.shape[:2]
    try:
        corners = np.asarray(boxes, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"boxes of type {type(boxes).__name__}: give {_BOXES}") from error
    corners = corners.reshape(-1, 4) if corners.shape in ((4,), (0,)) else corners
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise DataError(f"boxes {list(corners.shape)}: give {_BOXES}")
    crops = []
    for row, box in enumerate(corners):
        if not np.isfinite(box).all():
            raise DataError(f"boxes[{row}]: {box.tolist()} are not finite numbers")
        left, top = (int(max(value, 0)) for value in np.floor(box[:2]))
        right, bottom = (int(min(value, side)) for value, side in zip(np.ceil(box[2:]), (width, height), strict=True))
        if left >= right or top >= bottom:
            raise DataError(
                f"boxes[{row}]: {box.tolist()} (left, top, right, bottom) is no part of an image of {width} x {height}"
            )
        crops.append(image[top:bottom, left:right])
    return crops


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
    runtime: str = onnx_runtime.JAX,
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
        runtime: what computes, "jax", or "onnxruntime" where it is installed, which is faster on CPUs.
        **options: further options of `models.build`, such as `neck` or `variant`.

    Returns:
        The extractor.

    Raises:
        ConfigError: an unknown option, the runtime is not installed, or the network is not told.
        DataError: the weights can't be read, or are of another network.
    """
    _check_batch_size(batch_size)
    known = inspect.signature(build).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ConfigError(f"{', '.join(map(printable, unknown))}: no such option: use some of {', '.join(known)}")
    if image_size is not None and not _is_size(image_size):
        raise ConfigError(f"image_size={printable(image_size)} must be (height, width), e.g. (256, 128)")
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"path={printable(path)}: give the path of weights")
    weights = open_weights(path)
    try:
        model = weights.model(name=name, image_size=image_size, dtype=dtype, **options)
    except TypeError as error:
        raise ConfigError(f"{weights.path}: an option is of another type ({printable(error)})") from error
    return Extractor(
        model,
        *weights.arrays(model),
        mean=weights.mean,
        std=weights.std,
        interpolation=interpolation or weights.interpolation,
        batch_size=batch_size,
        threshold=weights.card.threshold if weights.card else None,
        runtime=runtime,
    )


def _is_size(value: Any) -> bool:
    try:
        sides = tuple(value)
    except TypeError:
        return False
    return len(sides) == 2 and all(isinstance(side, numbers.Integral) and int(side) > 0 for side in sides)
