"""The catastrophic forgetting score of images (CFS; Luo et al., arXiv 2111.12084).

A proxy network embeds an image before and after its fine-tuning on labelled people; the cosine of the two embeddings is
the image's score. What fine-tuning does not forget is near to the people of re-identification data: higher is kept.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.parallel import by_rows, replicated
from dmosnet_jax.data import augment
from dmosnet_jax.data.splits import Rows
from dmosnet_jax.data.transforms import DEFAULT_FILTER
from dmosnet_jax.evaluation.extract import in_batches
from dmosnet_jax.models import Model


@dataclasses.dataclass(frozen=True)
class Proxy:
    """A network with its weights, and the statistics of the pixels that it was trained with."""

    model: Model
    params: Any
    stats: Any
    mean: Sequence[float] = augment.IMAGENET_MEAN
    std: Sequence[float] = augment.IMAGENET_STD


def cosine(first: jax.Array, second: jax.Array) -> jax.Array:
    """Cosine similarity of rows.

    Args:
        first: [B, E].
        second: [B, E].

    Returns:
        float32 [B] in [-1, 1]; 0 where one of the rows is 0.
    """
    if first.shape != second.shape:
        raise ValueError(f"embeddings of shapes {first.shape} and {second.shape} have no cosine")
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    lengths = jnp.linalg.norm(first, axis=1) * jnp.linalg.norm(second, axis=1)
    return jnp.clip(jnp.sum(first * second, axis=1) / jnp.maximum(lengths, np.float32(1e-12)), -1, 1)


class ForgettingScorer:
    """Scores images by two proxies in one program; compiled once."""

    def __init__(
        self,
        pretrained: Proxy,
        finetuned: Proxy,
        mesh: Mesh,
        *,
        interpolation: str = DEFAULT_FILTER,
        batch_size: int,
        threads: int = 2,
        workers: int = 0,
    ):
        """Places the weights on the devices.

        Args:
            pretrained: the network before fine-tuning.
            finetuned: the network after it, of the same image size and length of features.
            mesh: the devices.
            interpolation: filter that resizes the images, a key of `transforms.FILTERS`.
            batch_size: global batch size, rounded up to a multiple of the devices.
            threads: decoding threads per process.
            workers: decoding processes.
        """
        self._mesh, self._image_size, self._interpolation = mesh, pretrained.model.image_size, interpolation
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._threads, self._workers = threads, workers
        proxies = (pretrained, finetuned)
        everywhere, placed = replicated(mesh), by_rows(mesh)
        self._weights = jax.device_put([(proxy.params, proxy.stats) for proxy in proxies], everywhere)

        def forward(weights, images):
            features = []
            for proxy, (params, stats) in zip(proxies, weights, strict=True):
                pixels = augment.normalise(images, proxy.mean, proxy.std)
                features.append(proxy.model.apply(params, stats, pixels, train=False)[0]["feature"])
            return cosine(*features)

        self._forward = jax.jit(forward, in_shardings=(everywhere, placed), out_shardings=placed)

    def __call__(self, images: Rows) -> Iterator[np.ndarray]:
        """Scores in order, float32, batch by batch and the same on every process.

        Raises:
            DataError: an image can't be read, or has no score.
        """
        done = 0
        for scores in in_batches(
            lambda batch: self._forward(self._weights, batch),
            images,
            self._mesh,
            image_size=self._image_size,
            interpolation=self._interpolation,
            batch_size=self._batch_size,
            threads=self._threads,
            workers=self._workers,
        ):
            if not np.isfinite(scores).all():
                row = done + int(np.flatnonzero(~np.isfinite(scores))[0])
                raise DataError(
                    f"{images.name} image {row} ({images.record(row).filename}) has no score: an embedding is not "
                    "finite; check both checkpoints"
                )
            done += len(scores)
            yield scores
