"""OSNet, DM-OSNet and ResNet50 in PyTorch, to measure against: torchreid's and SpCL's operations under their key names.

The weights that `configs/export.py` writes load into them, so both sides compute the same.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dmosnet_jax.models.attention import GRID, head_count
from dmosnet_jax.models.osnet import CHANNELS


class ConvUnit(nn.Module):
    """Convolution, norm and, unless linear, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, *, stride: int = 1, linear: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.conv(x))
        return y if self.linear else functional.relu(y, inplace=True)


class LightConv(nn.Module):
    """Linear 1x1, depthwise 3x3, norm, ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.bn(self.conv2(self.conv1(x))), inplace=True)


class ChannelGate(nn.Module):
    """Weights of channels from the pooled map."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = functional.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.fc2(functional.relu(self.fc1(pooled), inplace=True)))


class Attention(nn.Module):
    """Double-layer multi-head self-attention."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.grid_norm, self.ds_norm = (nn.BatchNorm2d(channels) for _ in range(3))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.q = nn.Conv2d(channels, channels, 1)
        self.kv = nn.Conv2d(channels, 2 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        self.heads = head_count(channels)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Arrays `[N, length, C]`."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        rows, columns = height // GRID, width // GRID
        qkv = self.qkv(self.norm(x)).reshape(batch, 3 * channels, rows, GRID, columns, GRID)
        windows = qkv.permute(0, 2, 4, 3, 5, 1).reshape(-1, GRID * GRID, 3 * channels)
        local = self._attend(*windows.chunk(3, dim=-1)).reshape(batch, rows, columns, GRID, GRID, channels)
        local = self.grid_norm(x + local.permute(0, 5, 1, 3, 2, 4).reshape(x.shape))
        q = self.q(local).flatten(2).transpose(1, 2)
        k, v = self.kv(self.ds_norm(functional.avg_pool2d(local, GRID))).flatten(2).transpose(1, 2).chunk(2, dim=-1)
        return self.proj(self._attend(q, k, v).transpose(1, 2).reshape(x.shape) + local)


class AttentionStream(nn.Module):
    """Linear 1x1, attention, norm, ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.attn2 = Attention(channels)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.bn(self.attn2(self.conv1(x))), inplace=True)


class OSBlock(nn.Module):
    """Omni-scale residual block."""

    def __init__(self, inputs: int, outputs: int, attention: bool):
        super().__init__()
        mid = outputs // 4
        self.conv1 = ConvUnit(inputs, mid)
        self.conv2a = LightConv(mid)
        self.conv2b, self.conv2c = (nn.Sequential(*(LightConv(mid) for _ in range(depth))) for depth in (2, 3))
        last = [AttentionStream(mid)] if attention else [LightConv(mid) for _ in range(4)]
        self.conv2d = nn.Sequential(*last)
        self.gate = ChannelGate(mid)
        self.conv3 = ConvUnit(mid, outputs, linear=True)
        self.downsample = ConvUnit(inputs, outputs, linear=True) if inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(x)
        total = self.gate(self.conv2a(y)) + self.gate(self.conv2b(y)) + self.gate(self.conv2c(y))
        total = self.conv3(total + self.gate(self.conv2d(y)))
        return functional.relu(total + (x if self.downsample is None else self.downsample(x)))


class OSNet(nn.Module):
    """OSNet, or with a mask DM-OSNet, up to conv5."""

    conv2: nn.Module
    conv3: nn.Module
    conv4: nn.Module

    def __init__(self, channels: tuple[int, ...], attention: tuple[int, ...]):
        super().__init__()
        stem, *widths = channels
        self.conv1 = ConvUnit(3, stem, 7, stride=2)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for stage, (inputs, outputs) in enumerate(zip((stem, *widths[:-1]), widths, strict=True)):
            use = bool(attention[stage])
            layers: list[nn.Module] = [OSBlock(inputs, outputs, use), OSBlock(outputs, outputs, use)]
            if stage < 2:
                layers.append(nn.Sequential(ConvUnit(outputs, outputs), nn.AvgPool2d(2, 2)))
            setattr(self, f"conv{stage + 2}", nn.Sequential(*layers))
        self.conv5 = ConvUnit(widths[-1], widths[-1])
        self.width = widths[-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.conv1(x))
        return self.conv5(self.conv4(self.conv3(self.conv2(x))))


class Bottleneck(nn.Module):
    """ResNet's block."""

    def __init__(self, inputs: int, planes: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        self.downsample = None
        if inputs != 4 * planes:
            shortcut = nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = functional.relu(self.bn2(self.conv2(y)), inplace=True)
        return functional.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet50 with last stride 1, up to layer4."""

    width = 2048
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = 64
        for layer, (blocks, stride) in enumerate(((3, 1), (4, 2), (6, 2), (3, 1))):
            planes = 64 * 2**layer
            made = []
            for block in range(blocks):
                made.append(Bottleneck(inputs, planes, stride if block == 0 else 1))
                inputs = 4 * planes
            setattr(self, f"layer{layer + 1}", nn.Sequential(*made))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(functional.relu(self.bn1(self.conv1(x)), inplace=True))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class Network(nn.Module):
    """A backbone with average pooling, BNNeck and classifier; gives feature and logits."""

    def __init__(self, backbone: Any, classes: int):
        super().__init__()
        self.backbone, self.neck = backbone, nn.BatchNorm1d(backbone.width)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(backbone.width, classes, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        feature = self.neck(self.backbone(x).mean(dim=(2, 3)))
        return feature, self.classifier(feature)


def build(name: str, classes: int) -> Network | None:
    """The PyTorch counterpart of a network of the registry, or None where there is none here."""
    family, _, width = name.partition("_")
    if name == "resnet50":
        return Network(ResNet50(), classes)
    if family in ("osnet", "dmosnet") and width in CHANNELS:
        return Network(OSNet(CHANNELS[width], (int(family == "dmosnet"), 0, 0)), classes)
    return None
