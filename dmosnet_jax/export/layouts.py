"""Naming rules of the PyTorch code bases whose weights we read and write.

A layout is recognised by the names in a state dict. Its table of prefixes translates them into torchreid's (OSNet) or
torchvision's (ResNet) names, which are also ours, and back; what a leaf called `weight` becomes, and how it is
transposed, is the same for all of them. Adding a layout means adding an entry to `LAYOUTS`, and to
`torch_export.EXPORTS` if it is written too.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from dmosnet_jax.core.errors import DataError, printable

# Wrappers (DataParallel, torch.compile) that put one more level before every name.
_WRAPPERS = ("module.", "_orig_mod.")
# Of a file with names of many kinds, so many first levels are looked below.
_MOST_LEVELS = 20


@dataclasses.dataclass(frozen=True)
class Layout:
    """One code base's names.

    Attributes:
        name: short name, used in messages.
        source: the code that writes it.
        interpolation: filter that its training and evaluation resize images with, a key of `transforms.FILTERS`.
        marks: regular expressions; the layout is recognised where each matches some name.
        prefixes: (theirs, ours); the first that a name begins with is replaced, and a name without one stays. Where
            several of theirs mean the same, the first is written.
        dropped: regular expressions of names that no model of ours has.
        optional: regular expression of a prefix that may come before any name.
    """

    name: str
    source: str
    interpolation: str
    marks: tuple[str, ...]
    prefixes: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = ()
    optional: str = ""

    def common_name(self, name: str) -> str | None:
        """The name that all layouts share, None for a name that is dropped."""
        if any(re.fullmatch(pattern, name) for pattern in (_COUNTER, *self.dropped)):
            return None
        return _replace_prefix(re.sub(f"^{self.optional}", "", name), self.prefixes)

    def own_name(self, name: str) -> str:
        """The inverse of `common_name`."""
        return _replace_prefix(name, [(ours, theirs) for theirs, ours in self.prefixes])


def _replace_prefix(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Where a PyTorch leaf goes: the tree, "params" or "stats", and the possible names there."""

    tree: str
    names: tuple[str, ...]


# Convolution [O, I, kh, kw] -> [kh, kw, I, O] (depthwise [C, 1, kh, kw] too), linear [O, I] -> [I, O].
KERNEL_AXES: Mapping[int, tuple[int, ...]] = {4: (2, 3, 1, 0), 2: (1, 0)}
LEAVES: Mapping[str, Leaf] = {
    "weight": Leaf("params", ("kernel", "scale")),
    "bias": Leaf("params", ("bias",)),
    "p": Leaf("params", ("p",)),
    "running_mean": Leaf("stats", ("mean",)),
    "running_var": Leaf("stats", ("var",)),
}

# A batch counter that torch keeps for cumulative averages; nothing reads it at a fixed momentum.
_COUNTER = r"(?:.*\.)?num_batches_tracked"
# The teacher of a teacher-student pair (OpenUnReID's MMT), which is what is tested.
_TEACHER = r"mean_net\.(?:module\.)?"

# Order matters: more specific layouts first.
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "openunreid",
        "OpenUnReID models/builder.py (ReIDBaseModel, TeacherStudentNetwork)",
        "bicubic",
        marks=(rf"(?:{_TEACHER})?backbone\..*", rf"(?:{_TEACHER})?head\.feat_bn\..*"),
        prefixes=(
            ("head.feat_bn.", "bottleneck."),
            ("global_pooling.", "pool."),
            # Else the last entry would write `backbone.` before it.
            ("classifier.", "classifier."),
            ("backbone.", ""),
        ),
        dropped=(r"net\..*",),
        optional=_TEACHER,
    ),
    Layout(
        "fastreid",
        "fast-reid modeling/meta_arch/baseline.py, modeling/heads/embedding_head.py",
        "bicubic",
        marks=(r"backbone\..*",),
        prefixes=(
            ("heads.bottleneck.0.", "bottleneck."),
            ("heads.bnneck.", "bottleneck."),
            ("heads.pool_layer.", "pool."),
            ("heads.weight", "classifier.weight"),
            ("heads.classifier.weight", "classifier.weight"),
            ("backbone.", ""),
        ),
        dropped=(r"pixel_(?:mean|std)",),
    ),
    Layout(
        "spcl",
        "SpCL spcl/models/resnet.py, resnet_ibn.py (torchvision's stages in an nn.Sequential)",
        "bicubic",
        marks=(r"base\.0\.weight", r"base\.4\..*"),
        prefixes=(
            ("base.0.", "conv1."),
            ("base.1.", "bn1."),
            ("base.4.", "layer1."),
            ("base.5.", "layer2."),
            ("base.6.", "layer3."),
            ("base.7.", "layer4."),
            ("feat_bn.", "bottleneck."),
        ),
    ),
    Layout(
        "torchvision",
        "torchvision models/resnet.py",
        "bilinear",
        marks=(r"layer1\.0\.conv1\.weight", r"fc\.weight"),
        prefixes=(("fc.", "classifier."),),
    ),
    Layout(
        "torchreid",
        "torchreid models/osnet.py, osnet_ain.py, resnet.py",
        "bilinear",
        marks=(r"conv1\.conv\.weight|layer1\.0\.conv1\.weight",),
    ),
)


def unwrap(names: Iterable[str]) -> dict[str, str]:
    """Maps names to themselves without the levels that all of them share.

    `module.` and `_orig_mod.` are always taken off, others (`model.`, `net.`, `encoder_q.`) where the names follow a
    known layout without them.
    """
    result = {name: name for name in names}
    while result and (wrapper := _shared_level(result.values())) in _WRAPPERS:
        result = {name: short.removeprefix(wrapper) for name, short in result.items()}
    bare = result
    while _layout_of(bare.values()) is None:
        level = _shared_level(bare.values())
        if not level:
            return result
        bare = {name: short.removeprefix(level) for name, short in bare.items()}
    return bare


def _shared_level(names: Iterable[str]) -> str:
    """The first level of all names, with its point; empty where they have none in common."""
    first = {name.partition(".")[0] if "." in name else "" for name in names}
    level = first.pop() if len(first) == 1 else ""
    return f"{level}." if level else ""


def _layout_of(names: Iterable[str]) -> Layout | None:
    found = list(names)
    for candidate in LAYOUTS:
        if all(any(re.fullmatch(mark, name) for name in found) for mark in candidate.marks):
            return candidate
    return None


def first_levels(names: Iterable[str]) -> list[str]:
    """What the names begin with, up to their first point, each once."""
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def below(names: Iterable[str], level: str) -> dict[str, str]:
    """The names that begin with a level (or several, joined by points), mapped to what follows it."""
    return {name: name.removeprefix(f"{level}.") for name in names if name.startswith(f"{level}.")}


def recognise(names: Iterable[str]) -> Layout:
    """The layout that a state dict's names are in.

    Raises:
        DataError: none of the known ones.
    """
    short = list(unwrap(names).values())
    layout = _layout_of(short)
    if layout is not None:
        return layout
    levels = first_levels(short)
    inner = [
        level
        for level in levels[:_MOST_LEVELS]
        if _layout_of(unwrap(part.values()).values() if (part := below(short, level)) else ())
    ]
    if inner:
        parts = ", ".join(map(printable, levels[:5]))
        raise DataError(
            f"checkpoint: its {len(short)} tensors are of several parts ({parts}, ...): "
            f"choose one by PATH#{' or PATH#'.join(map(printable, inner))}"
        )
    first = ", ".join(printable(name) for name in short[:3]) or "none"
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise DataError(
        f"checkpoint: the names of its {len(short)} tensors ({first}, ...) follow no known layout ({known})"
    )


def rename(names: Iterable[str], layout: Layout, domain: int = -1) -> dict[str, str | None]:
    """New name of every entry, None for those dropped by rule.

    Args:
        names: names in the file.
        layout: their layout.
        domain: which domain's norms to take where a model keeps one set per domain (`dsbn.<i>` in OpenUnReID, `BN_S`
            and `BN_T` in SpCL); -1 is the last, the target in both.

    Raises:
        DataError: there is no such domain.
    """
    short = unwrap(names)
    chosen = _choose_domain(short.values(), domain)
    plain = {name: _without_domain(wrapped, chosen) for name, wrapped in short.items()}
    return {name: None if kept is None else layout.common_name(kept) for name, kept in plain.items()}


_DOMAIN = re.compile(r"(?:(?<=\.)|^)(?:dsbn\.(\d{1,3})|BN_([ST]))\.")


def _domain_of(name: str) -> int | None:
    match = _DOMAIN.search(name)
    if match is None:
        return None
    return int(match.group(1)) if match.group(1) else "ST".index(match.group(2))


def _choose_domain(names: Iterable[str], domain: int) -> int:
    count = 1 + max((index for index in map(_domain_of, names) if index is not None), default=-1)
    if count and not -count <= domain < count:
        raise DataError(f"checkpoint: domain={domain} asked for, but its norms have domains 0 to {count - 1}")
    return domain % count if count else 0


def _without_domain(name: str, chosen: int) -> str | None:
    """The name without its domain level, None for a norm of another domain."""
    index = _domain_of(name)
    if index is None:
        return name
    return _DOMAIN.sub("", name, count=1) if index == chosen else None
