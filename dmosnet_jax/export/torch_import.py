"""PyTorch weights as `(params, stats)` of our models, without torch.

    state_dict = torch_import.load("osnet_x0_25_market1501.pth")
    model = models.build(**identify.describe(state_dict))
    params, stats = torch_import.convert(state_dict, model)

`load` never executes what is in the file (see `safe_pickle`); `convert` checks names and shapes in both directions and
reports all differences at once.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmosnet_jax.core.errors import DataError, first, printable
from dmosnet_jax.core.files import tidy
from dmosnet_jax.core.trees import named_leaves
from dmosnet_jax.export import layouts
from dmosnet_jax.export.torch_file import read_tensors
from dmosnet_jax.export.torch_pickle import TensorRef
from dmosnet_jax.models import Model

Tree = dict[str, Any]
StateDict = Mapping[str, np.ndarray]
# A leaf of a model: which of its two trees ("params" or "stats"), and the path there.
_Leaf = tuple[str, str]

# What a backbone trained elsewhere need not share with the model that starts from it.
HEADS = ("fc", "bottleneck", "classifier", "pool")
# Where trainers keep the weights, most specific first.
_WRAPPER_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "state_dict_1",
    "net",
    "network",
    "weights",
    "params",
    "module",
)
_MAX_DEPTH = 4


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What became of a state dict.

    Attributes:
        params: nested dict of float arrays in the model's layout, without what `left_out` names.
        stats: same for batch statistics.
        layout: the recognised layout.
        left_out: the model's leaves that the file does not give, as `missing_ok` permits; `fill` takes them from a
            fresh initialisation.
        unused: entries of the file that were not taken although they are weights: a classifier for a model without
            one, or with another number of classes, and what `unexpected_ok` permits.
    """

    params: Tree
    stats: Tree
    layout: str
    left_out: tuple[str, ...]
    unused: tuple[str, ...]


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the weights in a PyTorch (`.pth`, `.pth.tar`, `.pt`, any version) or `.safetensors` file.

    The state dict is found inside a trainer checkpoint, and prefixes that all names share (`module.`) are removed.
    Where there are several, as of a teacher and a student, or of the parts of a larger model, `FILE#teacher` and
    `FILE#encoder_q` choose one.

    Args:
        path: the file, with or without `#` and an entry or common prefix of names in it.

    Returns:
        Arrays by name in the file's order, in the file's element type (bfloat16 as float32).

    Raises:
        DataError: no such file, damaged, refused because it refers to code that has no place among weights, or without
            tensors.
    """
    file, entry = split_entry(path)
    tensors = read_tensors(file, lambda root: _find_state_dict(root, file, entry))
    if not tensors:
        raise DataError(f"{path}: holds no tensors; give a file with a state dict")
    # Of safetensors, and of a name that no dict has, the entry is what names begin with.
    chosen = layouts.below(layouts.unwrap(tensors).values(), entry) if entry else {}
    if chosen:
        tensors = {chosen[short]: tensors[name] for name, short in layouts.unwrap(tensors).items() if short in chosen}
    return {short: tensors[name] for name, short in layouts.unwrap(tensors).items()}


def split_entry(path: str | os.PathLike[str]) -> tuple[str, str]:
    """A path with the user's home filled in, and what stands behind its `#`; empty where it has none."""
    file = tidy(path)
    if os.path.lexists(file) or "#" not in file:
        return file, ""
    file, _, entry = file.rpartition("#")
    return file, entry


def _find_state_dict(root: Any, where: str, entry: str) -> dict[str, TensorRef]:
    """The named tensors of a bare or wrapped state dict."""
    found = _entries(root)
    if entry in found and entry:
        return found[entry]
    usual = _search(root, 0, set())
    if entry and not layouts.below(layouts.unwrap(usual).values(), entry):
        known = _some([name for name in found if name] or layouts.first_levels(usual))
        raise DataError(f"{where}: has no entry {printable(entry)!r} with tensors; it has {known or 'none'}")
    if usual:
        return usual
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise DataError(
            f"{where}: holds several state dicts: choose one by PATH#ENTRY, with an ENTRY of {_some(list(found))}"
        )
    held = f"its keys are {_some([str(key) for key in root])}" if isinstance(root, dict) and root else "it is empty"
    if not isinstance(root, dict):
        held = f"it holds a {type(root).__name__}"
    raise DataError(
        f"{where}: holds no state dict with named tensors ({held}); save model.state_dict() with torch.save"
    )


def _entries(root: Any) -> dict[str, dict[str, TensorRef]]:
    """Every dict with named tensors by the keys that lead to it, joined by points; the outermost first."""
    found: dict[str, dict[str, TensorRef]] = {}
    level, seen = [("", root)], set[int]()
    for _ in range(_MAX_DEPTH + 1):
        below = []
        for name, node in level:
            # A pickle can hold the same dict many times, and itself.
            if not isinstance(node, dict) or id(node) in seen:
                continue
            seen.add(id(node))
            tensors = _tensors_of(node)
            # An optimiser numbers its tensors.
            if any("." in key for key in tensors):
                found[name] = tensors
            below += [(f"{name}.{key}" if name else key, value) for key, value in node.items() if isinstance(key, str)]
        level = below
    return found


def _tensors_of(node: dict[Any, Any]) -> dict[str, TensorRef]:
    return {key: value for key, value in node.items() if isinstance(key, str) and isinstance(value, TensorRef)}


def _some(names: Sequence[str]) -> str:
    """The first of some names of a file, fit for a message."""
    return first([printable(name, 60) for name in names], join=", ", most=8)


def _search(node: Any, depth: int, seen: set[int]) -> dict[str, TensorRef]:
    # `seen`: a pickle can hold the same dict many times, and itself.
    if not isinstance(node, dict) or depth > _MAX_DEPTH or id(node) in seen:
        return {}
    seen.add(id(node))
    for key in _WRAPPER_KEYS:
        if found := _search(node.get(key), depth + 1, seen):
            return found
    return _tensors_of(node)


def convert(state_dict: StateDict, model: Model, **options: Any) -> tuple[Tree, Tree]:
    """`params` and `stats` of `plan`, which says what the options are and what is raised."""
    result = plan(state_dict, model, **options)
    return result.params, result.stats


def plan(
    state_dict: StateDict,
    model: Model,
    *,
    missing_ok: Sequence[str] = (),
    unexpected_ok: Sequence[str] = (),
    domain: int = -1,
) -> Conversion:
    """Converts a state dict and tells what was not used.

    For a whole model give neither list. To start a model from a backbone trained with another head, as pre-training and
    fine-tuning do, give `missing_ok=HEADS, unexpected_ok=HEADS` and complete the result with `fill`.

    Args:
        state_dict: arrays by name, in any known layout.
        model: what the weights are for.
        missing_ok: top-level names of the model ("classifier") that the file may lack or have in another shape; such
            leaves are absent from the result.
        unexpected_ok: top-level names that the file may have and the model not. A classifier may always be left behind
            by a model without one.
        domain: which domain's norms to take where the file has several; -1 is the last, the target.

    Raises:
        DataError: missing, unexpected, misshapen, doubled or non-finite entries: all of them, in one line.
    """
    layout = layouts.recognise(state_dict)
    surplus = (*unexpected_ok, *(() if model.num_classes else ("classifier",)))
    shapes = {
        (tree, path): leaf
        for tree, root in zip(("params", "stats"), model.shapes(), strict=True)
        for path, leaf in named_leaves(root)
    }
    leaves: dict[_Leaf, np.ndarray] = {}
    found: set[_Leaf] = set()
    unused: list[str] = []
    problems: dict[str, list[str]] = {"missing": [], "misshapen": [], "unexpected": [], "doubled": [], "not finite": []}
    for source, name in layouts.rename(state_dict, layout, domain).items():
        if name is None:
            continue
        value, shown, part = state_dict[source], printable(source), _part_of(name)
        if not isinstance(value, np.ndarray):
            kind = type(value).__name__
            raise DataError(f"{shown} is a {kind}, not an array of NumPy: read the file by `torch_import.load`")
        leaf = _leaf_of(name, shapes)
        if leaf is None:
            (unused if part in surplus else problems["unexpected"]).append(shown)
            continue
        expected = shapes[leaf]
        axes = layouts.KERNEL_AXES.get(value.ndim) if leaf[1].endswith(".kernel") else None
        ours = value if axes is None else value.transpose(axes)
        if ours.shape != expected.shape and part in missing_ok:
            unused.append(shown)
            continue
        if ours.shape != expected.shape:
            problems["misshapen"].append(f"{shown} {value.shape} for {leaf[1]} {expected.shape}")
        elif leaf in found:
            problems["doubled"].append(shown)
        elif not np.isfinite(ours).all():
            problems["not finite"].append(shown)
        else:
            leaves[leaf] = np.array(ours, dtype=expected.dtype, order="C")
        found.add(leaf)
    absent = [path for tree, path in shapes if (tree, path) not in found]
    problems["missing"] = [path for path in absent if _part_of(path) not in missing_ok]
    wrong = {kind: names for kind, names in problems.items() if names}
    if wrong:
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in wrong.items())
        lists = "; ".join(f"{kind}: {first(names, join=', ')}" for kind, names in wrong.items())
        fix = "check model.name, model.attention, model.neck, model.pool and model.variant"
        if list(wrong) == ["not finite"]:
            fix = "its training diverged, or the file is damaged: give an earlier checkpoint"
        raise DataError(f"checkpoint (layout {layout.name}) does not fit model {model.name}: {counts}; {lists}; {fix}")
    left_out = tuple(path for path in absent if _part_of(path) in missing_ok)
    return Conversion(_nested(leaves, "params"), _nested(leaves, "stats"), layout.name, left_out, tuple(unused))


def _leaf_of(name: str, shapes: Mapping[_Leaf, Any]) -> _Leaf | None:
    """The model's leaf for a common name, None where there is none."""
    module, _, last = name.rpartition(".")
    known = layouts.LEAVES.get(last)
    candidates = [] if known is None else [(known.tree, f"{module}.{ours}") for ours in known.names]
    return next((candidate for candidate in candidates if candidate in shapes), None)


def fill(fresh: Tree, loaded: Tree) -> Tree:
    """`fresh` with every leaf of `loaded` in its place; neither is changed.

    Raises:
        DataError: `loaded` has a leaf that `fresh` has not.
    """
    unknown = set(dict(named_leaves(loaded))) - set(dict(named_leaves(fresh)))
    if unknown:
        raise DataError(f"checkpoint: leaves that the model does not have: {first(sorted(unknown), join=', ')}")
    return _overlay(fresh, loaded)


def _overlay(fresh: Any, loaded: Any) -> Any:
    if not isinstance(loaded, Mapping):
        return loaded
    return {key: _overlay(value, loaded[key]) if key in loaded else value for key, value in fresh.items()}


def _part_of(name: str) -> str:
    return name.split(".", 1)[0]


def _nested(leaves: Mapping[_Leaf, np.ndarray], tree: str) -> Tree:
    root: Tree = {}
    for (kind, path), value in leaves.items():
        if kind == tree:
            *modules, last = path.split(".")
            node = root
            for module in modules:
                node = node.setdefault(module, {})
            node[last] = value
    return root
