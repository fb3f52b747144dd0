"""Nested dicts of arrays, seen by name."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dmosnet_jax.core.errors import DataError, first


def named_leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of dotted name and leaf of nested mappings, in order."""
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from named_leaves(value, name)
        else:
            yield name, value


def differences(expected: Any, found: Any) -> list[str]:
    """Every way in which the shapes of `found` differ from those of `expected`, one sentence part each."""
    wanted = {name: tuple(leaf.shape) for name, leaf in named_leaves(expected)}
    given = {name: tuple(leaf.shape) for name, leaf in named_leaves(found)}
    missing = [f"missing {name}" for name in wanted if name not in given]
    unexpected = [f"unexpected {name}" for name in given if name not in wanted]
    shared = [name for name in wanted if name in given and wanted[name] != given[name]]
    return missing + unexpected + [f"{name} has shape {given[name]}, not {wanted[name]}" for name in shared]


def check(where: str, expected: Iterable[Any], found: Iterable[Any]) -> None:
    """Raises DataError where trees, `params` and `stats`, are not nested dicts of the expected names and shapes."""
    for wanted, tree in zip(expected, found, strict=True):
        leaves = [leaf for _, leaf in named_leaves(tree)] if isinstance(tree, Mapping) else [None]
        if not all(hasattr(leaf, "shape") for leaf in leaves):
            raise DataError(
                f"{where}: the weights are no nested dicts of arrays: give `params` and `stats` of the model"
            )
        problems = differences(wanted, tree)
        if problems:
            raise DataError(f"{where}: the arrays are not those of the model: {first(problems, most=4)}")
