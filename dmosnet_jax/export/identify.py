"""What network a PyTorch state dict belongs to, from its names and shapes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dmosnet_jax.export import layouts
from dmosnet_jax.models import names as model_names
from dmosnet_jax.models.osnet import CHANNELS

StateDict = Mapping[str, np.ndarray]


def describe(state_dict: StateDict) -> dict[str, Any]:
    """Options of `models.build` that the weights tell.

    Returns:
        `name`, `attention`, `neck`, `pool` and `variant`; None where they don't tell, as for a network of another kind.
        `pool` is never None: "gem" where there is a GeM exponent, else "avg".

    Raises:
        DataError: the names follow no known layout.
    """
    names, layout = _common_names(state_dict), layouts.recognise(state_dict).name
    described: dict[str, Any] = {"name": None, "attention": None, "variant": None}
    if "layer1.0.conv1.weight" in names:
        described |= {"name": _resnet(names), "variant": _variant(names, layout)}
    elif "conv1.conv.weight" in names:
        width = next(iter(state_dict[names["conv1.conv.weight"]].shape), 0)
        described["name"], described["attention"] = _osnet(names, width)
    return {**described, "neck": _neck(names, layout), "pool": "gem" if "pool.p" in names else "avg"}


def infer_num_classes(state_dict: StateDict) -> int:
    """Number of classes of the classifier in the file, 0 for none."""
    source = _common_names(state_dict).get("classifier.weight")
    return 0 if source is None or state_dict[source].ndim != 2 else int(state_dict[source].shape[0])


def infer_batches(state_dict: StateDict) -> int:
    """The largest `num_batches_tracked` of a PyTorch file, 0 without any; in a trained network all are equal."""
    counters = [int(value) for name, value in state_dict.items() if name.endswith("num_batches_tracked")]
    return max(counters, default=0)


def _common_names(state_dict: StateDict) -> dict[str, str]:
    """Names in the file by the name that all layouts are translated to."""
    renamed = layouts.rename(state_dict, layouts.recognise(state_dict))
    return {common: name for name, common in renamed.items() if common is not None}


def _neck(names: Mapping[str, str], layout: str) -> str | None:
    """None for a backbone alone."""
    if "fc.0.weight" in names:
        return "fc"
    if "bottleneck.running_mean" in names:
        return "bnneck"
    # torchreid's ResNets classify the pooled map; torchvision's do too, but only to be started from.
    plain = layout == "torchreid" and "layer1.0.conv1.weight" in names and "classifier.weight" in names
    return "none" if plain else None


def _resnet(names: Mapping[str, str]) -> str | None:
    blocks = [sum(f"layer{layer}.{block}.conv3.weight" in names for block in range(64)) for layer in (1, 2, 3, 4)]
    if blocks != [3, 4, 6, 3]:
        return None
    return "resnet50_ibn_a" if "layer1.0.bn1.IN.weight" in names else "resnet50"


def _variant(names: Mapping[str, str], layout: str) -> str | None:
    if layout in ("fastreid", "spcl"):
        return layout
    if layout == "openunreid" or "fc.0.weight" in names:
        return "spcl"
    return "torchreid" if _neck(names, layout) == "none" else None


def _osnet(names: Mapping[str, str], stem: int) -> tuple[str | None, tuple[int, ...] | None]:
    width = next((key for key, channels in CHANNELS.items() if channels[0] == stem), None)
    if "conv2.0.conv2.0.layers.0.conv1.weight" in names:
        family, mask = "osnet_ain", None
    else:
        mask = tuple(int(f"{stage}.0.conv2d.0.attn2.qkv.weight" in names) for stage in ("conv2", "conv3", "conv4"))
        family = ("dmosnet" if any(mask) else "osnet") + ("_ibn" if "conv2.0.IN.weight" in names else "")
    name = f"{family}_{width}"
    return (name, mask) if name in model_names() else (None, None)
