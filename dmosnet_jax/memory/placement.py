"""Padded tables made directly where they belong: no device ever holds a whole table that is sharded."""

import jax
import jax.numpy as jnp
import numpy as np


def zeros(like: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.Array:
    """A table of zeros, made on its devices."""
    return jax.jit(lambda: jnp.zeros(like.shape, like.dtype), out_shardings=place)()


def place_padded(
    rows: np.ndarray | jax.Array, like: jax.ShapeDtypeStruct, place: jax.sharding.Sharding, fill: int = 0
) -> jax.Array:
    """The rows, padded to the table's length, on their devices.

    Args:
        rows: [N, ...], NumPy (with several processes the same in each), or a jax array.
        like: shape and dtype of the table, at least N long.
        place: sharding over the first dimension, or none; each device receives its own part only.
        fill: value of the padding.
    """
    if isinstance(rows, jax.Array):
        widths = [(0, like.shape[0] - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1)
        return jax.jit(lambda x: jnp.pad(x.astype(like.dtype), widths, constant_values=fill), out_shardings=place)(rows)

    def part(index):
        start, stop, _ = index[0].indices(like.shape[0])
        piece = np.full((stop - start, *like.shape[1:]), fill, like.dtype)
        real = rows[start:stop]
        piece[: real.shape[0]] = real
        return piece

    return jax.make_array_from_callback(like.shape, place, part)
