"""What network a state dict belongs to, from its names and shapes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dmosnet_jax.export import layouts
from dmosnet_jax.models import names as model_names
from dmosnet_jax.models.osnet import CHANNELS

StateDict = Mapping[str, np.ndarray]


def layout(state_dict: StateDict) -> str:
    """Name of the layout: "torchreid", "fastreid", "openunreid", "spcl" or "torchvision".

    Raises:
        DataError: the names follow none of them.
    """
    return layouts.recognise(state_dict).name


def infer_neck(state_dict: StateDict) -> str | None:
    """The neck that the weights have: "fc", "bnneck", "none", or None for a backbone alone."""
    return _neck(_target_names(state_dict), layout(state_dict))


def infer_pool(state_dict: StateDict) -> str:
    """The pooling that the weights have: "gem" (a learned exponent) or "avg"."""
    return "gem" if "pool.p" in _target_names(state_dict) else "avg"


def infer_num_classes(state_dict: StateDict) -> int:
    """Number of classes of the classifier in the file, 0 for none."""
    source = _target_names(state_dict).get("classifier.weight")
    return 0 if source is None or state_dict[source].ndim != 2 else int(state_dict[source].shape[0])


def infer_batches(state_dict: StateDict) -> int:
    """The largest `num_batches_tracked` of a PyTorch file, 0 without any; in a trained network all are equal."""
    counters = [int(value) for name, value in state_dict.items() if name.endswith("num_batches_tracked")]
    return max(counters, default=0)


def describe(state_dict: StateDict) -> dict[str, Any]:
    """Options of `models.build` that the weights tell.

    Returns:
        `name`, `attention`, `neck`, `pool` and `variant`; None where they don't tell, as for a network of another kind.

    Raises:
        DataError: the names follow no known layout.
    """
    names = _target_names(state_dict)
    style = layout(state_dict)
    described: dict[str, Any] = {"name": None, "attention": None, "variant": None}
    if "layer1.0.conv1.weight" in names:
        described["name"] = _resnet(names)
        described["variant"] = _variant(names, style)
    elif "conv1.conv.weight" in names:
        width = next(iter(state_dict[names["conv1.conv.weight"]].shape), 0)
        described["name"], described["attention"] = _osnet(names, width)
    return {**described, "neck": _neck(names, style), "pool": "gem" if "pool.p" in names else "avg"}


def _target_names(state_dict: StateDict, domain: int = -1) -> dict[str, str]:
    """Names in the file by their common name."""
    renamed = layouts.rename(state_dict, layouts.recognise(state_dict), domain)
    return {target: name for name, target in renamed.items() if target is not None}


def _neck(names: Mapping[str, str], style: str) -> str | None:
    if "fc.0.weight" in names:
        return "fc"
    if "bottleneck.running_mean" in names:
        return "bnneck"
    # torchreid's ResNets classify the pooled map; torchvision's do too, but only to be started from.
    plain = style == "torchreid" and "layer1.0.conv1.weight" in names and "classifier.weight" in names
    return "none" if plain else None


def _resnet(names: Mapping[str, str]) -> str | None:
    blocks = [sum(f"layer{layer}.{block}.conv3.weight" in names for block in range(64)) for layer in (1, 2, 3, 4)]
    if blocks != [3, 4, 6, 3]:
        return None
    return "resnet50_ibn_a" if "layer1.0.bn1.IN.weight" in names else "resnet50"


def _variant(names: Mapping[str, str], style: str) -> str | None:
    if style in ("fastreid", "spcl"):
        return style
    if style == "openunreid" or "fc.0.weight" in names:
        return "spcl"
    return "torchreid" if _neck(names, style) == "none" else None


def _osnet(names: Mapping[str, str], stem: int) -> tuple[str | None, tuple[int, ...] | None]:
    width = next((key for key, channels in CHANNELS.items() if channels[0] == stem), None)
    if "conv2.0.conv2.0.layers.0.conv1.weight" in names:
        family, mask = "osnet_ain", None
    else:
        mask = tuple(int(f"{stage}.0.conv2d.0.attn2.qkv.weight" in names) for stage in ("conv2", "conv3", "conv4"))
        family = ("dmosnet" if any(mask) else "osnet") + ("_ibn" if "conv2.0.IN.weight" in names else "")
    name = f"{family}_{width}"
    return (name, mask) if name in model_names() else (None, None)
