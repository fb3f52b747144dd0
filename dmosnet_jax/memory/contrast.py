"""Contrastive loss of a batch over a table of classes that is split over the devices."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int

from dmosnet_jax.core.parallel import AXIS
from dmosnet_jax.memory.tables import BY_ROWS, EVERYWHERE, read

# Classes visited at once: on a processor few enough to stay in its cache.
BLOCK, BLOCK_ON_CPU = 8192, 1024
# What SpCL's reference adds to the denominator and inside of the logarithm.
SPCL_EPSILON = 1e-6
# Below any logit, and finite: a difference of two of them is a number.
_LOWEST = -1e30
_EXACT = lax.Precision.HIGHEST


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def contrast(
    inputs: Float32[Array, "b d"],
    table: Float32[Array, "c d"],
    scale: Float32[Array, " c"],
    targets: Int[Array, " b"],
    mesh: Mesh,
    epsilon: float = SPCL_EPSILON,
) -> Float32[Array, ""]:
    """Mean of -log(p[target] + epsilon) with p = exp(z) / (sum of exp(z) + epsilon).

    With 1e-6 it is what SpCL's reference computes: an input whose p is far below that is hardly pulled. With 0 it is
    the cross-entropy. The logit z of a class is the product with its row, times its scale. Exponents are taken relative
    to the largest logit (epsilon with them), so any temperature is safe. Each device visits its own classes block by
    block and sums the gradient up on the same visit, so that neither pass holds [B, C]; devices exchange one maximum
    and one sum.

    Args:
        inputs: the value is differentiable once with respect to them.
        table: by rows over `mesh`; a constant to differentiation.
        scale: likewise; 0 for a class that takes no part.
        targets: class of each input.
        mesh: the devices.
        epsilon: see above.
    """
    return _value_and_gradient(inputs, table, scale, targets, mesh, epsilon)[0]


def _forward(inputs, table, scale, targets, mesh, epsilon):
    value, gradient = _value_and_gradient(inputs, table, scale, targets, mesh, epsilon)
    # The value depends on the gradient too: an update that waits for it no longer races the reading of the table.
    return jnp.where(jnp.isfinite(gradient).all(), value, jnp.nan), gradient


def _backward(_mesh, _epsilon, gradient, cotangent):
    return cotangent * gradient, None, None, None


contrast.defvjp(_forward, _backward)


def _value_and_gradient(inputs, table, scale, targets, mesh, epsilon):
    block = BLOCK_ON_CPU if mesh.devices.flat[0].platform == "cpu" else BLOCK
    run = jax.shard_map(
        functools.partial(_local, block=block, epsilon=epsilon),
        mesh=mesh,
        in_specs=(EVERYWHERE, BY_ROWS, BY_ROWS, EVERYWHERE),
        out_specs=EVERYWHERE,
    )
    return run(inputs, table, scale, targets)


def _local(inputs, table, scale, targets, *, block, epsilon):
    """Value and gradient, from this device's classes and what the others found in theirs."""
    # Starting the running maximum at 0 keeps exp(-top), which scales epsilon, from overflowing.
    top, total, pull = _visit_blocks(inputs, table, scale, block, 0.0 if epsilon else _LOWEST)
    own = read(table, targets) * read(scale, targets)[:, None]
    highest = lax.pmax(top, AXIS)
    shrink = jnp.exp(top - highest)[:, None]
    summed = lax.psum(jnp.concatenate([total[:, None] * shrink, pull * shrink, own], axis=1), AXIS)
    total, pull, own = jnp.split(summed, [1, 1 + inputs.shape[1]], axis=1)
    logit, total = (inputs * own).sum(axis=1) - highest, total[:, 0]
    if not epsilon:
        return (jnp.log(total) - logit).mean(), (pull / total[:, None] - own) / inputs.shape[0]
    total = total + epsilon * jnp.exp(-highest)
    probability = jnp.exp(logit) / total
    value = -jnp.log(probability + epsilon).mean()
    strength = probability / (probability + epsilon) / inputs.shape[0]
    return value, strength[:, None] * (pull / total[:, None] - own)


def _visit_blocks(inputs, table, scale, block, lowest):
    """Over a device's classes: largest logit [B], sum of exponents relative to it [B], of rows so weighted [B, D]."""
    classes = table.shape[0]
    block = min(block, classes)

    def visit(j, carry):
        top, total, pull = carry
        # The last block may begin among classes that were visited already; those don't count again.
        start = jnp.minimum(j * block, classes - block)
        rows = lax.dynamic_slice_in_dim(table, start, block)
        factor = lax.dynamic_slice_in_dim(scale, start, block)
        factor = jnp.where(start + jnp.arange(block) >= j * block, factor, 0.0)[None, :]
        logits = jnp.matmul(inputs, rows.T, precision=_EXACT) * factor
        logits = jnp.where(factor > 0, logits, -jnp.inf)
        higher = jnp.maximum(top, logits.max(axis=1))
        shrink = jnp.exp(top - higher)
        weight = jnp.exp(logits - higher[:, None])
        total = total * shrink + weight.sum(axis=1)
        pull = pull * shrink[:, None] + jnp.matmul(weight * factor, rows, precision=_EXACT)
        return higher, total, pull

    zeros = jnp.zeros(inputs.shape[:1], jnp.float32)
    start = lax.pcast((jnp.full_like(zeros, lowest), zeros, jnp.zeros_like(inputs)), AXIS, to="varying")
    return lax.fori_loop(0, -(-classes // block), visit, start)
