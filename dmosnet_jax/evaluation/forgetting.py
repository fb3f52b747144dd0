"""The catastrophic forgetting score of images (CFS; Luo et al., arXiv 2111.12084).

A proxy network embeds an image before and after its fine-tuning on labelled people; the cosine of the two embeddings is
the image's score. Images whose embedding changes little resemble re-identification data: high scores are kept.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Float32

from dmosnet_jax.core.errors import ArgumentError, DataError
from dmosnet_jax.core.parallel import replicated
from dmosnet_jax.data import augment
from dmosnet_jax.data.splits import Rows
from dmosnet_jax.evaluation.extract import BatchProgram
from dmosnet_jax.models import Model


@dataclasses.dataclass(frozen=True)
class Proxy:
    """A network with its weights, and the statistics of the pixels that it was trained with."""

    model: Model
    params: Any
    stats: Any
    mean: Sequence[float] = augment.IMAGENET_MEAN
    std: Sequence[float] = augment.IMAGENET_STD


def cosine(first: Float[Array, "b e"], second: Float[Array, "b e"]) -> Float32[Array, " b"]:
    """Cosine similarity of rows, in [-1, 1]; 0 where one of the rows is 0."""
    for array in (first, second):
        if not isinstance(array, np.ndarray | Array) or array.ndim != 2:
            raise ArgumentError(
                f"embeddings of shape {np.shape(array)} have no cosine: give arrays [images, dimension]"
            )
    if first.shape != second.shape:
        raise ArgumentError(f"embeddings of shapes {first.shape} and {second.shape} have no cosine")
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    lengths = jnp.linalg.norm(first, axis=1) * jnp.linalg.norm(second, axis=1)
    return jnp.clip(jnp.sum(first * second, axis=1) / jnp.maximum(lengths, np.float32(1e-12)), -1, 1)


class ForgettingScorer:
    """Scores images by two proxies in one program; compiled once."""

    def __init__(self, pretrained: Proxy, finetuned: Proxy, mesh: Mesh, **reading: Any):
        """Places the weights on the devices.

        Args:
            pretrained: the network before fine-tuning.
            finetuned: the network after it, of the same image size and length of features.
            mesh: the devices.
            **reading: `batch_size`, `interpolation`, `threads` and `workers` of `extract.BatchProgram`.
        """
        proxies = (pretrained, finetuned)
        self._weights = jax.device_put([(proxy.params, proxy.stats) for proxy in proxies], replicated(mesh))

        def forward(weights, images):
            features = []
            for proxy, (params, stats) in zip(proxies, weights, strict=True):
                pixels = augment.normalise(images, proxy.mean, proxy.std)
                features.append(proxy.model.apply(params, stats, pixels, train=False)[0]["feature"])
            return cosine(*features)

        self._forward = BatchProgram(forward, mesh, image_size=pretrained.model.image_size, **reading)

    def __call__(self, images: Rows) -> Iterator[np.ndarray]:
        """Scores in order, float32, batch by batch and the same on every process.

        Raises:
            DataError: an image can't be read, or has no score.
        """
        done = 0
        for scores in self._forward(self._weights, images):
            if not np.isfinite(scores).all():
                row = done + int(np.flatnonzero(~np.isfinite(scores))[0])
                raise DataError(
                    f"{images.name} image {row} ({images.record(row).filename}) has no score: an embedding is not "
                    "finite; check both checkpoints"
                )
            done += len(scores)
            yield scores
