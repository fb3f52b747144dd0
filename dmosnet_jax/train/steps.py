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
from dmosnet_jax.models.domains import with_norms
from dmosnet_jax.train.state import TrainState, shardings, step_key, trained
from dmosnet_jax.train.turns import AT_ONCE, Turns

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
    model: Model,
    optimiser: optax.GradientTransformation,
    config: Any,
    *,
    memory: ModuleType = hybrid,
    turns: Turns = AT_ONCE,
) -> Step:
    """SpCL's contrastive step against the memory, which it then updates (Ge et al. 2020, Eq. 1 and 3).

    The batch's `index` holds rows of the memory; `memory` is the module of its kind, `memory.hybrid` or
    `memory.cluster`; `turns` are of the images. Metrics: `loss`, `gradient_norm`.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def losses(params, rows):
            outputs, stats = model.apply(params, state.stats, rows["image"], train=True)
            features = unit_rows(outputs["feature"])
            return memory.loss(state.memory, features, rows["index"]), (stats, features)

        rows = {"image": _augmented(state, batch, config), "index": batch["index"]}
        (loss, (stats, features)), gradient = turns.value_and_gradient(losses, state.params, rows)
        updated = memory.update(state.memory, features, batch["index"], loss=loss)
        state = _apply_gradient(state, gradient, stats, optimiser).replace(memory=updated)
        return state, {"loss": loss, "gradient_norm": _length(gradient)}

    return step


def spcl_uda_step(
    model: Model, optimiser: optax.GradientTransformation, config: Any, *, turns: Turns = AT_ONCE
) -> Step:
    """SpCL's step with a labelled source (Ge et al. 2020; `SpCLTrainer_UDA` in `spcl/trainers.py`).

    Images of source and target alternate in the batch, so that each device has as many of both; each domain is
    normalised by batch statistics, scale and bias of its own. The batch's `pid` holds rows of the hybrid memory: of a
    source image its class, of a target image its own. The losses of the two are added, both against the memory from
    before the step (SpCL's backward pass has moved one domain's rows when it comes to the other's gradient). `turns`
    are of each domain's images.
    Metrics: `loss`, `loss_source`, `loss_target`, `gradient_norm`.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        norms, memory = state.source, state.memory
        assert norms is not None
        assert isinstance(memory, hybrid.Memory)

        def losses(weights, part):
            source = with_norms(weights["params"], weights["source"]), norms["stats"]
            target = weights["params"], state.stats
            features, stats, parts = [], [], []
            for domain, (params, before) in enumerate((source, target)):
                images, rows = (_every_second(part[name], domain) for name in ("image", "pid"))
                outputs, moved = model.apply(params, before, images, train=True)
                features.append(unit_rows(outputs["feature"]))
                stats.append(moved)
                parts.append(hybrid.loss(memory, features[-1], rows))
            return parts[0] + parts[1], ((stats, parts), features)

        weights = trained(state)
        images = {"image": _augmented(state, batch, config), "pid": batch["pid"]}
        (loss, (((source_stats, stats), parts), found)), gradient = turns.value_and_gradient(losses, weights, images)
        features = jnp.concatenate(found)
        rows = jnp.concatenate([_every_second(batch["pid"], domain) for domain in (0, 1)])
        updated = hybrid.update(memory, features, rows, loss=loss)
        updates, opt_state = optimiser.update(gradient, state.opt_state, weights)
        weights = optax.apply_updates(weights, updates)
        state = state.replace(
            step=state.step + 1,
            params=weights["params"],
            stats=stats,
            opt_state=opt_state,
            memory=updated,
            source={"params": weights["source"], "stats": source_stats},
        )
        metrics = {"loss": loss, "loss_source": parts[0], "loss_target": parts[1]}
        return state, metrics | {"gradient_norm": _length(gradient)}

    return step


def _every_second(rows: jax.Array, first: int) -> jax.Array:
    """Rows `first`, `first + 2`, ..., each on the device where it is."""
    return rows.reshape(rows.shape[0] // 2, 2, *rows.shape[1:])[:, first]


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
