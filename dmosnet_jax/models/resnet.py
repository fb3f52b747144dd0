"""ResNet50 and ResNet50-IBN-a backbones with torchvision's attribute names.

Sources: He et al. 2016 in torchvision's form (stride in the 3x3 convolution) and Pan et al., "Two at Once: Enhancing
Learning and Generalization Capacities via IBN-Net". Re-ID code bases differ in two places, so an imported network needs
to know where it comes from: see `VARIANTS`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dmosnet_jax.models.activation import relu as rectify
from dmosnet_jax.models.draws import Draws
from dmosnet_jax.models.layers import Conv, max_pool3x3
from dmosnet_jax.models.norms import BatchNorm, InstanceNorm


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a code base's ResNet differs.

    Attributes:
        last_stride: stride of layer4.
        padded_pool: the stem's max pool pads one row and column before the map; otherwise its windows start at the
            map's edge and the last one is cut (`ceil_mode`).
    """

    last_stride: int = 1
    padded_pool: bool = True


# SpCL (spcl/models/resnet.py) and OpenUnReID, fast-reid (backbones/resnet.py), torchreid and torchvision itself.
VARIANTS: Mapping[str, Variant] = {
    "spcl": Variant(),
    "fastreid": Variant(padded_pool=False),
    "torchreid": Variant(last_stride=2),
}
_BLOCKS = (3, 4, 6, 3)
_EXPANSION = 4


@dataclasses.dataclass(frozen=True)
class ResNetSettings:
    """What distinguishes the networks of the family.

    Attributes:
        ibn: half of the channels of the first norm of each block of layer1 to layer3 are instance-normalised.
        variant: a key of `VARIANTS`.
        bn_group_size: images that share batch statistics, None for the whole batch.
    """

    ibn: bool = False
    variant: str = "spcl"
    bn_group_size: int | None = None

    @property
    def width(self) -> int:
        """Channels of the last map."""
        return 512 * _EXPANSION

    @property
    def unit(self) -> int:
        """What height and width must be multiples of."""
        return 16

    def create(self, rngs: Draws) -> nnx.Module:
        """The backbone."""
        return ResNet50(self, rngs=rngs)


class HalfInstanceNorm(nnx.Module):
    """IBN-a: instance norm of the first half of the channels, batch norm of the others."""

    def __init__(self, channels: int, *, group_size: int | None):
        self.half = channels // 2
        self.IN = InstanceNorm(self.half)
        self.BN = BatchNorm(channels - self.half, group_size=group_size)

    def __call__(self, x: jax.Array, *, train: bool, relu: bool = False) -> jax.Array:
        first, second = x[..., : self.half], x[..., self.half :]
        y = jnp.concatenate([self.IN(first), self.BN(second, train=train)], axis=-1)
        return rectify(y) if relu else y


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions with a residual."""

    def __init__(
        self, inputs: int, planes: int, *, stride: int, project: bool, ibn: bool, group_size: int | None, rngs: Draws
    ):
        outputs = planes * _EXPANSION
        self.conv1 = Conv(inputs, planes, 1, rngs=rngs)
        norm = HalfInstanceNorm if ibn else BatchNorm
        self.bn1 = norm(planes, group_size=group_size)
        self.conv2 = Conv(planes, planes, 3, stride=stride, rngs=rngs)
        self.bn2 = BatchNorm(planes, group_size=group_size)
        self.conv3 = Conv(planes, outputs, 1, rngs=rngs)
        self.bn3 = BatchNorm(outputs, group_size=group_size)
        if project:
            shortcut = [Conv(inputs, outputs, 1, stride=stride, rngs=rngs), BatchNorm(outputs, group_size=group_size)]
            self.downsample = nnx.List(shortcut)
        self.project = project

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = _both(self.conv1, self.bn1, x, train=train, relu=True)
        y = _both(self.conv2, self.bn2, y, train=train, relu=True)
        if self.project:
            conv, norm = self.downsample
            x = _both(conv, norm, x, train=train)
        return _both(self.conv3, self.bn3, y, train=train, relu=True, residual=x)


def _both(conv: Any, norm: Any, x: jax.Array, **options: Any) -> jax.Array:
    """A convolution and the norm behind it."""
    if isinstance(norm, HalfInstanceNorm):
        return norm(conv(x), **options)
    return norm.after(functools.partial(conv.convolve, x), conv.kernel[...], **options)[0]


class ResNet50(nnx.Module):
    """ResNet50 up to layer4."""

    def __init__(self, settings: ResNetSettings, *, rngs: Draws):
        variant = VARIANTS[settings.variant]
        options: dict[str, Any] = {"group_size": settings.bn_group_size, "rngs": rngs}
        self.conv1 = Conv(3, 64, 7, stride=2, rngs=rngs)
        self.bn1 = BatchNorm(64, group_size=settings.bn_group_size)
        inputs = 64
        for layer, (blocks, stride) in enumerate(zip(_BLOCKS, (1, 2, 2, variant.last_stride), strict=True)):
            planes, ibn = 64 * 2**layer, settings.ibn and layer < 3
            first = Bottleneck(inputs, planes, stride=stride, project=True, ibn=ibn, **options)
            inputs = planes * _EXPANSION
            rest = [Bottleneck(inputs, planes, stride=1, project=False, ibn=ibn, **options) for _ in range(blocks - 1)]
            setattr(self, f"layer{layer + 1}", nnx.List([first, *rest]))
        self.padded_pool = variant.padded_pool

    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Features of normalised images.

        Args:
            x: `[B, H, W, 3]`.
            train: use and move batch statistics.

        Returns:
            The map `[B, H/16, W/16, 2048]` (a half of that with last stride 2), and the maps after each stage by name.
        """
        x = _both(self.conv1, self.bn1, x, train=train, relu=True)
        stages = {"conv1": x}
        x = stages["maxpool"] = max_pool3x3(x, padded=self.padded_pool)
        for layer in ("layer1", "layer2", "layer3", "layer4"):
            for block in getattr(self, layer):
                x = block(x, train=train)
            stages[layer] = x
        return x, stages
