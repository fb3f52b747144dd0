"""A network with its weights as StableHLO, by `jax.export`: it runs where JAX is, without this package.

    program = jax.export.deserialize(bytearray(pathlib.Path("model.stablehlo").read_bytes()))
    features = program.call(images)

`images` are uint8 RGB [B, H, W, 3] of the network's size, `features` float32 [B, E]; B is free. The program is lowered
for CPUs, CUDA GPUs and TPUs. JAX promises that a program can be read for six months after the version that wrote it
was released, and by versions up to three weeks older (https://docs.jax.dev/en/latest/export/export.html).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from dmosnet_jax.core import simd
from dmosnet_jax.core.trees import check
from dmosnet_jax.data import augment
from dmosnet_jax.models import Model

PLATFORMS = ("cpu", "cuda", "tpu")


def serialise(model: Model, params: Any, stats: Any, *, mean: Sequence[float], std: Sequence[float]) -> bytes:
    """The program's bytes.

    Args:
        model: the network.
        params: its parameters, which become constants of the program.
        stats: its batch statistics.
        mean: per channel, in [0, 1] units; the program normalises.
        std: likewise.

    Raises:
        DataError: the arrays are not the model's.
    """
    check(f"program of {model.name}", model.shapes(), (params, stats))
    weights = jax.tree.map(np.asarray, (params, stats))

    @jax.jit
    def features(images: jax.Array) -> jax.Array:
        return model.apply(weights[0], weights[1], augment.normalise(images, mean, std), train=False)[0]["feature"]

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *model.image_size, 3), jnp.uint8)
    # The paths of this machine's source files are left out of the program.
    name = "jax_traceback_in_locations_limit"
    limit = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        with simd.portable():
            return bytes(jax.export.export(features, platforms=PLATFORMS)(images).serialize())
    finally:
        jax.config.update(name, limit)
