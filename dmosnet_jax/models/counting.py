"""Parameters of a network, and multiply-adds of a traced function, counted over its jaxpr."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

from dmosnet_jax.core import simd
from dmosnet_jax.models.build import Model
from dmosnet_jax.models.convolution import DEPTHWISE_SCOPE, MERGED_SCOPE


@dataclasses.dataclass(frozen=True)
class Operations:
    """Multiply-adds by kind.

    Attributes:
        weighted: products with weights: convolutions and linear maps, as other counters count them.
        attention: products of activations with activations: attention scores and their sums.
    """

    weighted: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        """All multiply-adds."""
        return self.weighted + self.attention

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(self.weighted + other.weighted, self.attention + other.attention)

    def __mul__(self, times: int) -> "Operations":
        return Operations(self.weighted * times, self.attention * times)


def parameters(model: Model) -> int:
    """Parameters of a network without classifier and BNNeck, as the reference figures count them."""
    params, _ = model.shapes()
    parts = [part for name, part in params.items() if name not in ("bottleneck", "classifier")]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parts))


def operations(model: Model) -> Operations:
    """Multiply-adds of a network's feature of one image, traced and never run."""
    images = jax.ShapeDtypeStruct((1, *model.image_size, 3), np.float32)

    def run(params, stats, images):
        return model.apply(params, stats, images, train=False)[0]["feature"]

    return count(run, *model.shapes(), images)


def count(function: Callable[..., Any], *arguments: Any) -> Operations:
    """Multiply-adds of one call.

    A convolution counts every tap of its window, also where that lies on the padding. Element-wise products (norms,
    gates) and additions do not count, except for the depthwise convolution, which is written as element-wise products.

    Args:
        function: traced, never run.
        *arguments: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: the function has a loop of unknown length.
    """
    # A call of a kernel does not tell what it computes.
    with simd.portable():
        return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr: core.Jaxpr) -> Operations:
    return sum(map(_of_equation, jaxpr.eqns), Operations())


def _of_equation(equation: Any) -> Operations:
    name = equation.primitive.name
    output: Any = equation.outvars[0].aval if equation.outvars else None
    if name == "dot_general":
        (contracted, _), (batched, _) = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        products = output.size * math.prod(shape[axis] for axis in contracted)
        # Weights have no batch: products over one are of activations with each other.
        return Operations(attention=products) if batched else Operations(weighted=products)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        if MERGED_SCOPE in str(equation.source_info.name_stack):
            # As the 1x1 and the depthwise 3x3 convolution that it stands for.
            taps = 9
            return Operations(weighted=output.size * (math.prod(kernel) // outputs // taps + taps))
        return Operations(weighted=output.size * math.prod(kernel) // outputs)
    if name == "mul" and DEPTHWISE_SCOPE in str(equation.source_info.name_stack):
        return Operations(weighted=output.size)
    if name in ("while", "cond"):
        raise ValueError(f"a function with {name!r} has no fixed number of operations")
    times = equation.params["length"] if name == "scan" else 1
    return sum(map(_of_jaxpr, _inner(equation)), Operations()) * times


def _inner(equation: Any) -> Iterator[core.Jaxpr]:
    """The jaxpr that a call (`jit`, `scan`, `custom_vjp_call`, ...) runs."""
    for key in ("jaxpr", "call_jaxpr"):
        inner = equation.params.get(key)
        if inner is not None:
            yield getattr(inner, "jaxpr", inner)
            return
