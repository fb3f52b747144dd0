"""OSNet-AIN: instance norm inside the residual branch of the blocks that an architecture search chose.

Source: Zhou et al., "Learning Generalisable Omni-Scale Representations for Person Re-Identification" (torchreid
`models/osnet_ain.py`), whose attribute names, unlike those of its `osnet.py`, number the four streams of a block and
keep the transitions beside the stages.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from dmosnet_jax.models.activation import relu
from dmosnet_jax.models.draws import Draws
from dmosnet_jax.models.layers import Conv, average_pool, max_pool3x3
from dmosnet_jax.models.norms import InstanceNorm
from dmosnet_jax.models.osnet import ChannelGate, ConvUnit, LightConv

# Which of the two blocks of conv2, conv3 and conv4 have the instance norm.
INSTANCE_NORMS = ((True, True), (False, True), (True, False))


@dataclasses.dataclass(frozen=True)
class AINSettings:
    """What distinguishes the networks of the family.

    Attributes:
        channels: widths after conv1, conv2, conv3 and conv4.
        bn_group_size: images that share batch statistics, None for the whole batch.
    """

    channels: tuple[int, int, int, int]
    bn_group_size: int | None = None

    @property
    def width(self) -> int:
        """Channels of the last map."""
        return self.channels[-1]

    @property
    def unit(self) -> int:
        """What height and width must be multiples of."""
        return 16

    def create(self, rngs: Draws) -> nnx.Module:
        """The backbone."""
        return OSNetAIN(self, rngs=rngs)


class Stream(nnx.Module):
    """Lite 3x3 convolutions one after the other."""

    def __init__(self, channels: int, depth: int, **options: Any):
        self.layers = nnx.List([LightConv(channels, **options) for _ in range(depth)])

    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        for layer in self.layers:
            x, pooled = layer(x, train=train)
        return x, pooled


class BareConv(nnx.Module):
    """A 1x1 convolution that leaves the norm to the block."""

    def __init__(self, inputs: int, outputs: int, *, rngs: Draws):
        self.conv = Conv(inputs, outputs, 1, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        del train
        return self.conv(x)


class AINBlock(nnx.Module):
    """Omni-scale block; with `instance_norm` the residual branch ends in one instead of a batch norm."""

    def __init__(self, inputs: int, outputs: int, *, instance_norm: bool, group_size: int | None, rngs: Draws):
        mid = outputs // 4
        options: dict[str, Any] = {"group_size": group_size, "rngs": rngs}
        self.conv1 = ConvUnit(inputs, mid, **options)
        self.conv2 = nnx.List([Stream(mid, depth, **options) for depth in (1, 2, 3, 4)])
        self.gate = ChannelGate(mid, rngs=rngs)
        if instance_norm:
            self.conv3: nnx.Module = BareConv(mid, outputs, rngs=rngs)
            self.IN = InstanceNorm(outputs)
        else:
            self.conv3 = ConvUnit(mid, outputs, linear=True, **options)
        if inputs != outputs:
            self.downsample = ConvUnit(inputs, outputs, linear=True, **options)
        self.has_downsample, self.instance_norm = inputs != outputs, instance_norm

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x1 = self.conv1(x, train=train)
        gated = [self.gate(*stream(x1, train=train)) for stream in self.conv2]
        total = sum(gated[1:], gated[0])
        identity = self.downsample(x, train=train) if self.has_downsample else x
        if self.instance_norm:
            return relu(self.IN(self.conv3(total, train=train)) + identity)
        return self.conv3(total, train=train, residual=identity)


class OSNetAIN(nnx.Module):
    """OSNet-AIN up to conv5."""

    def __init__(self, settings: AINSettings, *, rngs: Draws):
        stem, *widths = settings.channels
        options: dict[str, Any] = {"group_size": settings.bn_group_size, "rngs": rngs}
        self.conv1 = ConvUnit(3, stem, 7, stride=2, ibn=True, **options)
        for stage, (inputs, outputs) in enumerate(zip((stem, *widths[:-1]), widths, strict=True)):
            first, second = INSTANCE_NORMS[stage]
            blocks = [
                AINBlock(inputs, outputs, instance_norm=first, **options),
                AINBlock(outputs, outputs, instance_norm=second, **options),
            ]
            setattr(self, f"conv{stage + 2}", nnx.List(blocks))
            if stage < 2:
                # A list of one: the reference wraps this unit and its pooling in a Sequential.
                setattr(self, f"pool{stage + 2}", nnx.List([ConvUnit(outputs, outputs, **options)]))
        self.conv5 = ConvUnit(widths[-1], widths[-1], **options)

    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Features of normalised images: see `OSNet.__call__`."""
        stages = {"conv1": self.conv1(x, train=train)}
        x = stages["maxpool"] = max_pool3x3(stages["conv1"])
        for stage in (2, 3, 4):
            for block in getattr(self, f"conv{stage}"):
                x = block(x, train=train)
            if stage < 4:
                (transition,) = getattr(self, f"pool{stage}")
                x = average_pool(transition(x, train=train), 2)
            stages[f"conv{stage}"] = x
        x = stages["conv5"] = self.conv5(x, train=train)
        return x, stages
