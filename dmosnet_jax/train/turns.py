"""The gradient of a batch in turns, which takes the memory of one part of it.

Groups of images that share batch statistics meet in the loss's mean only, where the loss asks nothing but a memory that
does not move within the step. So the gradients, the losses and the moved statistics of parts made of whole groups have
the whole batch's as their means.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from dmosnet_jax.core.errors import ConfigError

Rows = Any
Losses = Callable[[Any, Rows], tuple[jax.Array, tuple[Any, Any]]]


@dataclasses.dataclass(frozen=True)
class Turns:
    """Into which parts a batch is divided, so that no image changes its device.

    Attributes:
        count: of the parts; 1 is the whole batch at once.
        devices: over which the batch is split by rows.
    """

    count: int = 1
    devices: int = 1

    @classmethod
    def of(cls, groups_at_once: int | None, group: int | None, images: int, mesh: Mesh) -> Self:
        """The turns of a config.

        Args:
            groups_at_once: groups that each device takes in a turn, None for all.
            group: images that share batch statistics, None for all.
            images: of a batch; with a source, of one domain.
            mesh: the devices.

        Raises:
            ConfigError: the images of a device can't be divided so.
        """
        if groups_at_once is None:
            return cls(1, mesh.size)
        field, share = f"spcl.groups_at_once={groups_at_once}", images // mesh.size
        if group is None or group >= images:
            raise ConfigError(
                f"{field} needs groups, and all {images} images share their batch statistics "
                "(model.bn_group_size): leave it out"
            )
        if share % group:
            raise ConfigError(
                f"{field}: each of {mesh.size} devices has {share} images, which are no whole groups of {group}: "
                "leave it out, or use fewer devices"
            )
        groups = share // group
        if groups % min(groups_at_once, groups):
            raise ConfigError(f"{field}: each device has {groups} groups: use a divisor of that")
        return cls(groups // min(groups_at_once, groups), mesh.size)

    def value_and_gradient(self, losses: Losses, weights: Any, rows: Rows) -> tuple[Any, Any]:
        """`jax.value_and_grad(losses, has_aux=True)(weights, rows)`, in turns.

        Args:
            losses: (weights, rows) -> (loss, (means, own)): the loss and all of `means` are means over the rows, and
                the leaves of `own` have one for each, or for each of as large a share of each part.
            weights: to differentiate with respect to.
            rows: arrays `[B, ...]`.
        """
        compute = jax.value_and_grad(losses, has_aux=True)
        if self.count == 1:
            return compute(weights, rows)

        def turn(sums: Any, part: Rows) -> tuple[Any, Any]:
            (loss, (means, own)), gradient = compute(weights, part)
            return jax.tree.map(jnp.add, sums, (loss, means, gradient)), own

        parts = jax.tree.map(self._divided, rows)
        (loss, (means, _)), gradient = jax.eval_shape(compute, weights, jax.tree.map(lambda leaf: leaf[0], parts))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (loss, means, gradient))
        sums, own = lax.scan(turn, zeros, parts)
        loss, means, gradient = jax.tree.map(lambda leaf: leaf / self.count, sums)
        return (loss, (means, jax.tree.map(self._joined, own))), gradient

    def _divided(self, rows: jax.Array) -> jax.Array:
        """`[B, ...]` -> `[count, B / count, ...]`: of each device's rows the first ones, the next ones, ..."""
        shape = self.devices, self.count, -1, *rows.shape[1:]
        return jnp.moveaxis(rows.reshape(shape), 1, 0).reshape(self.count, -1, *rows.shape[1:])

    def _joined(self, parts: jax.Array) -> jax.Array:
        """The inverse of `_divided`."""
        shape = self.count, self.devices, -1, *parts.shape[2:]
        return jnp.moveaxis(parts.reshape(shape), 0, 1).reshape(-1, *parts.shape[2:])


AT_ONCE = Turns()
