"""From an NNX module to pure functions over nested dicts.

Outside `models/` nothing knows NNX: a training step over plain dicts costs a quarter of one over NNX state on the host.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from dmosnet_jax.models.draws import Draws

Tree = dict[str, Any]


def _split(module: nnx.Module) -> tuple[Any, nnx.State, nnx.State]:
    """Structure, parameters and batch statistics of a module, which has nothing else."""
    split: Any = nnx.split
    return split(module, nnx.Param, nnx.BatchStat)


def _to_tree(state: Any) -> Tree:
    """A plain nested dict with string keys; list positions become "0", "1", ..."""

    def convert(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {str(key): convert(value) for key, value in node.items()}
        return node

    return convert(nnx.to_pure_dict(state))


class Functional:
    """Pure `init` and `apply` of a module made by `create(rngs)`."""

    def __init__(self, create: Callable[[Draws], nnx.Module]):
        self._create = create
        abstract = nnx.eval_shape(lambda: create(Draws()))
        self._graph, self._params, self._stats = _split(abstract)

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh `(params, stats)` as NumPy arrays; the key must be concrete, so not under `jax.jit`."""
        _, params, stats = _split(self._create(Draws(key)))
        return _to_tree(params), _to_tree(stats)

    def shapes(self) -> tuple[Tree, Tree]:
        """`init` as `jax.ShapeDtypeStruct` leaves."""
        return _to_tree(self._params), _to_tree(self._stats)

    def apply(self, params: Tree, stats: Tree, *args: Any, **kwargs: Any) -> tuple[Any, Tree]:
        """Runs the module; returns its output and the statistics after it."""
        # copy=True: the module writes its statistics, and inside jax.grad the inputs must stay untouched.
        module: Any = nnx.merge(self._graph, _fill(self._params, params), _fill(self._stats, stats), copy=True)
        outputs = module(*args, **kwargs)
        return outputs, _to_tree(nnx.state(module, nnx.BatchStat))


def _fill(template: nnx.State, tree: Tree) -> nnx.State:
    """The template's variables holding the tree's leaves."""
    flat = []
    for path, variable in nnx.to_flat_state(template):
        node: Any = tree
        for key in path:
            node = node[str(key)]
        flat.append((path, variable.replace(node)))
    return nnx.from_flat_state(flat)
