"""Training steps: pure functions of (state, batch), compiled once for a mesh."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dmosnet_jax.core.parallel import by_rows, replicated
from dmosnet_jax.core.unit import unit_rows
from dmosnet_jax.data import augment as augmentation
from dmosnet_jax.losses import identity, triplet
from dmosnet_jax.memory import hybrid
from dmosnet_jax.models import Model
from dmosnet_jax.train.state import TrainState, shardings, step_key

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def _augmented(state: TrainState, batch: Batch, config: Any) -> jax.Array:
    options = {name: config.augment[name] for name in ("flip", "pad", "erase", "erasing")}
    mean, std = config.pixel_mean, config.pixel_std
    return augmentation.augment(step_key(state), batch["image"], **options, mean=mean, std=std)


def _apply_gradient(
    state: TrainState, gradient: Any, stats: Any, optimiser: optax.GradientTransformation
) -> TrainState:
    updates, opt_state = optimiser.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, stats=stats, opt_state=opt_state)


def _length(tree: Any) -> jax.Array:
    """Euclidean length of all leaves together; one sum of the leaves' squares, where optax has a chain of additions."""
    return jnp.sqrt(jnp.sum(jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)])))


def supervised_step(model: Model, optimiser: optax.GradientTransformation, config: Any) -> Step:
    """Cross-entropy with label smoothing plus batch-hard triplet loss (paper, section 4.2; fast-reid's BoT and SBS).

    The batch's `pid` holds class indices. A circle classifier's cosines become logits with the label's margin first.
    Metrics: `loss`, `loss_id`, `loss_triplet`, `accuracy`, `gradient_norm`.
    """
    margin = config.loss.triplet_margin if config.loss.triplet == "hinge" else None

    def losses(params, state, batch):
        images = _augmented(state, batch, config)
        outputs, stats = model.apply(params, state.stats, images, train=True)
        logits = outputs["logits"]
        if model.classifier == "circle":
            scale, relaxation = config.loss.circle_scale, config.loss.circle_margin
            logits = identity.circle_logits(logits, batch["pid"], scale=scale, margin=relaxation)
        by_class = identity.cross_entropy(logits, batch["pid"], epsilon=config.loss.label_smoothing)
        parts = {"loss_id": by_class, "accuracy": identity.accuracy(outputs["logits"], batch["pid"])}
        total = by_class
        if config.loss.triplet != "none":
            parts["loss_triplet"] = triplet.batch_hard(outputs[config.loss.triplet_on], batch["pid"], margin=margin)
            total = total + config.loss.triplet_weight * parts["loss_triplet"]
        return total, (stats, parts)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        (loss, (stats, parts)), gradient = jax.value_and_grad(losses, has_aux=True)(state.params, state, batch)
        metrics = {"loss": loss, **parts, "gradient_norm": _length(gradient)}
        return _apply_gradient(state, gradient, stats, optimiser), metrics

    return step


def spcl_step(
    model: Model, optimiser: optax.GradientTransformation, config: Any, *, memory: ModuleType = hybrid
) -> Step:
    """SpCL's contrastive step against the memory, which it then updates (Ge et al. 2020, Eq. 1 and 3).

    The batch's `index` holds rows of the memory; `memory` is the module of its kind, `memory.hybrid` or
    `memory.cluster`. Metrics: `loss`, `gradient_norm`.
    """

    def losses(params, state, batch):
        images = _augmented(state, batch, config)
        outputs, stats = model.apply(params, state.stats, images, train=True)
        features = unit_rows(outputs["feature"])
        return memory.loss(state.memory, features, batch["index"]), (stats, features)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        (loss, (stats, features)), gradient = jax.value_and_grad(losses, has_aux=True)(state.params, state, batch)
        updated = memory.update(state.memory, features, batch["index"], loss=loss)
        state = _apply_gradient(state, gradient, stats, optimiser).replace(memory=updated)
        return state, {"loss": loss, "gradient_norm": _length(gradient)}

    return step


def compile_step(step: Step, state: TrainState, mesh: Mesh) -> Step:
    """The step jitted for a mesh; the state's buffers are donated.

    Args:
        step: a pure step.
        state: a state with the shapes to compile for.
        mesh: the devices.
    """
    places = shardings(state, mesh)
    return jax.jit(
        step,
        in_shardings=(places, by_rows(mesh)),
        out_shardings=(places, replicated(mesh)),
        donate_argnums=0,
    )
