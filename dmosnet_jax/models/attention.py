"""Double-layer multi-head self-attention, the stream that DM-OSNet adds to OSNet.

Source: Zhou et al., Sensors 2022, 22, 6293, section 3.2, in the form the authors released (norms and biases that the
text leaves out); it is the hierarchical attention of Liu et al., "Transformer in Convolutional Neural Networks".
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dmosnet_jax.models.draws import Draws
from dmosnet_jax.models.layers import Conv, average_pool
from dmosnet_jax.models.norms import BatchNorm
from dmosnet_jax.models.precision import wide_type

HEAD_DIM = 32
GRID = 8


class Watched(NamedTuple):
    """What a second attention layer compared.

    Attributes:
        q: `[B, H * W, heads, dim]`, of every position.
        k: `[B, H / grid * W / grid, heads, dim]`, of the pooled map.
        size: (H, W).
        grid: size of a window.
    """

    q: jax.Array
    k: jax.Array
    size: tuple[int, int]
    grid: int


_WATCHED: contextvars.ContextVar[list[Watched] | None] = contextvars.ContextVar("watched", default=None)


@contextlib.contextmanager
def watching() -> Iterator[list[Watched]]:
    """Collects the second layer of every DL-MHSA that is traced inside, in the network's order."""
    token = _WATCHED.set([])
    watched = _WATCHED.get()
    assert watched is not None
    try:
        yield watched
    finally:
        _WATCHED.reset(token)


def weights_at(watched: Watched, place: tuple[float, float]) -> jax.Array:
    """What one position takes from each window of the pooled map.

    Args:
        watched: a layer.
        place: of the position, as shares of height and width in [0, 1).

    Returns:
        float32 `[B, heads, H / grid, W / grid]` with sum 1 over the windows.
    """
    (height, width), grid = watched.size, watched.grid
    position = int(place[0] * height) * width + int(place[1] * width)
    q, k = (x.astype(jnp.float32) for x in (watched.q[:, position], watched.k))
    weights = jax.nn.softmax(jnp.einsum("bhd,bmhd->bhm", q, k) * q.shape[-1] ** -0.5, axis=-1)
    return weights.reshape(*weights.shape[:2], height // grid, width // grid)


def head_count(channels: int) -> int:
    """Number of heads for a width: heads of 32 channels, as released, or the divisor that comes nearest to that.

    The released code does not build where 32 does not divide the width (x0.75, x0.25).
    """
    divisors = [h for h in range(1, channels + 1) if channels % h == 0]
    return min(divisors, key=lambda heads: (abs(channels / heads - HEAD_DIM), heads))


@jax.checkpoint
def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Scaled dot-product attention.

    Args:
        q: `[..., Q, heads, dim]`.
        k: `[..., K, heads, dim]`.
        v: `[..., K, heads, dim]`.

    Returns:
        `[..., Q, heads, dim]` in the dtype of `v`; the softmax runs in at least float32. For the gradient it is
        computed anew: kept, its weights would be the largest arrays of a training step.
    """
    scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    scores = jnp.einsum("...qhd,...khd->...hqk", q * scale, k, preferred_element_type=wide_type(q))
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, v)


def to_windows(x: jax.Array, grid: int) -> jax.Array:
    """`[B, H, W, C]` -> `[B, H/grid * W/grid, grid * grid, C]`."""
    batch, height, width, channels = x.shape
    tiles = x.reshape(batch, height // grid, grid, width // grid, grid, channels)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, grid * grid, channels)


def from_windows(x: jax.Array, height: int, width: int, grid: int) -> jax.Array:
    """Inverse of `to_windows`."""
    batch, channels = x.shape[0], x.shape[-1]
    tiles = x.reshape(batch, height // grid, width // grid, grid, grid, channels)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)


class DoubleLayerAttention(nnx.Module):
    """DL-MHSA: attention inside 8x8 windows, then from every position to the 8x8-pooled map, both with a residual."""

    def __init__(self, channels: int, *, group_size: int | None, rngs: Draws):
        self.norm = BatchNorm(channels, group_size=group_size)
        self.qkv = Conv(channels, 3 * channels, 1, bias=True, rngs=rngs)
        self.grid_norm = BatchNorm(channels, group_size=group_size)
        self.ds_norm = BatchNorm(channels, group_size=group_size)
        self.q = Conv(channels, channels, 1, bias=True, rngs=rngs)
        self.kv = Conv(channels, 2 * channels, 1, bias=True, rngs=rngs)
        self.proj = Conv(channels, channels, 1, bias=True, rngs=rngs)
        self.heads = head_count(channels)

    def _split(self, x: jax.Array, parts: int) -> list[jax.Array]:
        """`[..., parts * C]` -> `parts` arrays `[..., heads, C / heads]`."""
        split = x.reshape(*x.shape[:-1], parts, self.heads, -1)
        return [split[..., part, :, :] for part in range(parts)]

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[B, H, W, C]` to the same shape; H and W must be multiples of `GRID`."""
        batch, height, width, channels = x.shape
        qkv = to_windows(self.qkv(self.norm(x, train=train)), GRID)
        local = attend(*self._split(qkv, 3)).reshape((*qkv.shape[:-1], channels))
        local = self.grid_norm(x + from_windows(local, height, width, GRID), train=train)
        (q,) = self._split(self.q(local).reshape(batch, height * width, channels), 1)
        pooled = self.kv(self.ds_norm(average_pool(local, GRID), train=train))
        k, v = self._split(pooled.reshape(batch, -1, 2 * channels), 2)
        watched = _WATCHED.get()
        if watched is not None:
            watched.append(Watched(q, k, (height, width), GRID))
        spread = attend(q, k, v).reshape(x.shape)
        return self.proj(spread + local)
