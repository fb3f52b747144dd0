"""Features by onnxruntime on this host's CPUs, where it is installed: the same network, in less time than by XLA.

    pip install onnxruntime
    python -m dmosnet_jax.main --config=configs/evaluate.py --config.eval.runtime=onnxruntime ...

XLA's convolutions take most of the time of inference on CPUs; those of onnxruntime take less than half of that.
Features agree to about 1e-5 of a unit vector. Training is JAX's, whatever computes the features.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dmosnet_jax.core.errors import ConfigError, printable
from dmosnet_jax.core.kernels import thread_count
from dmosnet_jax.data import augment
from dmosnet_jax.data.loading import ImageCache
from dmosnet_jax.data.pipeline import evaluation_batches
from dmosnet_jax.data.splits import Rows
from dmosnet_jax.evaluation import extract
from dmosnet_jax.export import onnx_file
from dmosnet_jax.models import Model

JAX = "jax"
RUNTIMES = (JAX, "onnxruntime")

Features = Callable[[np.ndarray], np.ndarray]


def check(runtime: str, dtype: str, *, field: str = "runtime") -> None:
    """Sees that a runtime can compute features here.

    Args:
        runtime: one of `RUNTIMES`.
        dtype: of the network.
        field: what the caller names the runtime.

    Raises:
        ConfigError: there is no such runtime, it is not installed, or it does not fit the run.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f"{field}={printable(runtime)!r} is not known: use one of {', '.join(RUNTIMES)}")
    if runtime == JAX:
        return
    if dtype != "float32":
        raise ConfigError(f"{field}={runtime} computes in float32, not {dtype}: leave out one of the two")
    if jax.process_count() > 1:
        raise ConfigError(f"{field}={runtime} is for one process, not {jax.process_count()}: use {JAX}")
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{field}={runtime} is not installed: pip install onnxruntime") from error


def compile_features(
    model: Model,
    params: Any,
    stats: Any,
    *,
    mean: Sequence[float] = augment.IMAGENET_MEAN,
    std: Sequence[float] = augment.IMAGENET_STD,
) -> Features:
    """A function from uint8 [B, H, W, 3] to features, float32 [B, D], of any length, on all of this process's cores.

    Args:
        model: the network.
        params: parameter tree.
        stats: batch statistics tree.
        mean: per channel, in [0, 1] units.
        std: likewise.
    """
    import onnxruntime

    params, stats = jax.tree.map(np.asarray, (params, stats))
    data = onnx_file.serialise(model, params, stats, input="byte", normalise=False, mean=mean, std=std, properties={})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = thread_count()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def features(images: np.ndarray) -> np.ndarray:
        planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32)
        return session.run(None, {"images": planes})[0]

    return features


class Extractor(extract.Extractor):
    """As `evaluation.extract.Extractor`, by onnxruntime."""

    def __init__(
        self,
        model: Model,
        *,
        workers: int = 0,
        flip: bool = False,
        mean: Sequence[float] = augment.IMAGENET_MEAN,
        std: Sequence[float] = augment.IMAGENET_STD,
        **reading: Any,
    ):
        """Takes what the other extractor takes, but for devices; `reading`: batch size, threads, interpolation."""
        self._model, self._workers, self._flip = model, workers, flip
        self._inputs: dict[str, Any] = {"mean": mean, "std": std}
        self._options: dict[str, Any] = {"image_size": model.image_size, **reading}
        self._forward = self._batches
        self._compiled: tuple[Any, Features] | None = None

    def _features(self, weights: Any) -> Features:
        """Kept while the weights are the same, as for the query and the gallery."""
        leaves = jax.tree.leaves(weights)
        if self._compiled is None or any(a is not b for a, b in zip(self._compiled[0], leaves, strict=True)):
            self._compiled = leaves, compile_features(self._model, *weights, **self._inputs)
        return self._compiled[1]

    def _batches(self, weights: Any, split: Rows, *, cache: ImageCache | None) -> Iterator[np.ndarray]:
        features = self._features(weights)
        workers = 0 if cache is not None else self._workers
        for batch in evaluation_batches(split, workers=workers, cache=cache, **self._options):
            images = batch["image"][batch["mask"]]
            yield (features(images) + features(images[:, :, ::-1])) / 2 if self._flip else features(images)
