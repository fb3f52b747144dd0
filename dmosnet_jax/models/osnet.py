"""OSNet and DM-OSNet backbones.

Sources: Zhou et al., "Omni-Scale Feature Learning for Person Re-Identification" (torchreid `models/osnet.py`) and Zhou
et al., Sensors 2022, 22, 6293 (DM-OSNet). Attribute names are those of the reference implementations.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from dmosnet_jax.models.activation import relu
from dmosnet_jax.models.attention import GRID, DoubleLayerAttention
from dmosnet_jax.models.convolution import convolve3x3, merged_kernel, merges
from dmosnet_jax.models.draws import Draws
from dmosnet_jax.models.layers import Conv, average_pool, max_pool3x3
from dmosnet_jax.models.norms import BatchNorm, InstanceNorm

CHANNELS: Mapping[str, tuple[int, int, int, int]] = {
    "x1_0": (64, 256, 384, 512),
    "x0_75": (48, 192, 288, 384),
    "x0_5": (32, 128, 192, 256),
    "x0_25": (16, 64, 96, 128),
}


@dataclasses.dataclass(frozen=True)
class OSNetSettings:
    """What distinguishes the networks of the family.

    Attributes:
        channels: widths after conv1, conv2, conv3 and conv4.
        ibn: instance norm in conv1 and at the end of each conv2 block.
        attention: in which of conv2, conv3, conv4 DL-MHSA replaces the 9x9 stream, e.g. `(1, 0, 0)`.
        bn_group_size: images that share batch statistics, None for the whole batch.
    """

    channels: tuple[int, int, int, int]
    ibn: bool = False
    attention: tuple[int, int, int] = (0, 0, 0)
    bn_group_size: int | None = None

    @property
    def width(self) -> int:
        """Channels of the last map."""
        return self.channels[-1]

    @property
    def unit(self) -> int:
        """What height and width must be multiples of: four halvings, and whole windows where there is attention."""
        return max([16, *(GRID * 4 * 2**stage for stage, used in enumerate(self.attention) if used)])

    def create(self, rngs: Draws) -> nnx.Module:
        """The backbone."""
        return OSNet(self, rngs=rngs)


class ConvUnit(nnx.Module):
    """Convolution, norm and (unless `linear`) ReLU; the norm is an instance norm with `ibn`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 1,
        *,
        stride: int = 1,
        linear: bool = False,
        ibn: bool = False,
        group_size: int | None,
        rngs: Draws,
    ):
        self.conv = Conv(inputs, outputs, size, stride=stride, rngs=rngs)
        self.bn = InstanceNorm(outputs) if ibn else BatchNorm(outputs, group_size=group_size)
        self.linear = linear

    def __call__(self, x: jax.Array, *, train: bool, residual: jax.Array | None = None) -> jax.Array:
        """With a `residual` the sum goes through a ReLU."""
        if isinstance(self.bn, BatchNorm):
            last = not self.linear or residual is not None
            convolve = functools.partial(self.conv.convolve, x)
            return self.bn.after(convolve, self.conv.kernel[...], train=train, relu=last, residual=residual)[0]
        return relu(self.bn(self.conv(x), train=train))


class LightConv(nnx.Module):
    """Lite 3x3: linear 1x1, depthwise 3x3, norm, ReLU."""

    def __init__(self, channels: int, *, group_size: int | None, rngs: Draws):
        self.conv1 = Conv(channels, channels, 1, rngs=rngs)
        self.conv2 = Conv(channels, channels, 3, depthwise=True, rngs=rngs)
        self.bn = BatchNorm(channels, group_size=group_size)

    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        depthwise = self.conv2.kernel[...]
        if merges(x):
            kernel = merged_kernel(self.conv1.kernel[...], depthwise)
            return self.bn.after(lambda kernel: convolve3x3(x, kernel.astype(x.dtype)), kernel, train=train, relu=True)
        y = self.conv1(x)
        return self.bn.pooled(y, train=train, relu=True, depthwise=depthwise.astype(y.dtype))


class AttentionStream(nnx.Module):
    """The stream that replaces the 9x9 one: linear 1x1, DL-MHSA, norm, ReLU."""

    def __init__(self, channels: int, *, group_size: int | None, rngs: Draws):
        self.conv1 = Conv(channels, channels, 1, rngs=rngs)
        self.attn2 = DoubleLayerAttention(channels, group_size=group_size, rngs=rngs)
        self.bn = BatchNorm(channels, group_size=group_size)

    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        return self.bn.pooled(self.attn2(self.conv1(x), train=train), train=train, relu=True)


class ChannelGate(nnx.Module):
    """Unified aggregation gate: per-channel weights from the pooled map, shared by the four streams."""

    def __init__(self, channels: int, *, rngs: Draws):
        hidden = channels // 16
        self.fc1 = Conv(channels, hidden, 1, bias=True, rngs=rngs)
        self.fc2 = Conv(hidden, channels, 1, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, pooled: jax.Array) -> jax.Array:
        """Weighs the channels of `[B, H, W, C]` by their means `[B, C]`."""
        return x * jax.nn.sigmoid(self.fc2(jax.nn.relu(self.fc1(pooled[:, None, None, :]))))


class OSBlock(nnx.Module):
    """Omni-scale residual block with streams of receptive field 3, 5, 7 and 9 (or DL-MHSA)."""

    def __init__(self, inputs: int, outputs: int, *, ibn: bool, attention: bool, group_size: int | None, rngs: Draws):
        mid = outputs // 4
        options: dict[str, Any] = {"group_size": group_size, "rngs": rngs}
        self.conv1 = ConvUnit(inputs, mid, **options)
        self.conv2a = LightConv(mid, **options)
        self.conv2b = nnx.List([LightConv(mid, **options) for _ in range(2)])
        self.conv2c = nnx.List([LightConv(mid, **options) for _ in range(3)])
        last: list[nnx.Module] = [LightConv(mid, **options) for _ in range(0 if attention else 4)]
        self.conv2d = nnx.List(last or [AttentionStream(mid, **options)])
        self.gate = ChannelGate(mid, rngs=rngs)
        self.conv3 = ConvUnit(mid, outputs, linear=True, **options)
        if inputs != outputs:
            self.downsample = ConvUnit(inputs, outputs, linear=True, **options)
        if ibn:
            self.IN = InstanceNorm(outputs)
        self.has_downsample, self.ibn = inputs != outputs, ibn

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x1 = self.conv1(x, train=train)
        total = self.gate(*self.conv2a(x1, train=train))
        for stream in (self.conv2b, self.conv2c, self.conv2d):
            y = x1
            for layer in stream:
                y, pooled = layer(y, train=train)
            total = total + self.gate(y, pooled)
        identity = self.downsample(x, train=train) if self.has_downsample else x
        if self.ibn:
            return relu(self.IN(self.conv3(total, train=train) + identity))
        return self.conv3(total, train=train, residual=identity)


class OSNet(nnx.Module):
    """OSNet up to conv5; with `attention`, DM-OSNet."""

    def __init__(self, settings: OSNetSettings, *, rngs: Draws):
        stem, *widths = settings.channels
        group_size = settings.bn_group_size
        options: dict[str, Any] = {"group_size": group_size, "rngs": rngs}
        self.conv1 = ConvUnit(3, stem, 7, stride=2, ibn=settings.ibn, **options)
        for stage, (inputs, outputs) in enumerate(zip((stem, *widths[:-1]), widths, strict=True)):
            ibn, attention = settings.ibn and stage == 0, bool(settings.attention[stage])
            block: dict[str, Any] = {"ibn": ibn, "attention": attention, **options}
            layers: list[nnx.Module] = [OSBlock(inputs, outputs, **block), OSBlock(outputs, outputs, **block)]
            if stage < 2:
                # A list of one: the reference wraps this unit and its pooling in a Sequential.
                layers.append(nnx.List([ConvUnit(outputs, outputs, **options)]))
            setattr(self, f"conv{stage + 2}", nnx.List(layers))
        self.conv5 = ConvUnit(widths[-1], widths[-1], **options)

    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Features of normalised images.

        Args:
            x: `[B, H, W, 3]`.
            train: use and move batch statistics.

        Returns:
            The map `[B, H/16, W/16, width]`, and the maps after each stage by name.
        """
        stages = {"conv1": self.conv1(x, train=train)}
        x = stages["maxpool"] = max_pool3x3(stages["conv1"])
        for name in ("conv2", "conv3", "conv4"):
            for layer in getattr(self, name):
                if isinstance(layer, OSBlock):
                    x = layer(x, train=train)
                else:
                    x = average_pool(layer[0](x, train=train), 2)
            stages[name] = x
        x = stages["conv5"] = self.conv5(x, train=train)
        return x, stages
