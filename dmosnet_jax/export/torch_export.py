"""Our weights as PyTorch state dicts, the inverse of `torch_import`.

    state_dict = torch_export.to_state_dict(params, stats, model, layout="fastreid")
    torch_export.save("dmosnet.safetensors", state_dict)

The names and transpositions are the tables of `layouts` read backwards, so importing an exported file, or exporting an
imported one, returns every tensor bit for bit.
"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.core.trees import check, named_leaves
from dmosnet_jax.export.layouts import KERNEL_AXES, LAYOUTS, LEAVES, Layout
from dmosnet_jax.export.torch_write import write_pth
from dmosnet_jax.models import Model

Tree = dict[str, Any]
SUFFIXES = (".safetensors", ".pth", ".pt")

# Name of a leaf in PyTorch by its tree and name in ours.
_TORCH_LEAVES = {(leaf.tree, ours): theirs for theirs, leaf in LEAVES.items() for ours in leaf.names}


def to_state_dict(
    params: Tree, stats: Tree, model: Model, *, layout: str = "torchreid", batches: int = 0
) -> dict[str, np.ndarray]:
    """Weights by the names of a PyTorch code base.

    Args:
        params: the model's parameters.
        stats: its batch statistics.
        model: the model.
        layout: "torchreid", "fastreid", "openunreid" or "spcl".
        batches: value of the `num_batches_tracked` counters, which we don't keep and nothing reads.

    Returns:
        Arrays that share no memory with the trees.

    Raises:
        ConfigError: that code base has no such network, so that the file would compute something else there.
        DataError: the arrays are not the model's.
    """
    check_layout(model, layout)
    check(f"{model.name} for {layout}", model.shapes(), (params, stats))
    return by_torch_names(params, stats, batches=batches, layout=_NAMES[layout])


def by_torch_names(
    params: Tree, stats: Tree, *, batches: int = 0, layout: Layout | None = None
) -> dict[str, np.ndarray]:
    """`to_state_dict` without a check, under the names of a layout, or under those that all layouts share."""
    result: dict[str, np.ndarray] = {}
    for tree, root in (("params", params), ("stats", stats)):
        for path, value in named_leaves(root):
            module, _, last = path.rpartition(".")
            name = f"{module}.{_TORCH_LEAVES[tree, last]}"
            name = name if layout is None else layout.own_name(name)
            result[name] = _to_torch(np.asarray(value), kernel=last == "kernel")
            if last == "var":
                counter = name.removesuffix("running_var") + "num_batches_tracked"
                result[counter] = np.asarray(batches, np.int64)
    return result


def _to_torch(value: np.ndarray, *, kernel: bool) -> np.ndarray:
    axes = KERNEL_AXES.get(value.ndim) if kernel else None
    theirs = value if axes is None else value.transpose(np.argsort(axes))
    return np.array(theirs, order="C")


def check_layout(model: Model, layout: str) -> None:
    """Checks that a code base has the model's network.

    Raises:
        ConfigError: it has not; names the layouts that do.
    """
    if layout not in EXPORTS:
        raise ConfigError(f"layout={layout!r} is not known: use one of {', '.join(EXPORTS)}")
    problem = EXPORTS[layout](model)
    if problem:
        others = [other for other in EXPORTS if fits(model, other)]
        advice = f"use layout={' or '.join(others)}" if others else "export it as a folder of ours instead"
        raise ConfigError(f"layout={layout!r} has no {problem} (model {model.name}): {advice}")


def fits(model: Model, layout: str) -> bool:
    """Whether the code base of a layout has the model's network."""
    return EXPORTS[layout](model) is None


def _torchreid_lacks(model: Model) -> str | None:
    if model.pool == "gem":
        return "GeM pooling"
    wanted = {"none": "torchreid", "fc": "spcl"}.get(model.neck)
    if model.name.startswith("resnet") and model.variant != wanted:
        return f"ResNet with neck={model.neck} and variant={model.variant}"
    return None


def _fastreid_lacks(model: Model) -> str | None:
    other = model.name.startswith("resnet") and model.variant != "fastreid"
    return _bnneck_lacks(model) or (f"ResNet of variant={model.variant!r}" if other else None)


def _openunreid_lacks(model: Model) -> str | None:
    other = not model.name.startswith("resnet") or model.variant != "spcl" or model.neck != "bnneck"
    network = f"network of variant={model.variant!r} and neck={model.neck!r}"
    return _bnneck_lacks(model) or (network if other else None)


def _spcl_lacks(model: Model) -> str | None:
    return _openunreid_lacks(model) or ("GeM pooling" if model.pool == "gem" else None)


def _bnneck_lacks(model: Model) -> str | None:
    """What fast-reid and those after it lack: their classifiers have no bias, and there is no OSNet-AIN."""
    biased = model.num_classes and model.neck == "none" and model.classifier == "linear"
    if model.neck == "fc" or biased:
        return f"neck={model.neck!r}"
    return "OSNet-AIN" if model.name.startswith("osnet_ain") else None


_NAMES = {layout.name: layout for layout in LAYOUTS}
# The layouts that are also written, those of the code bases that have a network of ours: model -> what of it the code
# base has not, in words, or None where it has such a network.
EXPORTS: Mapping[str, Callable[[Model], str | None]] = {
    "torchreid": _torchreid_lacks,
    "fastreid": _fastreid_lacks,
    "openunreid": _openunreid_lacks,
    "spcl": _spcl_lacks,
}


def save(
    path: str | os.PathLike[str], state_dict: Mapping[str, np.ndarray], *, about: Mapping[str, str] | None = None
) -> None:
    """Writes a state dict as `.safetensors`, `.pth` or `.pt`, by the suffix; it appears whole or not at all.

    Args:
        path: the file.
        state_dict: arrays by name.
        about: texts for the header of a `.safetensors` file.

    Raises:
        ConfigError: another suffix.
        DataError: the file can't be written.
    """
    suffix = pathlib.Path(path).suffix
    if suffix not in SUFFIXES:
        raise ConfigError(f"{path}: the suffix must be one of {', '.join(SUFFIXES)}")
    if suffix == ".safetensors":
        with atomic_write(path) as part:
            # The library's own file could be read by its owner alone.
            metadata = {"format": "pt", **(about or {})}
            part.write_bytes(safetensors.numpy.save(dict(state_dict), metadata=metadata))
    else:
        write_pth(path, state_dict)
