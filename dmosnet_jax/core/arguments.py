"""What public functions ask of their arguments: numbers, vectors of whole numbers, matrices.

Each check gives the argument back as the function needs it, or raises one line that names the function, the argument,
what it is and what it must be. Only functions that a user calls check; what they call may trust them.
"""

import contextlib
import reprlib
from typing import Any

import numpy as np

from dmosnet_jax.core.errors import ArgumentError, DataError

_EXACT = 2.0**53


def count(name: str, value: Any, *, least: int = 1, most: int = 2**31 - 1) -> int:
    """A whole number.

    Args:
      name: function and argument, as a user knows them: "search: top_k".
      value: its value.
      least: the lowest that is allowed.
      most: the highest.

    Raises:
      ArgumentError: it is none, or outside.
    """
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_whole or not least <= value <= most:
        ends = f"of at most {most:,}" if is_whole and value > most else f"of at least {least}"
        raise ArgumentError(f"{name}={reprlib.repr(value)} must be a whole number {ends}")
    return int(value)


def number(name: str, value: Any, *, low: float = -np.inf, high: float = np.inf) -> float:
    """A finite number between two others, both of them allowed.

    Raises:
      ArgumentError: it is none, or lies outside.
    """
    found = np.nan
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        # Python's integers may be larger than any float.
        with contextlib.suppress(OverflowError):
            found = float(value)
    if not (low <= found <= high and np.isfinite(found)):
        ends = [f"of at least {low:g}"] * (low > -np.inf) + [f"of at most {high:g}"] * (high < np.inf)
        raise ArgumentError(f"{name}={reprlib.repr(value)} must be a number {' and '.join(ends)}".rstrip())
    return found


def numbers(what: str, values: Any, *, shape: str = "") -> np.ndarray:
    """An array of real numbers, as it is.

    Args:
      what: function and argument, in the plural: "search: queries".
      values: anything that NumPy takes for an array.
      shape: of how many dimensions it must be, by their names: "images, dimension"; "" for any.

    Raises:
      DataError: it is no such array.
    """
    try:
        array = np.asarray(values)
    # Lists of different lengths; arrays of JAX that are on other hosts.
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{what} are no array ({str(error).splitlines()[0]}); give an array of numbers") from error
    # bfloat16 is of no kind that NumPy knows.
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise DataError(f"{what} are {array.dtype}{list(array.shape)}; give an array of numbers")
    if shape and array.ndim != shape.count(",") + 1:
        raise DataError(f"{what} have shape {array.shape}; expected [{shape}]")
    return array


def arrays(**given: Any) -> None:
    """Raises ArgumentError for what is no array of JAX or NumPy; under `jax.jit` too."""
    # Worker processes that only decode do without JAX.
    import jax

    for name, value in given.items():
        if not isinstance(value, np.ndarray | jax.Array):
            raise ArgumentError(f"{name} are a {type(value).__name__}: give an array of JAX or NumPy")


def matrix(what: str, values: Any, *, may_be_empty: bool = False) -> np.ndarray:
    """Features: float32 [images, dimension], contiguous; what is not finite stays so.

    Raises:
      DataError: not a matrix of numbers, or without rows (unless that is allowed) or columns.
    """
    array = numbers(what, values)
    if array.ndim != 2 or array.shape[1] == 0 or (array.shape[0] == 0 and not may_be_empty):
        raise DataError(f"{what} have shape {array.shape}; expected [images, dimension], not empty")
    # What float32 can't hold becomes infinite, and is then told as such.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, np.float32)


def integers(what: str, values: Any, *, length: int | None = None) -> np.ndarray:
    """A vector of whole numbers, int64; floats are taken where they are whole.

    Raises:
      DataError: it is none, or of another length.
    """
    array = numbers(what, values, shape="images")
    if array.dtype.kind not in "iu" or array.dtype == np.uint64:
        wide = array.astype(np.float64)
        bad = np.flatnonzero(~(np.abs(wide) <= _EXACT) | (wide != np.rint(wide)))
        if bad.size:
            raise DataError(f"{what} have {array[bad[0]]} in row {bad[0]}; expected whole numbers")
    if length is not None and len(array) != length:
        raise DataError(f"{what} have {len(array)} rows; expected {length}, one for each image")
    return np.ascontiguousarray(array, np.int64)


def rows(what: str, values: Any, total: int) -> np.ndarray:
    """Positions among `total` images, int64.

    Raises:
      DataError: not whole numbers, or some of them lie outside.
    """
    found = integers(what, values)
    bad = np.flatnonzero((found < 0) | (found >= total))
    if bad.size:
        raise DataError(f"{what} have {found[bad[0]]} in place {bad[0]}; there are images 0 to {total - 1}")
    return found


def first_not_finite(features: np.ndarray) -> tuple[int, int] | None:
    """How many rows of a float32 matrix are not finite (or too long for that), and the first; None where all are."""
    # A row's square is finite exactly when the row is: one pass, and nothing of the matrix's size.
    bad = np.flatnonzero(~np.isfinite(np.einsum("nd,nd->n", features, features)))
    return (bad.size, int(bad[0])) if bad.size else None
