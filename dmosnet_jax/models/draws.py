"""Initial values of parameters, drawn on the host.

A network has hundreds of parameters of dozens of shapes: drawn by JAX, each shape is a program of its own to compile,
which takes longer on CPU than a short training run.
"""

import jax
import numpy as np


class Draws:
    """A stream of initial values; without a key it gives zeros, for shapes alone."""

    def __init__(self, key: jax.Array | None = None):
        """Starts the stream of a key: equal keys give equal values, on any device.

        Args:
            key: a concrete `jax.random` key.
        """
        self._generator = None if key is None else np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def normal(self, shape: tuple[int, ...], std: float) -> np.ndarray:
        """float32 values of mean 0 and the given standard deviation."""
        if self._generator is None:
            return np.zeros(shape, np.float32)
        return (std * self._generator.standard_normal(shape, np.float32)).astype(np.float32)
