"""Compares forms of the depthwise 3x3 and 1x1 convolution on the current backend.

    python -m dmosnet_jax.benchmarks.convolution --output=convolution.csv

Forms: XLA's own convolution; the form of `models/convolution.py` under plain automatic differentiation; the same with
its own gradients. `ratio` is the time of XLA's convolution over the form's: above 1 the form is faster.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dmosnet_jax.benchmarks import command
from dmosnet_jax.core import tables
from dmosnet_jax.core.command import guarded, run_program
from dmosnet_jax.models import convolution

Form = Callable[[jax.Array, jax.Array], jax.Array]


def xla_depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[B, H, W, C]` by `[3, 3, 1, C]` as XLA's grouped convolution."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=dimensions, feature_group_count=x.shape[-1]
    )


def xla_pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[B, H, W, I]` by `[I, O]` as XLA's convolution with a 1x1 window."""
    return lax.conv_general_dilated(x, kernel[None, None], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _without_gradient(form: Any) -> Form:
    """The function that a `custom_vjp` wraps, for XLA to differentiate by itself."""
    return form.__wrapped__


def forms() -> dict[str, dict[str, Form]]:
    """Operation -> form -> function of (x, kernel); the first form is the reference."""
    depthwise, pointwise = convolution.depthwise3x3, convolution.pointwise
    return {
        "depthwise 3x3": {
            "XLA grouped": xla_depthwise,
            "shifted sums": _without_gradient(depthwise),
            "shifted sums, own gradients": depthwise,
        },
        "pointwise 1x1": {
            "XLA 1x1": xla_pointwise,
            "matrix product": _without_gradient(pointwise),
            "matrix product, own gradients": pointwise,
        },
    }


def passes(form: Form) -> dict[str, Callable[..., Any]]:
    """What is timed: the forward pass, and both passes with gradients to input and kernel."""

    def both(x, kernel, weights):
        y, pull = jax.vjp(form, x, kernel)
        return y, pull(weights)

    return {"forward": jax.jit(lambda x, kernel, _: form(x, kernel)), "forward + backward": jax.jit(both)}


def measure(shape: tuple[int, int, int, int], dtype: str, repeats: int) -> Iterator[dict[str, Any]]:
    """One row per operation, pass and form.

    Args:
        shape: `[B, H, W, C]` of the input; the 1x1 convolution keeps the number of channels.
        dtype: element type of input and kernel.
        repeats: timed calls.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    channels = shape[-1]
    x, weights = (jax.random.normal(key, shape, jnp.dtype(dtype)) for key in keys[:2])
    for operation, known in forms().items():
        kernel_shape = (3, 3, 1, channels) if operation.startswith("depthwise") else (channels, channels)
        kernel = jax.random.normal(keys[2], kernel_shape, jnp.dtype(dtype))
        reference: dict[str, float] = {}
        for form, function in known.items():
            for direction, timed in passes(function).items():
                call = functools.partial(timed, x, kernel, weights)
                jax.block_until_ready(call())  # compiles
                took = 1e3 * command.median_seconds(call, repeats)[0]
                reference.setdefault(direction, took)
                yield {
                    "operation": operation,
                    "pass": direction,
                    "form": form,
                    "milliseconds": took,
                    "ratio": reference[direction] / took,
                }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser("convolution", __doc__)
    sizes = ("BATCH", "HEIGHT", "WIDTH", "CHANNELS")
    parser.add_argument("--shape", type=int, nargs=4, default=(32, 64, 32, 64), metavar=sizes, help="of the input")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls")
    arguments = parser.parse_args(argv)
    if min(*arguments.shape, arguments.repeats) < 1:
        parser.error("--shape and --repeats must be 1 or more")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    options = _arguments(argv)

    def run() -> None:
        device = jax.devices()[0]
        shape = "x".join(map(str, options.shape))
        print(f"{shape} {options.dtype}, {device.platform} {device.device_kind}, jax {jax.__version__}")
        rows = list(measure(tuple(options.shape), options.dtype, options.repeats))
        passes_in_order = list(dict.fromkeys((row["operation"], row["pass"]) for row in rows))
        rows.sort(key=lambda row: passes_in_order.index((row["operation"], row["pass"])))
        tables.publish(rows, options.output)

    return guarded(run)


if __name__ == "__main__":
    run_program(main)
