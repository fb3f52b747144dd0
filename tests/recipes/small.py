"""A network of one OSNet block, for whole runs in which depth is not the point: its step compiles in seconds."""

import dataclasses
import importlib
from typing import Any

import jax
from flax import nnx

from dmosnet_jax.models.draws import Draws
from dmosnet_jax.models.layers import average_pool, max_pool3x3
from dmosnet_jax.models.osnet import ConvUnit, OSBlock

NAME = "small"


class _Network(nnx.Module):
    def __init__(self, group_size: int | None, rngs: Draws):
        options: dict[str, Any] = {"group_size": group_size, "rngs": rngs}
        self.conv1 = ConvUnit(3, 16, 7, stride=2, **options)
        self.conv2 = nnx.List([OSBlock(16, 64, ibn=False, attention=False, **options)])

    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = average_pool(max_pool3x3(self.conv1(x, train=train)), 2)
        x = self.conv2[0](x, train=train)
        return x, {"conv2": x}


@dataclasses.dataclass(frozen=True)
class _Settings:
    bn_group_size: int | None = None
    width: int = 64
    unit: int = 16

    def create(self, rngs: Draws) -> nnx.Module:
        return _Network(self.bn_group_size, rngs)


def register() -> None:
    """Makes the network known by its name in this process."""
    importlib.import_module("dmosnet_jax.models.build")._MODELS.setdefault(NAME, _Settings())
