"""In which precision sums, statistics and losses run."""

import contextlib

import jax
import jax.numpy as jnp

_FULL = "highest"


def wide_type(x: jax.Array) -> jnp.dtype:
    """float32 for compute in bfloat16 or float32; float64 stays, for comparisons with other implementations."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def widened(x: jax.Array) -> jax.Array:
    """The array in its `wide_type`."""
    return x.astype(wide_type(x))


def full_precision() -> contextlib.AbstractContextManager[object]:
    """Products of float32 arrays are computed in float32, also where the device would round their inputs first.

    By default TPUs take bfloat16 and GPUs TF32, and a published network would not score what it scored. On arrays of
    another dtype it has no effect.
    """
    return jax.default_matmul_precision(_FULL)


def is_full_precision() -> bool:
    """Whether the code being traced is inside of `full_precision`."""
    return jax.config.jax_default_matmul_precision == _FULL  # type: ignore[attr-defined]
