"""Vectors of unit length: x / max(|x|, 1e-12), as PyTorch's `normalize`. A zero vector stays zero."""

import jax
import jax.numpy as jnp
import numpy as np

EPSILON = 1e-12


def unit_rows(x: jax.Array, axis: int = 1) -> jax.Array:
    """The vectors along an axis of a matrix, scaled; differentiable everywhere, zero vectors included."""
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    # The root has no gradient at zero: one zero vector would make the gradient of all parameters NaN.
    length = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return x / jnp.maximum(length, EPSILON)


def unit_rows_np(x: np.ndarray) -> np.ndarray:
    """`unit_rows` on the host: the rows of a matrix, scaled."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), EPSILON)
