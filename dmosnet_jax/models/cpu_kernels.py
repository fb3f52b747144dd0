"""The kernels of `cpu_norms` and `cpu_products` as calls of XLA's CPU programs."""

import functools
import hashlib
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmosnet_jax.core import simd
from dmosnet_jax.core.simd import WIDTH
from dmosnet_jax.models import cpu_norms, cpu_products


def fits(shape: tuple[int, ...]) -> bool:
    """Whether the rows of a map `[B, H, W, C]` are whole vectors, whose channels begin anew at a row's end."""
    _, _, width, channels = shape
    return (width * channels) % math.lcm(channels, WIDTH) == 0


_MAKERS: dict[str, Callable[..., Any]] = {
    "moments": cpu_norms.moments_kernel,
    "outputs": cpu_norms.outputs_kernel,
    "sums": cpu_norms.sums_kernel,
    "gradients": cpu_norms.gradients_kernel,
    "products": cpu_products.products_kernel,
    "multiply": cpu_products.multiply_kernel,
    "stem": cpu_products.stem_kernel,
}


@functools.cache
def target() -> str:
    """Name of the call target of these kernels."""
    files = (module.__file__ or "" for module in (simd, cpu_norms, cpu_products))
    sources = b"".join(pathlib.Path(file).read_bytes() for file in (*files, __file__))
    return simd.register(f"dmosnet_jax_{hashlib.sha256(sources).hexdigest()[:16]}")


def call(kind: str, shapes: Sequence[tuple[int, ...]], *arguments: jax.Array | None, **flags: bool) -> list[jax.Array]:
    """Runs a kernel: see the function that makes it, `_MAKERS[kind]`, for its arguments, results and flags.

    Args:
        kind: a key of `_MAKERS`.
        shapes: of the results, which are float32.
        *arguments: float32 arrays; None for one that is not read.
        **flags: of the maker, in its order.
    """
    variant = (kind, *flags.values())
    number = _VARIANTS.index(variant)
    _compile(number)
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    given = [jnp.zeros((0,), jnp.float32) if argument is None else argument for argument in arguments]
    return list(jax.ffi.ffi_call(target(), results)(*given, kernel=np.int64(number)))


_NORMS = [(True, True, False), (False, True, False), (False, False, False), (False, True, True)]
_VARIANTS: list[tuple[Any, ...]] = [
    ("products",),
    ("multiply",),
    ("stem",),
    ("moments", False),
    ("moments", True),
    *((kind, *flags) for kind in ("outputs", "sums", "gradients") for flags in _NORMS),
]


@functools.cache
def _compile(number: int) -> None:
    kind, *flags = _VARIANTS[number]
    simd.place(number, _MAKERS[kind](*flags))
