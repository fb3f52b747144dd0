"""In which precision sums, statistics and losses run."""

import jax
import jax.numpy as jnp


def wide_type(x: jax.Array) -> jnp.dtype:
    """float32 for compute in bfloat16 or float32; float64 stays, for comparisons with other implementations."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def widened(x: jax.Array) -> jax.Array:
    """The array in its `wide_type`."""
    return x.astype(wide_type(x))
