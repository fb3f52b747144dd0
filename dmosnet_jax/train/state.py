"""The training state: everything on the devices that a step reads and writes."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dmosnet_jax.core.parallel import replicated
from dmosnet_jax.memory import cluster, hybrid, tables
from dmosnet_jax.models.domains import norms_of

Tree = dict[str, Any]


class TrainState(flax.struct.PyTreeNode):
    """A plain pytree.

    Attributes:
        step: int32 scalar, steps taken.
        params: float32 parameters.
        stats: float32 batch statistics.
        opt_state: optimiser state.
        key: uint32 key data of the run; a step folds its number in, so it never changes.
        memory: of images or of clusters, None in supervised training.
        source: where a labelled source is trained on too, its own batch norms: their parameters, "params", and all
            statistics, "stats"; those in `params` and `stats` are the target's. None elsewhere.
    """

    step: jax.Array
    params: Tree
    stats: Tree
    opt_state: Any
    key: jax.Array
    memory: hybrid.Memory | cluster.Memory | None = None
    source: Tree | None = None


@dataclasses.dataclass(frozen=True)
class RunState:
    """A run between two steps: what its checkpoint holds, and all that later steps depend on.

    Attributes:
        state: the arrays.
        meta: JSON values: "model" and "config" (what the run is), "lengths" (what must not change when it is resumed)
            and "loop" (host values that the recipe changes from epoch to epoch).
    """

    state: TrainState
    meta: Mapping[str, Any]

    def replace(self, *, state: TrainState, **loop: Any) -> "RunState":
        """This run with another state, and with changed host values where some are given."""
        meta = {**self.meta, "loop": {**self.meta.get("loop", {}), **loop}} if loop else self.meta
        return RunState(state, meta)


def create(params: Tree, stats: Tree, optimiser: optax.GradientTransformation, *, seed: int, mesh: Mesh) -> TrainState:
    """A state at step 0, the same on every device of the mesh."""
    build = functools.partial(_build, optimiser=optimiser, seed=seed)
    return jax.jit(build, out_shardings=replicated(mesh))(params, stats)


def shapes(params: Tree, stats: Tree, optimiser: optax.GradientTransformation) -> TrainState:
    """`create` as `jax.ShapeDtypeStruct` leaves, for `checkpoints.Checkpoints.restore`; takes arrays or shapes."""
    return jax.eval_shape(functools.partial(_build, optimiser=optimiser, seed=0), params, stats)


def _build(params: Tree, stats: Tree, *, optimiser: optax.GradientTransformation, seed: int) -> TrainState:
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, stats, optimiser.init(params), key)


def with_source(state: TrainState, optimiser: optax.GradientTransformation) -> TrainState:
    """The state with batch norms for a source domain, which start as the target's do.

    Args:
        state: a state at step 0, arrays or shapes.
        optimiser: its state is made anew, for `trained` parameters.
    """

    def build(state: TrainState) -> TrainState:
        # Copies: a step donates its state, and no buffer can be given away twice.
        norms = jax.tree.map(jnp.copy, {"params": norms_of(state.params, state.stats), "stats": state.stats})
        state = state.replace(source=norms)
        return state.replace(opt_state=optimiser.init(trained(state)))

    if isinstance(jax.tree.leaves(state.params)[0], jax.ShapeDtypeStruct):
        return jax.eval_shape(build, state)
    return jax.jit(build)(state)


def trained(state: TrainState) -> Tree:
    """All that the optimiser changes: the parameters, and where there is a source its norms' too."""
    return state.params if state.source is None else {"params": state.params, "source": state.source["params"]}


def shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Sharding of each array of a state: the memory's tables by rows, everything else replicated."""
    everywhere = jax.tree.map(lambda _: replicated(mesh), state.replace(memory=None))
    return everywhere.replace(memory=None if state.memory is None else tables.shardings(state.memory, mesh))


def step_key(state: TrainState) -> jax.Array:
    """The random key of this step; a resumed run draws the same numbers."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
