"""PyTorch networks to compare with: torchreid's modules loaded by file path, the others composed from torch layers.

Set DMOSNET_TORCHREID to torchreid's `models` folder where the package itself isn't installed.
"""

import functools
import importlib.util
import os
import pathlib

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra `peers`)")
nn, functional = torch.nn, torch.nn.functional
torch.set_num_threads(1)


def _folder() -> pathlib.Path:
    given = os.environ.get("DMOSNET_TORCHREID")
    if given:
        return pathlib.Path(given)
    spec = importlib.util.find_spec("torchreid")
    for root in spec.submodule_search_locations if spec else ():
        for inside in ("reid/models", "models"):
            if (pathlib.Path(root) / inside / "osnet.py").exists():
                return pathlib.Path(root) / inside
    pytest.skip("torchreid is not installed (set DMOSNET_TORCHREID to its models folder)")


@functools.cache
def torchreid(module: str):
    """A module of torchreid's models, without the package around it (which needs torchvision)."""
    path = _folder() / f"{module}.py"
    spec = importlib.util.spec_from_file_location(f"peer_{module}", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class Attention(nn.Module):
    """DL-MHSA over NCHW maps, by the paper's description and the released norms."""

    def __init__(self, channels: int, heads: int, grid: int = 8):
        super().__init__()
        self.norm, self.grid_norm, self.ds_norm = (nn.BatchNorm2d(channels) for _ in range(3))
        self.qkv, self.q, self.kv, self.proj = (nn.Conv2d(channels, n * channels, 1) for n in (3, 1, 2, 1))
        self.heads, self.grid = heads, grid

    def _attend(self, q, k, v):
        """`[N, C, positions]` each."""
        q, k, v = (x.reshape(x.shape[0], self.heads, -1, x.shape[-1]) for x in (q, k, v))
        weights = torch.softmax(q.transpose(-2, -1) @ k / q.shape[2] ** 0.5, dim=-1)
        return (v @ weights.transpose(-2, -1)).flatten(1, 2)

    def forward(self, x):
        batch, channels, height, width = x.shape
        g = self.grid
        windows = functional.unfold(self.qkv(self.norm(x)), g, stride=g)
        windows = windows.reshape(batch, 3, channels, g * g, -1).permute(1, 0, 4, 2, 3).flatten(1, 2)
        local = self._attend(*windows).reshape(batch, -1, channels * g * g).transpose(1, 2)
        local = self.grid_norm(x + functional.fold(local, (height, width), g, stride=g))
        k, v = self.kv(self.ds_norm(functional.avg_pool2d(local, g))).flatten(2).chunk(2, dim=1)
        spread = self._attend(self.q(local).flatten(2), k, v).reshape(x.shape)
        return self.proj(spread + local)


class AttentionStream(nn.Module):
    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.attn2 = Attention(channels, heads)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return functional.relu(self.bn(self.attn2(self.conv1(x))))


class FirstTwo(nn.Module):
    """IBN-a's norm."""

    def __init__(self, channels: int):
        super().__init__()
        self.IN, self.BN = nn.InstanceNorm2d(channels // 2, affine=True), nn.BatchNorm2d(channels // 2)

    def forward(self, x):
        first, second = x.chunk(2, dim=1)
        return torch.cat([self.IN(first), self.BN(second)], dim=1)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int, project: bool, ibn: bool):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 1, bias=False), (FirstTwo if ibn else nn.BatchNorm2d)(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        shortcut = [nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)]
        self.downsample = nn.Sequential(*shortcut) if project else None

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(functional.relu(self.bn2(self.conv2(y)))))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """Up to layer4; `variant` as in `dmosnet_jax.models.resnet`."""

    def __init__(self, variant: str, ibn: bool):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        cut = variant == "fastreid"
        self.maxpool = nn.MaxPool2d(3, 2, padding=0 if cut else 1, ceil_mode=cut)
        inputs = 64
        for number, count in enumerate((3, 4, 6, 3), start=1):
            planes = 32 * 2**number
            stride = {1: 1, 4: 2 if variant == "torchreid" else 1}.get(number, 2)
            layers = [Bottleneck(inputs, planes, stride, True, ibn and number < 4)]
            inputs = 4 * planes
            layers += [Bottleneck(inputs, planes, 1, False, ibn and number < 4) for _ in range(count - 1)]
            setattr(self, f"layer{number}", nn.Sequential(*layers))

    def forward(self, x):
        x = self.maxpool(functional.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class GeneralizedMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x):
        return functional.adaptive_avg_pool2d(x.clamp(min=1e-6).pow(self.p), 1).pow(1 / self.p)


class Heads(nn.Module):
    """fast-reid's embedding head: pooling, BNNeck and a classifier without bias."""

    def __init__(self, width: int, classes: int, gem: bool):
        super().__init__()
        self.pool_layer = GeneralizedMean() if gem else nn.AdaptiveAvgPool2d(1)
        self.bottleneck = nn.Sequential(nn.BatchNorm2d(width))
        self.weight = nn.Parameter(torch.zeros(classes, width))

    def forward(self, x):
        pooled = self.pool_layer(x)
        feature = self.bottleneck(pooled).flatten(1)
        return {"embedding": pooled.flatten(1), "feature": feature, "logits": feature @ self.weight.T}


class Baseline(nn.Module):
    """fast-reid's meta-architecture."""

    def __init__(self, backbone, width: int, classes: int = 5, gem: bool = False):
        super().__init__()
        self.backbone, self.heads = backbone, Heads(width, classes, gem)

    def forward(self, x):
        features = self.backbone.featuremaps(x) if hasattr(self.backbone, "featuremaps") else self.backbone(x)
        return self.heads(features)


def osnet(channels, *, ibn: bool, attention=(0, 0, 0), heads=None):
    """torchreid's OSNet with the last stream of chosen stages replaced."""
    module = torchreid("osnet")
    model = module.OSNet(
        5, blocks=[module.OSBlock] * 3, layers=[2, 2, 2], channels=list(channels), IN=ibn, loss="triplet"
    )
    for stage, used in zip((model.conv2, model.conv3, model.conv4), attention, strict=True):
        for block in stage[:2] if used else ():
            mid = block.conv1.conv.out_channels
            block.conv2d = nn.Sequential(AttentionStream(mid, heads(mid)))
    return model


def backbone_only(model):
    """A torchreid network without its fc and classifier, for a fast-reid head."""
    del model.classifier
    model.fc = None
    return model


def spcl(backbone, classes: int = 5):
    """SpCL's names: torchvision's stages in a Sequential, a norm and a classifier beside it."""
    stem = [backbone.conv1, backbone.bn1, nn.ReLU(), backbone.maxpool]
    stages = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
    model = nn.Module()
    model.base = nn.Sequential(*stem, *stages)
    model.feat_bn = nn.BatchNorm1d(2048)
    model.classifier = nn.Linear(2048, classes, bias=False)
    model.forward = lambda x: model.feat_bn(model.base(x).mean((2, 3)))
    return model
