"""How a batch moves rows of a table: momentum, unit length, repeated rows in the order of the batch."""

import jax
import jax.numpy as jnp
from jax import lax


def in_turn(rows: jax.Array, inputs: jax.Array, keys: jax.Array, momentum: float) -> tuple[jax.Array, jax.Array]:
    """Moves table rows towards a batch's inputs, repeated rows one time after the other.

    Args:
        rows: float32 [B, D], the table's row for each position; equal where `keys` are.
        inputs: float32 [B, D].
        keys: int32 [B], which row each position moves.
        momentum: share of the old row that stays.

    Returns:
        float32 [B, D] rows after the whole batch, again equal where `keys` are; int32 [B], the how-manieth move of its
        row each position is, from 0.
    """
    position = jnp.arange(keys.shape[0])
    same = keys[:, None] == keys[None, :]
    first = jnp.argmax(same, axis=1)
    turn = jnp.sum(same & (position[None, :] < position[:, None]), axis=1)

    def move(k, rows):
        moved = unit(momentum * rows[first] + (1.0 - momentum) * inputs)
        # Only the positions whose turn it is write; the others aim outside.
        return rows.at[jnp.where(turn == k, first, rows.shape[0])].set(moved, mode="drop")

    return lax.fori_loop(0, turn.max() + 1, move, rows)[first], turn


def unit(rows: jax.Array) -> jax.Array:
    """Rows scaled to unit length; zero rows stay zero."""
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
