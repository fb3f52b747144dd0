"""Naming rules of the PyTorch code bases whose weights we read.

A layout is recognised by the names in a state dict and renames them into torchreid's (OSNet) or torchvision's (ResNet)
names, which are also ours; what a leaf called `weight` becomes, and how it is transposed, is the same for all of them.
Adding a layout means adding an entry to `LAYOUTS`.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from dmosnet_jax.core.errors import DataError, printable

# Wrappers (DataParallel, torch.compile) that put one more level before every name.
_WRAPPERS = ("module.", "_orig_mod.")


class Rule(NamedTuple):
    """Renames what `pattern` matches from end to end to `target`; None drops the entry, which no model of ours has."""

    pattern: str
    target: str | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """One code base's names.

    Attributes:
        name: short name, used in messages.
        source: the code that writes it.
        interpolation: filter that its training and evaluation resize images with, a key of `transforms.FILTERS`.
        marks: regular expressions; the layout is recognised where each matches some name.
        rules: renaming; a name that no rule matches stays.
    """

    name: str
    source: str
    interpolation: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Where a PyTorch leaf goes: the tree and the possible names there, and how it is transposed by rank."""

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
_COUNTER = Rule(r"(?:.*\.)?num_batches_tracked", None)

# Order matters: more specific layouts first. Teacher-student pairs (OpenUnReID's MMT) are tested by their teacher.
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "openunreid",
        "OpenUnReID models/builder.py (ReIDBaseModel, TeacherStudentNetwork)",
        "bicubic",
        (r"(?:mean_net\.(?:module\.)?)?backbone\..*", r"(?:mean_net\.(?:module\.)?)?head\.feat_bn\..*"),
        (
            _COUNTER,
            Rule(r"net\..*", None),
            Rule(r"(?:mean_net\.(?:module\.)?)?backbone\.(.+)", r"\1"),
            Rule(r"(?:mean_net\.(?:module\.)?)?head\.feat_bn\.(.+)", r"bottleneck.\1"),
            Rule(r"(?:mean_net\.(?:module\.)?)?global_pooling\.(.+)", r"pool.\1"),
            Rule(r"mean_net\.(?:module\.)?(.+)", r"\1"),
        ),
    ),
    Layout(
        "fastreid",
        "fast-reid modeling/meta_arch/baseline.py, modeling/heads/embedding_head.py",
        "bicubic",
        (r"backbone\..*",),
        (
            _COUNTER,
            Rule(r"pixel_(?:mean|std)", None),
            Rule(r"backbone\.(.+)", r"\1"),
            Rule(r"heads\.bottleneck\.0\.(.+)", r"bottleneck.\1"),
            Rule(r"heads\.bnneck\.(.+)", r"bottleneck.\1"),
            Rule(r"heads\.pool_layer\.(.+)", r"pool.\1"),
            Rule(r"heads\.(?:classifier\.)?weight", r"classifier.weight"),
        ),
    ),
    Layout(
        "spcl",
        "SpCL spcl/models/resnet.py, resnet_ibn.py (torchvision's stages in an nn.Sequential)",
        "bicubic",
        (r"base\.0\.weight", r"base\.4\..*"),
        (
            _COUNTER,
            Rule(r"base\.0\.(.+)", r"conv1.\1"),
            Rule(r"base\.1\.(.+)", r"bn1.\1"),
            Rule(r"base\.4\.(.+)", r"layer1.\1"),
            Rule(r"base\.5\.(.+)", r"layer2.\1"),
            Rule(r"base\.6\.(.+)", r"layer3.\1"),
            Rule(r"base\.7\.(.+)", r"layer4.\1"),
            Rule(r"feat_bn\.(.+)", r"bottleneck.\1"),
        ),
    ),
    Layout(
        "torchvision",
        "torchvision models/resnet.py",
        "bilinear",
        (r"layer1\.0\.conv1\.weight", r"fc\.weight"),
        (_COUNTER, Rule(r"fc\.(weight|bias)", r"classifier.\1")),
    ),
    Layout(
        "torchreid",
        "torchreid models/osnet.py, osnet_ain.py, resnet.py",
        "bilinear",
        (r"conv1\.conv\.weight|layer1\.0\.conv1\.weight",),
        (_COUNTER,),
    ),
)


# The same rules backwards, for the code bases that have a network of ours.
EXPORTS: Mapping[str, tuple[Rule, ...]] = {
    "torchreid": (),
    "fastreid": (
        Rule(r"bottleneck\.(.+)", r"heads.bottleneck.0.\1"),
        Rule(r"pool\.(.+)", r"heads.pool_layer.\1"),
        Rule(r"classifier\.weight", "heads.weight"),
        Rule(r"(.+)", r"backbone.\1"),
    ),
    "openunreid": (
        Rule(r"bottleneck\.(.+)", r"head.feat_bn.\1"),
        Rule(r"pool\.(.+)", r"global_pooling.\1"),
        Rule(r"(classifier\..+)", r"\1"),
        Rule(r"(.+)", r"backbone.\1"),
    ),
    "spcl": (
        Rule(r"conv1\.(.+)", r"base.0.\1"),
        Rule(r"bn1\.(.+)", r"base.1.\1"),
        Rule(r"layer1\.(.+)", r"base.4.\1"),
        Rule(r"layer2\.(.+)", r"base.5.\1"),
        Rule(r"layer3\.(.+)", r"base.6.\1"),
        Rule(r"layer4\.(.+)", r"base.7.\1"),
        Rule(r"bottleneck\.(.+)", r"feat_bn.\1"),
    ),
}


def unwrap(names: Iterable[str]) -> dict[str, str]:
    """Maps names to themselves without the wrapper levels (`module.`) that all of them share."""
    result = {name: name for name in names}
    while result:
        wrapper = next((w for w in _WRAPPERS if all(name.startswith(w) for name in result.values())), None)
        if wrapper is None:
            break
        result = {name: short.removeprefix(wrapper) for name, short in result.items()}
    return result


def recognise(names: Iterable[str]) -> Layout:
    """The layout that a state dict's names are in.

    Raises:
        DataError: none of the known ones.
    """
    short = list(unwrap(names).values())
    for candidate in LAYOUTS:
        if all(any(re.fullmatch(mark, name) for name in short) for mark in candidate.marks):
            return candidate
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
    return {name: None if kept is None else apply_rules(kept, layout.rules) for name, kept in plain.items()}


def apply_rules(name: str, rules: Iterable[Rule]) -> str | None:
    """The new name by the first rule that matches, None where it drops the entry; a name without a rule stays."""
    for rule in rules:
        if match := re.fullmatch(rule.pattern, name):
            return None if rule.target is None else match.expand(rule.target)
    return name


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
