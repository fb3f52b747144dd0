"""How many classes a memory has room for."""

import jax
import jax.numpy as jnp

from dmosnet_jax.memory import hybrid, placement
from dmosnet_jax.memory.hybrid import Memory


def with_capacity(memory: Memory, capacity: int | None, *, multiple: int = hybrid.PADDING) -> Memory:
    """The memory with empty class tables of another size; `set_labels` has to follow.

    Args:
        memory: state outside of `jax.jit`; what was compiled for it is compiled anew.
        capacity: as in `init`.
        multiple: as in `init`.
    """
    count, dim = hybrid.padded_rows(capacity or memory.num_rows, multiple), memory.features.shape[1]
    sums, counts = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((count, dim), (count,)))
    return memory.replace(
        class_sums=placement.zeros(sums, memory.class_sums.sharding),
        class_counts=placement.zeros(counts, memory.class_counts.sharding),
    )
