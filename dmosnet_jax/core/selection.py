"""Which data sets, and which part of one, a config asks for."""

import ast
from collections.abc import Sequence
from typing import Any

from dmosnet_jax.core.errors import ConfigError

# Between the names of data sets that are trained on together.
JOIN = "+"
CRITERIA = ("cfs",)
_EXAMPLE = '("cfs", "runs/cfs/scores.npz", 0.5)'


def dataset_names(value: Any) -> tuple[str, ...]:
    """Names of the data sets that the config's `dataset` means.

    Args:
        value: a name, several joined by `+`, or a sequence of names, also written as text (`("a", "b")`).

    Raises:
        ConfigError: no name, the same one twice, or something else.
    """
    names: Any = value
    if isinstance(value, str):
        names = _literal(value) if value.strip().startswith(("(", "[")) else value.split(JOIN)
    if not isinstance(names, Sequence) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ConfigError(f"dataset={value!r} is not a name: give one, or several as market1501{JOIN}msmt17")
    found = tuple(name.strip() for name in names)
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"dataset={value!r} must name each data set once, e.g. market1501{JOIN}msmt17")
    return found


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None


def joined(names: Sequence[str]) -> str:
    """One name for data sets that are used together."""
    return JOIN.join(names)


def check_subset(subset: Any) -> None:
    """Checks `data.subset`: None, or `(criterion, path, share)`.

    Raises:
        ConfigError: names the value and the fix.
    """
    if subset is None:
        return
    given = tuple(subset) if isinstance(subset, list | tuple) else subset
    where = f"data.subset={given!r}"
    if not isinstance(given, tuple) or len(given) != 3:
        raise ConfigError(f"{where} must be (criterion, path, share), e.g. {_EXAMPLE}")
    criterion, path, share = given
    if criterion not in CRITERIA:
        raise ConfigError(f"{where}: criterion {criterion!r} is not known: use {', '.join(CRITERIA)}")
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{where}: the path must be that of a score file or a list of names, e.g. {_EXAMPLE}")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ConfigError(f"{where}: the share must be greater than 0 and at most 1, e.g. {_EXAMPLE}")
