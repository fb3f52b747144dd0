"""Features of every image of a split, over all devices, in the split's order."""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from dmosnet_jax.core.parallel import by_rows, replicated, to_devices, to_host
from dmosnet_jax.core.progress import announced
from dmosnet_jax.data import augment
from dmosnet_jax.data.loading import ImageCache
from dmosnet_jax.data.pipeline import evaluation_batches
from dmosnet_jax.data.splits import Rows
from dmosnet_jax.data.transforms import DEFAULT_FILTER
from dmosnet_jax.models import Model
from dmosnet_jax.train.metrics import progress_bar

# Batches under way at once: enough to keep the devices busy while the host decodes, few enough to hold in memory.
_IN_FLIGHT = 4


class BatchProgram:
    """A program over batches of images, compiled once, for any number of splits and weights."""

    def __init__(
        self,
        program: Callable[[Any, jax.Array], Any],
        mesh: Mesh,
        *,
        image_size: tuple[int, int],
        batch_size: int,
        interpolation: str = DEFAULT_FILTER,
        threads: int = 2,
        workers: int = 0,
    ):
        """Prepares the program.

        Args:
            program: from weights, the same on every device, and uint8 [B, H, W, 3] to an array or tree of [B, ...].
            mesh: the devices, over which batches are split by rows.
            image_size: (H, W) in pixels.
            batch_size: global batch size, rounded up to a multiple of the devices.
            interpolation: filter that resizes, a key of `transforms.FILTERS`.
            threads: decoding threads per process.
            workers: decoding processes; not used with a cache.
        """
        rows = by_rows(mesh)
        compiled = jax.jit(program, in_shardings=(replicated(mesh), rows), out_shardings=rows)
        self._program = announced(compiled, "the forward pass")
        self._mesh, self._workers = mesh, workers
        self._options: dict[str, Any] = {
            "image_size": image_size,
            "interpolation": interpolation,
            "batch_size": -(-batch_size // mesh.size) * mesh.size,
            "threads": threads,
        }

    def __call__(self, weights: Any, split: Rows, *, cache: ImageCache | None = None) -> Iterator[Any]:
        """The program's values for every image in order, computed while the next images are decoded.

        Args:
            weights: tree of arrays, on the host or on every device.
            split: the images.
            cache: decoded images of this split.

        Yields:
            [b, ...] with b = B but for the last batch, or a tree of them, the same on every process.

        Raises:
            DataError: a record or image can't be read.
        """
        weights = jax.device_put(weights, replicated(self._mesh))
        left = len(split)
        waiting: collections.deque[Any] = collections.deque()

        def oldest() -> Any:
            nonlocal left
            count = min(left, self._options["batch_size"])
            left -= count
            return jax.tree.map(lambda values: values[:count], to_host(waiting.popleft()))

        batches = evaluation_batches(
            split,
            workers=0 if cache is not None else self._workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            cache=cache,
            **self._options,
        )
        for batch in batches:
            images = to_devices({"image": batch["image"]}, self._mesh)["image"]
            waiting.append(self._program(weights, images))
            if len(waiting) > _IN_FLIGHT:
                yield oldest()
        while waiting:
            yield oldest()


class Extractor:
    """Test-time features of a model; compiled once, for any number of splits and weights."""

    def __init__(
        self,
        model: Model,
        mesh: Mesh,
        *,
        flip: bool = False,
        mean: Sequence[float] = augment.IMAGENET_MEAN,
        std: Sequence[float] = augment.IMAGENET_STD,
        **reading: Any,
    ):
        """Prepares the program.

        Args:
            model: the network.
            mesh: the devices.
            flip: a feature is the mean of the image's and of its mirror image's, as in fast-reid's flip test.
            mean: per channel, in [0, 1] units.
            std: likewise.
            **reading: `batch_size`, `interpolation`, `threads` and `workers` of `BatchProgram`.
        """

        def forward(weights, images):
            params, stats = weights
            pixels = augment.normalise(images, mean, std)

            def feature(pixels):
                return model.apply(params, stats, pixels, train=False)[0]["feature"]

            return (feature(pixels) + feature(pixels[:, :, ::-1])) / 2 if flip else feature(pixels)

        self._forward: Callable[..., Iterator[np.ndarray]] = BatchProgram(
            forward, mesh, image_size=model.image_size, **reading
        )

    def __call__(
        self, params: Any, stats: Any, split: Rows, *, label: str = "extract", cache: ImageCache | None = None
    ) -> Float32[np.ndarray, "n e"]:
        """Features of all images, not L2-normalised, the same on every process.

        Args:
            params: parameter tree, on the host or on every device.
            stats: batch statistics tree.
            split: the images.
            label: of the progress bar.
            cache: decoded images of this split.

        Raises:
            DataError: a record or image can't be read.
        """
        return np.concatenate(list(self.batches(params, stats, split, label=label, cache=cache)))

    def batches(
        self, params: Any, stats: Any, split: Rows, *, label: str = "extract", cache: ImageCache | None = None
    ) -> Iterator[Float32[np.ndarray, "b e"]]:
        """The same batch by batch, so that no process need keep them all."""
        with progress_bar(len(split), label=label) as bar:
            for features in self._forward((params, stats), split, cache=cache):
                yield features
                bar.update(len(features))
