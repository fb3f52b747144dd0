"""Optimiser and learning-rate schedules of the paper, SpCL and fast-reid."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dmosnet_jax.core.config import duration_steps, read
from dmosnet_jax.core.errors import ConfigError


def learning_rate(
    config: Any, *, steps_per_epoch: int, total_steps: int, batch_size: int | None = None
) -> optax.Schedule:
    """The learning rate by step.

    Warm-up rises linearly from `warmup_factor` times the base rate. Then the rate changes at the ends of epochs: "step"
    multiplies it by `decay_factor` at each of `decay_epochs`; "cosine" holds the base rate until `decay_epochs[0]` and
    then goes along a half cosine, whose end (`final_factor` times the base rate) lies one epoch after the last;
    "constant" holds it.

    With `count_after_warmup`, as in fast-reid (`engine/hooks.py`, `LRScheduler.after_epoch`; `solver/build.py`), the
    epochs of "step" are counted from the end of the last epoch that lies within the warm-up, and a "cosine" does not
    begin before it. Where the warm-up ends amid epoch `decay_epochs[0]` or a later one, the cosine is as long as the
    epochs that the warm-up does not reach into, and the last epoch itself has the final rate.

    With `base_batch_size` the base rate is for batches of that size, and grows linearly with them (Goyal et al. 2017,
    "Accurate, Large Minibatch SGD"); where no warm-up is configured, larger ones rise to it within the first epoch.

    Args:
        config: the `optim` node: `learning_rate`, `base_batch_size`, `schedule`, `decay_epochs`, `decay_factor`,
            `final_factor`, `warmup_steps` or `warmup_epochs`, `warmup_factor`, `count_after_warmup`.
        steps_per_epoch: steps in an epoch.
        total_steps: steps of the run.
        batch_size: of the run; only needed with `base_batch_size`.

    Returns:
        int32 step -> float32 rate.
    """
    warmup, warmup_factor = duration_steps(config, "warmup", steps_per_epoch=steps_per_epoch) or 0, config.warmup_factor
    base_batch_size, scale = read(config, "base_batch_size"), 1.0
    if base_batch_size is not None:
        assert batch_size is not None
        scale = batch_size / base_batch_size
        if scale > 1 and not warmup:
            warmup, warmup_factor = steps_per_epoch, 1 / scale
    # Whole epochs inside of the warm-up, and those that it reaches into.
    within, reached = (
        (warmup // steps_per_epoch, -(-warmup // steps_per_epoch)) if config.count_after_warmup else (0, 0)
    )
    milestones = [within + epoch for epoch in config.decay_epochs]
    delay = config.decay_epochs[0] if config.decay_epochs else 0
    falling = max(total_steps // steps_per_epoch - max(reached, delay), 1)

    def schedule(step: jax.Array) -> jax.Array:
        at = jnp.asarray(step, jnp.float32)
        epoch = (jnp.asarray(step, jnp.int32) // steps_per_epoch).astype(jnp.float32)
        if config.schedule == "step":
            passed = sum(((epoch >= milestone).astype(jnp.float32) for milestone in milestones), jnp.float32(0.0))
            factor = jnp.float32(config.decay_factor) ** passed
        elif config.schedule == "cosine":
            done = jnp.clip((epoch - max(within, delay)) / falling, 0.0, 1.0)
            factor = config.final_factor + (1 - config.final_factor) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        else:
            factor = jnp.float32(1.0)
        rise = jnp.minimum(at / warmup, 1.0) if warmup else jnp.float32(1.0)
        return scale * config.learning_rate * factor * (warmup_factor + (1 - warmup_factor) * rise)

    return schedule


def make_optimiser(config: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adam or SGD with PyTorch's weight decay: added to the gradient, norms and biases included (FastReID, SpCL).

    Raises:
        ConfigError: unknown `optim.name`.
    """
    if config.name == "adam":
        scale = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
    elif config.name == "sgd":
        scale = optax.trace(decay=config.momentum)
    else:
        raise ConfigError(f"optim.name={config.name!r} is not known: use adam or sgd")
    parts = [optax.add_decayed_weights(config.weight_decay)] if config.weight_decay else []
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    frozen = optax.masked(optax.set_to_zero(), _is_neck_bias)
    return optax.chain(*parts, scale, optax.scale_by_learning_rate(schedule), frozen)


def _is_neck_bias(params: Any) -> Any:
    """True at the bias of the BNNeck, which is never trained (Luo et al. 2019, "Bag of Tricks"; FastReID, SpCL)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: [getattr(step, "key", None) for step in path[-2:]] == ["bottleneck", "bias"], params
    )
