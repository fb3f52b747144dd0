"""Features of every image of a split, over all devices, in the split's order."""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dmosnet_jax.core.parallel import by_rows, replicated, to_devices, to_host
from dmosnet_jax.data import augment
from dmosnet_jax.data.loading import ImageCache
from dmosnet_jax.data.pipeline import evaluation_batches
from dmosnet_jax.data.splits import Rows
from dmosnet_jax.data.transforms import DEFAULT_FILTER
from dmosnet_jax.models import Model
from dmosnet_jax.train.metrics import progress_bar

# Batches under way at once: enough to keep the devices busy while the host decodes, few enough to hold in memory.
_IN_FLIGHT = 4


class Extractor:
    """Test-time features of a model; compiled once, for any number of splits and weights."""

    def __init__(
        self,
        model: Model,
        mesh: Mesh,
        *,
        batch_size: int,
        threads: int = 2,
        workers: int = 0,
        interpolation: str = DEFAULT_FILTER,
        mean: Sequence[float] = augment.IMAGENET_MEAN,
        std: Sequence[float] = augment.IMAGENET_STD,
    ):
        """Prepares the program.

        Args:
            model: the network.
            mesh: the devices.
            batch_size: global batch size, rounded up to a multiple of the devices.
            threads: decoding threads per process.
            workers: decoding processes.
            interpolation: filter that resizes the images, a key of `transforms.FILTERS`.
            mean: per channel, in [0, 1] units.
            std: per channel, in [0, 1] units.
        """
        self._mesh, self._image_size, self._interpolation = mesh, model.image_size, interpolation
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._threads, self._workers = threads, workers

        def forward(params, stats, images):
            outputs, _ = model.apply(params, stats, augment.normalise(images, mean, std), train=False)
            return outputs["feature"]

        placed = by_rows(mesh)
        everywhere = replicated(mesh)
        self._forward = jax.jit(forward, in_shardings=(everywhere, everywhere, placed), out_shardings=placed)

    def __call__(
        self, params: Any, stats: Any, split: Rows, *, label: str = "extract", cache: ImageCache | None = None
    ) -> np.ndarray:
        """Features of all images.

        Args:
            params: parameter tree, on the host or on every device.
            stats: batch statistics tree.
            split: the images.
            label: of the progress bar.
            cache: decoded images of this split.

        Returns:
            float32 [N, E], not L2-normalised, the same on every process.

        Raises:
            DataError: a record or image can't be read.
        """
        params, stats = jax.device_put((params, stats), replicated(self._mesh))
        done: list[np.ndarray] = []
        with progress_bar(len(split), label=label) as bar:
            for features in in_batches(
                lambda images: self._forward(params, stats, images),
                split,
                self._mesh,
                image_size=self._image_size,
                interpolation=self._interpolation,
                batch_size=self._batch_size,
                threads=self._threads,
                workers=self._workers,
                cache=cache,
            ):
                done.append(features)
                bar.update(len(features))
        return np.concatenate(done)


def in_batches(
    program: Callable[[jax.Array], jax.Array],
    split: Rows,
    mesh: Mesh,
    *,
    image_size: tuple[int, int],
    interpolation: str,
    batch_size: int,
    threads: int,
    workers: int,
    cache: ImageCache | None = None,
) -> Iterator[np.ndarray]:
    """What a program gives for every image of a split, in order, while the next images are decoded.

    Args:
        program: from uint8 [B, H, W, 3] to [B, ...], both split by rows over the devices.
        split: the images.
        mesh: the devices.
        image_size: (H, W) in pixels.
        interpolation: filter that resizes, a key of `transforms.FILTERS`.
        batch_size: of the global batch; a multiple of the devices.
        threads: decoding threads per process.
        workers: decoding processes; not used with a cache.
        cache: decoded images of this split.

    Yields:
        [b, ...] with b = B but for the last batch, the same on every process.

    Raises:
        DataError: a record or image can't be read.
    """
    batches = evaluation_batches(
        split,
        image_size=image_size,
        interpolation=interpolation,
        batch_size=batch_size,
        threads=threads,
        workers=0 if cache is not None else workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        cache=cache,
    )
    left = len(split)
    waiting: collections.deque[jax.Array] = collections.deque()

    def oldest() -> np.ndarray:
        nonlocal left
        values = to_host(waiting.popleft())[:left]
        left -= len(values)
        return values

    for batch in batches:
        images = to_devices({"image": batch["image"]}, mesh)["image"]
        waiting.append(program(images))
        if len(waiting) > _IN_FLIGHT:
            yield oldest()
    while waiting:
        yield oldest()
