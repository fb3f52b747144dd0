"""Identity classification: cross-entropy with label smoothing, circle-softmax logits, and top-1 accuracy."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from dmosnet_jax.core import arguments
from dmosnet_jax.core.errors import ArgumentError


def cross_entropy(
    logits: Float[Array, "b c"],
    labels: Int[Array, " b"],
    *,
    epsilon: float = 0.1,
    mask: Bool[Array, " b"] | None = None,
) -> Float32[Array, ""]:
    """Mean cross-entropy against smoothed labels.

    The smoothing is fast-reid's (`fastreid/modeling/losses/cross_entroy_loss.py`): the target keeps `1 - epsilon` and
    each of the other C - 1 classes gets `epsilon / (C - 1)`. Szegedy et al. 2016 (and torchreid) spread epsilon over C.

    Args:
      logits: of any float dtype; computed in float32.
      labels: in [0, C). Another value makes the loss NaN, because a traced value cannot raise: the training loop stops
        on it, where a silently absent target would teach the model nonsense.
      epsilon: smoothing mass, in [0, 1).
      mask: False rows count for nothing (their labels may be anything); all rows count when None.

    Returns:
      The mean over the counted rows, 0 when there are none.

    Raises:
      ConfigError: shapes or dtypes do not fit, or epsilon is outside [0, 1); raised while tracing.
    """
    _check(logits, labels, mask)
    classes = logits.shape[1]
    if not 0.0 <= arguments.number("cross_entropy: epsilon", epsilon) < 1.0:
        raise ArgumentError(f"cross_entropy: epsilon={epsilon} is outside [0, 1)")
    if epsilon > 0.0 and classes < 2:
        raise ArgumentError(f"cross_entropy: logits of shape {logits.shape} leave no other class to smooth over")
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=1)
    # A comparison instead of a gather: it stays local when the batch is sharded, and labels out of range hit nothing.
    hits = labels[:, None] == jnp.arange(classes, dtype=labels.dtype)[None, :]
    target = jnp.sum(jnp.where(hits, log_probs, 0.0), axis=1)
    loss = -(1.0 - epsilon) * target
    if epsilon > 0.0:
        loss -= epsilon / (classes - 1) * (jnp.sum(log_probs, axis=1) - target)
    loss = jnp.where(jnp.any(hits, axis=1), loss, jnp.nan)
    return _mean(loss, mask)


def circle_logits(
    cosines: Float[Array, "b c"], labels: Int[Array, " b"], *, scale: float = 64.0, margin: float = 0.35
) -> Float32[Array, "b c"]:
    """Logits of the circle softmax (Sun et al. 2020, "Circle Loss", eq. 7, with class weights as proxies).

    Follows fast-reid's `CircleSoftmax` (`fastreid/layers/any_softmax.py`): with cosine s, the target's logit is
    `scale * max(1 + margin - s, 0) * (s - 1 + margin)` and another class's `scale * max(s + margin, 0) * (s - margin)`;
    the factors with max carry no gradient. Give the result to `cross_entropy`, and the cosines to `accuracy`.

    Args:
      cosines: in [-1, 1]; computed in float32.
      labels: in [0, C); a row with another value has no target.
      scale: temperature, > 0.
      margin: > 0.

    Raises:
      ConfigError: shapes or dtypes do not fit, or scale or margin is not positive; raised while tracing.
    """
    _check(cosines, labels, None)
    for name, value in (("scale", scale), ("margin", margin)):
        arguments.number(f"circle_logits: {name}", value)
    if not (scale > 0.0 and margin > 0.0):
        raise ArgumentError(f"circle_logits: scale={scale} and margin={margin} must be positive")
    cosines = cosines.astype(jnp.float32)
    fixed = jax.lax.stop_gradient(cosines)
    target = jnp.maximum(1.0 + margin - fixed, 0.0) * (cosines - (1.0 - margin))
    other = jnp.maximum(fixed + margin, 0.0) * (cosines - margin)
    hits = labels[:, None] == jnp.arange(cosines.shape[1], dtype=labels.dtype)[None, :]
    return scale * jnp.where(hits, target, other)


def accuracy(
    logits: Float[Array, "b c"], labels: Int[Array, " b"], *, mask: Bool[Array, " b"] | None = None
) -> Float32[Array, ""]:
    """Fraction of rows whose largest logit is the label's, 0 when no row counts; False rows of a mask do not.

    Raises:
      ConfigError: shapes or dtypes do not fit; raised while tracing.
    """
    _check(logits, labels, mask)
    right = jnp.argmax(logits, axis=1).astype(labels.dtype) == labels
    return _mean(right.astype(jnp.float32), mask)


def _check(logits: jax.Array, labels: jax.Array, mask: jax.Array | None) -> None:
    arguments.arrays(logits=logits, labels=labels)
    if logits.ndim != 2 or 0 in logits.shape or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ArgumentError(f"logits must be floating point [B, C], not empty, got {logits.dtype}{list(logits.shape)}")
    if labels.shape != logits.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ArgumentError(f"labels must be integers [{logits.shape[0]}], got {labels.dtype}{list(labels.shape)}")
    if mask is not None and (mask.shape != logits.shape[:1] or mask.dtype != jnp.bool_):
        raise ArgumentError(f"mask must be bool [{logits.shape[0]}], got {mask.dtype}{list(mask.shape)}")


def _mean(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    if mask is None:
        return jnp.mean(values)
    # where, not a product: 0 * NaN of a padded row would still be NaN.
    total = jnp.sum(jnp.where(mask, values, 0.0))
    return total / jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1.0)
