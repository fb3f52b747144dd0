"""Batch-hard triplet loss (Hermans et al. 2017, "In Defense of the Triplet Loss", eq. 5) as fast-reid computes it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from dmosnet_jax.core import arguments
from dmosnet_jax.core.errors import ArgumentError


def batch_hard(
    embeddings: Float[Array, "b d"], pids: Int[Array, " b"], *, margin: float | None = 0.3
) -> Float32[Array, ""]:
    """Mean over anchors of the hinge (or softplus) of hardest positive minus hardest negative Euclidean distance.

    Follows `fastreid/modeling/losses/triplet_loss.py` with hard mining: the anchor is among its own positives (an
    identity with a single image has positive distance 0), and distances are `sqrt(max(d^2, 1e-12))`, whose gradient at
    coincident embeddings is 0, not infinite. An anchor without a negative in the batch, where fast-reid fails, adds 0.

    Args:
      embeddings: before BNNeck; computed in float32.
      pids: identities.
      margin: hinge margin, > 0; None for the soft margin `log(1 + exp(d_ap - d_an))`.

    Returns:
      The mean over all anchors.

    Raises:
      ConfigError: shapes or dtypes do not fit, or the margin is not positive; raised while tracing.
    """
    arguments.arrays(embeddings=embeddings, pids=pids)
    if embeddings.ndim != 2 or 0 in embeddings.shape or not jnp.issubdtype(embeddings.dtype, jnp.floating):
        raise ArgumentError(
            f"embeddings must be floating point [B, D], not empty, got {embeddings.dtype}{list(embeddings.shape)}"
        )
    if pids.shape != embeddings.shape[:1] or not jnp.issubdtype(pids.dtype, jnp.integer):
        raise ArgumentError(f"pids must be integers [{embeddings.shape[0]}], got {pids.dtype}{list(pids.shape)}")
    if margin is not None and not arguments.number("batch_hard: margin", margin) > 0.0:
        raise ArgumentError(f"margin={margin} must be positive, or None for the soft margin")
    distances = pairwise_distances(embeddings.astype(jnp.float32))
    same = pids[:, None] == pids[None, :]
    # The fill values lose every comparison and, being constants, take no gradient.
    hardest_positive = jnp.max(jnp.where(same, distances, 0.0), axis=1)
    hardest_negative = jnp.min(jnp.where(same, jnp.finfo(jnp.float32).max, distances), axis=1)
    difference = hardest_positive - hardest_negative
    per_anchor = jax.nn.softplus(difference) if margin is None else jax.nn.relu(difference + margin)
    return jnp.mean(jnp.where(jnp.all(same, axis=1), 0.0, per_anchor))


def pairwise_distances(embeddings: Float32[Array, "b d"]) -> Float32[Array, "b b"]:
    """Euclidean distances between all rows; at least 1e-6 everywhere."""
    squares = jnp.sum(jnp.square(embeddings), axis=1)
    # Subtracting nearly equal numbers: the reduced precision that accelerators default to would be all error.
    products = jnp.matmul(embeddings, embeddings.T, precision=jax.lax.Precision.HIGHEST)
    squared = squares[:, None] + squares[None, :] - 2.0 * products
    # Rounding leaves about 1e-7 |x|^2 on the diagonal, which the square root would turn into a visible distance.
    squared = jnp.where(jnp.eye(embeddings.shape[0], dtype=jnp.bool_), 0.0, squared)
    return jnp.sqrt(jnp.maximum(squared, 1e-12))
