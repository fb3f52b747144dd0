"""The run-time check of array annotations: `Float[np.ndarray, "n d"]` names kind, axes and axes of equal length."""

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def check_arrays(function: Callable) -> Callable:
    """Beartype for the array annotations of a function; others are left to mypy, since tests pass stand-ins."""
    arrays = {name: hint for name, hint in function.__annotations__.items() if _names_an_array(hint)}
    function.__annotations__ = arrays
    return beartype(function) if arrays else function


def _names_an_array(hint: Any) -> bool:
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(_names_an_array, get_args(hint)))
